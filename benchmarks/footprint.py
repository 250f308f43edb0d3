"""What the memory settings of a slice cost in speed, counted so that a busy machine does not matter much.

`ash slices footprint --compare` measures by the clock, which tells nothing while other processes run. This
counts tokens for each second of processor time that the worker takes, with one thread, so that no time goes
into waiting for another. Settings alternate within a round; medians of the rounds are printed.

    .venv/bin/python benchmarks/footprint.py FILE [--tokens 24] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ash import logs
from ash.domain.values import Admitted, ChatMessage, Delta, Finished, GenerateRequest, Sampling
from ash.slices.engine import LocalEngine
from ash.slices.footprint import STOCK, Variant, variants
from ash.slices.footprint_run import QUESTION, reads_lazily
from ash.slices.process_usage import memory_use, processor_seconds
from ash.slices.spec import SliceSpec
from benchmarks.harness.table import markdown, number

Figures = tuple[float, float, float, float]
"""Resident MB, peak MB, prefill and decoding in tokens a processor second."""


async def measure(variant: Variant, folder: Path, tokens: int) -> Figures:
    engine = LocalEngine(replace(variant.spec, disk_bytes=0), cache_folder=folder)
    await engine.open()
    pid = engine.pid
    assert pid is not None
    sampling = Sampling(temperature=1.0, seed=1, repeat_penalty=1.0, max_tokens=tokens)
    request = GenerateRequest("run", "session", (ChatMessage("user", QUESTION),), sampling)
    began = processor_seconds(pid)
    first = None
    prompt = answer = 0
    async for item in engine.generate(request):
        match item:
            case Admitted():
                prompt = item.prompt_tokens
            case Delta() if first is None:
                first = processor_seconds(pid)
            case Finished():
                answer = item.output_tokens
    ended = processor_seconds(pid)
    memory = memory_use(pid)
    await engine.close()
    assert first is not None, "an answer without text cannot be timed"
    return (
        memory.resident / 1e6,
        memory.peak / 1e6,
        prompt / (first - began),
        (answer - 1) / (ended - first),
    )


async def run(path: Path, tokens: int, rounds: int) -> None:
    spec = SliceSpec("footprint", "turbo", f"path:{path}", slots=1, threads=1)
    rows = variants(spec, lazy=reads_lazily(path))
    found: dict[str, list[Figures]] = {row.name: [] for row in rows}
    with tempfile.TemporaryDirectory(prefix="ash-footprint-") as folder:
        for _ in range(rounds):
            for row in rows:
                found[row.name].append(await measure(row, Path(folder), tokens))
    medians = {
        name: [statistics.median(each) for each in zip(*figures, strict=True)]
        for name, figures in found.items()
    }
    stock = medians[STOCK]
    headers = ("settings", "resident MB", "peak MB", "prefill", "of stock", "decode", "of stock")
    print(markdown(headers, [_cells(name, figures, stock) for name, figures in medians.items()]))


def _cells(name: str, figures: Sequence[float], stock: Sequence[float]) -> list[str]:
    resident, peak, prefill, decode = figures
    return [
        name,
        number(resident),
        number(peak),
        number(prefill, 1),
        number(prefill / stock[2], 2),
        number(decode, 2),
        number(decode / stock[3], 2),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logs.configure("error", None)
    asyncio.run(run(options.file, options.tokens, options.rounds))
