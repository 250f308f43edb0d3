"""Requests that alternate between two slices of which the memory budget holds one: A B A B A B.

Every `gap` seconds a request comes, by turns for one slice and for the other, from sessions that use both.
The naive policy serves in the order of arrival: it loads on demand and evicts the other slice as soon as it
is idle, which is residency without patience and without a least stay. The collated one is that of the
settings (`[residency]`). Both see the same trace, through SlicePool, with a worker process for each slice;
they alternate within one run. The wait is from the request to its admission by the engine, evictions and
loads included. Aborted is every request without a whole answer from the slice that it asked for.

    .venv/bin/python -m benchmarks.residency [--requests 24] [--gap 1.0] [--rounds 1]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from ash.app import residency_limits
from ash.config import load
from ash.domain.errors import SliceError
from ash.domain.values import Admitted, ChatMessage, Finished, GenerateRequest, Sampling, SliceNotice
from ash.slices.dispatch import SlicePool
from ash.slices.engine import LocalEngine
from ash.slices.residency import ResidencyLimits
from ash.slices.sizes import RememberedSizes
from ash.slices.spec import SliceSpec
from benchmarks.harness.cpu import ForeignCpu
from benchmarks.harness.stats import percentile
from benchmarks.harness.table import markdown, number

ROOT = Path(__file__).resolve().parents[1]
SUBJECTS = ("a lighthouse", "a storm", "an old harbour", "a lost letter", "a winter night", "a quiet street")
SESSIONS = 6


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one request; `wait_s` None if it was never admitted."""

    wait_s: float | None
    tokens: int
    loads: int
    evictions: int
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy over one trace; `foreign_cpu` is the share of all cores that others used."""

    served: tuple[Served, ...]
    seconds: float
    foreign_cpu: float


async def serve(pool: SlicePool, name: str, number_: int, tokens: int) -> Served:
    """One request from its arrival to its end."""
    prompt = (
        ChatMessage("system", "You are a helpful AI assistant named Ash."),
        ChatMessage("user", f"Write one sentence about {SUBJECTS[number_ % len(SUBJECTS)]}."),
    )
    # Two requests in a row, one for each slice, belong to one session.
    session = f"session {number_ // 2 % SESSIONS}"
    sampling = Sampling(temperature=0.0, max_tokens=tokens)
    began = time.perf_counter()
    wait_s, made, loads, evictions, is_whole = None, 0, 0, 0, False
    try:
        request = GenerateRequest(f"run {number_}", session, prompt, sampling)
        async for item in pool.generate(name, request):
            match item:
                case Admitted():
                    wait_s = time.perf_counter() - began
                case SliceNotice(what="loaded"):
                    loads += 1
                case SliceNotice(what="evicted"):
                    evictions += 1
                case SliceNotice():
                    # It crashed or fell back: whatever follows is no longer what was asked for.
                    return Served(wait_s, made, loads, evictions, is_whole=False)
                case Finished(reason=reason, output_tokens=output):
                    made, is_whole = output, reason in {"stop", "length"}
    except SliceError as error:
        print(f"request {number_} on {name}: {error}")
    return Served(wait_s, made, loads, evictions, is_whole)


async def replay(
    specs: list[SliceSpec],
    sizes: RememberedSizes,
    limits: ResidencyLimits,
    models: Path,
    options: argparse.Namespace,
) -> Outcome:
    """The whole trace under one policy, from no slice in memory to the last answer."""
    engines = {spec.name: LocalEngine(spec, cache_folder=models) for spec in specs}
    # Sizes stay at their estimates: what is measured depends on who else maps the files, and the trace is
    # about slices that do not fit together.
    pool = SlicePool(engines, specs, limits=limits, sizes=sizes)
    cpu = ForeignCpu(lambda: [engine.pid for engine in engines.values() if engine.pid is not None])
    before, began = cpu.read(), time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            tasks = []
            for request in range(options.requests):
                name = specs[request % len(specs)].name
                tasks.append(group.create_task(serve(pool, name, request, options.tokens)))
                await asyncio.sleep(options.gap)
        seconds = time.perf_counter() - began
        return Outcome(tuple(task.result() for task in tasks), seconds, cpu.share_since(before))
    finally:
        await pool.close()


def row(policy: str, outcomes: list[Outcome]) -> list[str]:
    """One line of the table, over all rounds."""
    served = [each for outcome in outcomes for each in outcome.served]
    waits = [each.wait_s for each in served if each.wait_s is not None]
    seconds = sum(outcome.seconds for outcome in outcomes)
    return [
        policy,
        str(len(served)),
        str(sum(each.loads for each in served)),
        str(sum(each.evictions for each in served)),
        number(percentile(waits, 50), 1),
        number(percentile(waits, 95), 1),
        number(max(waits, default=None), 1),
        number(seconds, 0),
        number(sum(each.tokens for each in served) / seconds, 1),
        str(sum(not each.is_whole for each in served)),
        number(max(outcome.foreign_cpu for outcome in outcomes), 0, 100),
    ]


async def main(options: argparse.Namespace) -> None:
    settings = load(ROOT / "config.toml")
    specs = list(settings.slices.values())[:2]
    with tempfile.TemporaryDirectory(prefix="ash-bench-") as folder:
        models = Path(folder)
        sizes = RememberedSizes(models / "sizes.json", cache_folder=models)
        expected = {spec.name: sizes.expected(spec).bytes for spec in specs}
        budget = max(expected.values())
        named = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in expected.items())
        print(f"budget {budget / 1e6:.0f} MB for {named}; a request every {options.gap:g} s")
        collated = residency_limits(settings.residency)
        policies = {
            "naive": ResidencyLimits(budget, min_resident_s=0.0, patience_s=0.0),
            "collated": ResidencyLimits(budget, collated.min_resident_s, collated.patience_s),
        }
        outcomes: dict[str, list[Outcome]] = {name: [] for name in policies}
        for _ in range(options.rounds):
            for name, limits in policies.items():
                outcomes[name].append(await replay(specs, sizes, limits, models, options))
    headers = ["policy", "requests", "loads", "evictions", "wait p50 s", "p95", "longest"]
    headers += ["total s", "tok/s", "aborted", "foreign CPU %"]
    print(markdown(headers, [row(name, each) for name, each in outcomes.items()]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=24, help="how many, both slices together")
    parser.add_argument("--gap", type=float, default=1.0, help="seconds between two")
    parser.add_argument("--tokens", type=int, default=24, help="longest answer")
    parser.add_argument("--rounds", type=int, default=1, help="how often both policies see the trace")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    asyncio.run(main(parser.parse_args()))
