"""Ash against llama-server, llama-batched-bench and llama-cpp-python: same weights, one run, one table.

Systems alternate: each repetition takes every system through the same conversations, one system after the
other. Ash is measured through its WebSocket, with its log, encoder, router and mode observer at work. Rounds
in which other processes used more than --foreign of the cores are left out and counted. README.md says how
to read the result.

    .venv/bin/python -m benchmarks.build_peers     # once
    .venv/bin/python -m benchmarks.peers --json build/peers.json
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import psutil

from ash import config
from ash.app import models_folder
from ash.slices.models import locate_model
from benchmarks.build_peers import DEFAULT_FOLDER
from benchmarks.harness.conversation import System, SystemFailedError
from benchmarks.harness.cpu import ForeignCpu
from benchmarks.harness.llama_cpp_peers import (
    PeerPrograms,
    Workload,
    batched_bench,
    llama_cpp_python,
    llama_server,
)
from benchmarks.harness.memory import proportional_bytes
from benchmarks.harness.peer_report import ALL_SLOTS, ASH, DEFAULT, LIMIT, TUNED, Report
from benchmarks.harness.rounds import Round, converse
from benchmarks.harness.server import ROOT, AshServer

LIMIT_OPTIONS = (
    ("-no-kvu", "-fa", "off"),
    ("-no-kvu", "-fa", "on"),
    ("-kvu", "-fa", "off"),
    ("-kvu", "-fa", "on"),
)
TUNED_OPTIONS = ("-fa", "off", "--no-kv-unified", "-b", "512", "-ub", "512", "--cache-ram", "0")
"""What helps most on CPUs: no flash attention, and a KV stream for each slot. --tune measures the others."""
TUNING = {
    "fa off": ("-fa", "off"),
    "fa off, streams": ("-fa", "off", "--no-kv-unified"),
    "fa off, unified": ("-fa", "off", "--kv-unified"),
    "fa on, streams": ("-fa", "on", "--no-kv-unified"),
    "fa off, streams, no cache": ("-fa", "off", "--no-kv-unified", "--cache-ram", "0"),
    "fa off, streams, b 512": TUNED_OPTIONS,
    "fa off, streams, b 128": (
        "-fa",
        "off",
        "--no-kv-unified",
        "-b",
        "128",
        "-ub",
        "128",
        "--cache-ram",
        "0",
    ),
    "fa off, streams, b 64": ("-fa", "off", "--no-kv-unified", "-b", "64", "-ub", "64", "--cache-ram", "0"),
}


def ash(workload: Workload, folder: Path) -> AshServer:
    """Ash with the workload's settings; everything else as config.toml has it."""
    sampling = "ASH_SLICES__NANO__SAMPLING__"
    return AshServer(
        folder / "ash",
        {
            "ASH_SLICES__NANO__SLOTS": str(workload.sessions),
            "ASH_SLICES__NANO__CONTEXT": str(workload.context),
            "ASH_SLICES__NANO__THREADS": str(workload.threads),
            f"{sampling}MAX_TOKENS": str(workload.tokens),
            f"{sampling}TEMPERATURE": "0.0",
            # The peers' default; llama-cpp-python's is 1.0 too.
            f"{sampling}REPEAT_PENALTY": "1.0",
            "ASH_SESSION__PERSONA": json.dumps(workload.persona),
        },
    )


def peers(programs: PeerPrograms, workload: Workload, folder: Path) -> list[System]:
    """The servers that Ash is measured against."""
    slots = workload.sessions
    return [
        llama_server(DEFAULT, programs, workload, folder, slots=None, options=()),
        llama_server(ALL_SLOTS, programs, workload, folder, slots=slots, options=()),
        llama_server(TUNED, programs, workload, folder, slots=slots, options=TUNED_OPTIONS),
        llama_cpp_python(programs, workload, folder),
    ]


class Comparison:
    """All systems of one run, started together, measured one at a time."""

    def __init__(
        self,
        systems: Sequence[System],
        programs: PeerPrograms,
        workload: Workload,
        *,
        rounds: int,
        report: Report,
    ) -> None:
        self._systems = list(systems)
        self._programs = programs
        self._workload = workload
        self._rounds = rounds
        self._report = report
        self._prompts: list[int] = []
        self._limit_options: tuple[str, ...] = LIMIT_OPTIONS[0]

    async def start(self) -> None:
        """Start every system and warm it up with one conversation."""
        for system in self._systems:
            print(f"starting {system.name}", file=sys.stderr, flush=True)
            await system.start()
            warm = await converse(system, sessions=1, rounds=self._rounds, repetition=-1)
            if warm[-1].failures:
                raise SystemFailedError(f"{system.name}: {warm[-1].failures[0]}")
            lengths = [round(result.prompt_tokens) for result in warm]
            if all(lengths) and not self._prompts:
                self._prompts = lengths

    async def stop(self) -> None:
        """End every system."""
        for system in self._systems:
            await system.stop()

    async def repeat(self, repetition: int, sessions: int, *, with_limit: bool) -> None:
        """Measure every system once; another one is first in each repetition."""
        turn = repetition % len(self._systems)
        for system in self._systems[turn:] + self._systems[:turn]:
            if not system.process_ids():
                print(f"{system.name} has ended; it is left out", file=sys.stderr)
                continue
            results = await converse(system, sessions=sessions, rounds=self._rounds, repetition=repetition)
            resident = await asyncio.to_thread(proportional_bytes, system.process_ids())
            self._report.add(results, resident_bytes=resident)
            print(self._report.line(results), file=sys.stderr, flush=True)
        if with_limit:
            results = await self._limit(repetition, sessions, self._limit_options)
            self._report.add(results, resident_bytes=0)
            print(self._report.line(results), file=sys.stderr, flush=True)

    async def choose_limit(self) -> None:
        """Find the settings with which llama-batched-bench is fastest at the most sessions."""
        fastest = 0.0
        for options in LIMIT_OPTIONS:
            rows = await batched_bench(
                self._programs,
                self._workload,
                prompts=self._prompts[-1:],
                sequences=self._workload.sessions,
                options=options,
            )
            speed = rows[-1].tokens_per_s
            print(f"llama-batched-bench {' '.join(options)}: {speed:.1f} tok/s", file=sys.stderr, flush=True)
            if speed > fastest:
                fastest, self._limit_options = speed, options
        self._report.limit_options = self._limit_options

    async def _limit(self, repetition: int, sessions: int, options: Sequence[str]) -> list[Round]:
        """The same prompt lengths and tokens in llama-batched-bench, which only decodes."""
        cpu = ForeignCpu(list)
        before = cpu.read()
        rows = await batched_bench(
            self._programs, self._workload, prompts=self._prompts, sequences=sessions, options=options
        )
        foreign = cpu.share_since(before)
        return [
            Round(
                repetition,
                LIMIT,
                sessions,
                number,
                tokens=row.tokens * row.sequences,
                window_s=row.seconds,
                steady_tokens=row.tokens * row.sequences,
                steady_s=row.seconds,
                prompt_tokens=row.prompt,
                foreign_cpu=foreign,
            )
            for number, row in enumerate(rows, 1)
        ]


def facts(arguments: argparse.Namespace, workload: Workload) -> dict[str, object]:
    """What a reader of the raw results needs to know."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "llama_cpp_python": metadata.version("llama-cpp-python"),
        "workload": {**dataclasses.asdict(workload), "model": workload.model.name},
        "foreign_limit": arguments.foreign,
        "tuned_options": TUNED_OPTIONS,
    }


async def run(arguments: argparse.Namespace) -> Report:
    settings = config.load(ROOT / "config.toml")
    nano = settings.slices["nano"]
    workload = Workload(
        model=locate_model(nano.model, cache_folder=models_folder(settings)),
        persona=settings.session.persona,
        tokens=arguments.tokens,
        context=arguments.context,
        threads=arguments.threads,
        sessions=max(arguments.sessions),
    )
    programs = PeerPrograms(arguments.peers.resolve())
    if missing := programs.missing():
        names = ", ".join(map(str, missing))
        raise SystemFailedError(f"not built: {names}; run: python -m benchmarks.build_peers --folder FOLDER")
    report = Report(arguments.foreign)
    with tempfile.TemporaryDirectory(prefix="ash-peers-") as name:
        folder = Path(name)
        chosen: list[System]
        if arguments.tune:
            chosen = [
                llama_server(label, programs, workload, folder, slots=workload.sessions, options=options)
                for label, options in TUNING.items()
            ]
        else:
            chosen = [ash(workload, folder), *peers(programs, workload, folder)]
            chosen = [
                system for system in chosen if system.name in arguments.systems or not arguments.systems
            ]
        with_limit = not arguments.tune and (not arguments.systems or LIMIT in arguments.systems)
        comparison = Comparison(chosen, programs, workload, rounds=arguments.rounds, report=report)
        try:
            await comparison.start()
            if with_limit:
                await comparison.choose_limit()
            for repetition in range(arguments.repetitions):
                for sessions in arguments.sessions:
                    await comparison.repeat(repetition, sessions, with_limit=with_limit)
        finally:
            await comparison.stop()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**facts(arguments, workload), **report.raw()}, indent=1))
    return report


def main() -> None:
    names = (ASH, DEFAULT, TUNED, ALL_SLOTS, "llama-cpp-python", LIMIT)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a session")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--systems", nargs="+", default=[], choices=names, help="leave the others out")
    parser.add_argument("--tune", action="store_true", help="compare settings of llama-server instead")
    parser.add_argument("--foreign", type=float, default=0.05, help="share of the cores others may use")
    parser.add_argument("--peers", type=Path, default=DEFAULT_FOLDER, help="the folder of build_peers.py")
    parser.add_argument("--json", type=Path, help="write the raw results here")
    try:
        report = asyncio.run(run(parser.parse_args()))
    except SystemFailedError as error:
        sys.exit(f"peers: {error}")
    print(report.table())
    print()
    print(report.goals())


if __name__ == "__main__":
    main()
