"""Measures the memory and the speed of a slice, in one setting or in several, one after another.

Every measurement starts a worker process of its own, prefills a prompt, decodes an answer and reads the
memory of the worker while the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from ash.domain.errors import SliceError
from ash.domain.values import Admitted, ChatMessage, Finished, GenerateRequest, Sampling
from ash.slices.engine import LocalEngine
from ash.slices.footprint import Failure, Measurement, Row, Variant, middle, variants
from ash.slices.gguf import read_header
from ash.slices.models import prepare_model
from ash.slices.process_usage import cpu_times, memory_use
from ash.slices.spec import SliceSpec
from ash.slices.worker.mapped_file import LAZY_TENSORS, forget_cached

_SENTENCE: Final = "The keeper of the lighthouse wrote down the wind, the ships and the colour of the sea. "
QUESTION: Final = _SENTENCE * 8 + "Go on with this diary for as long as you can, one day after the other."
"""What is prefilled: enough tokens for a rate, few enough for a small context."""


def reads_lazily(path: Path) -> bool:
    """Whether the model at `path` has a tensor that the setting `lazy` applies to.

    Raises:
        ModelFileError: it cannot be read.
    """
    return any(tensor.name in LAZY_TENSORS for tensor in read_header(path).tensors)


async def measure(variant: Variant, *, cache_folder: Path, tokens: int, cold: bool = False) -> Measurement:
    """Start the slice in a process of its own, decode, read its memory, end it.

    Args:
        variant: what to start.
        cache_folder: where models that come in parts are put together.
        tokens: the longest answer.
        cold: drop the file from the page cache first, as after a start of the machine.

    Raises:
        ModelFileError, SliceUnavailable: it cannot be loaded.
        SliceError: the generation failed.
    """
    # A measurement leaves nothing on the disk.
    spec = replace(variant.spec, disk_bytes=0)
    if cold:
        path = prepare_model(spec, cache_folder=cache_folder)
        forget_cached(path, [(0, path.stat().st_size)])
    engine = LocalEngine(spec, cache_folder=cache_folder)
    try:
        await engine.open()
        ready, pid = engine.ready, engine.pid
        assert ready is not None, "an open engine is ready"
        assert pid is not None, "an open engine has a process"
        # Drawn, not greedy: a greedy answer may repeat one token, and read its embedding row alone.
        sampling = Sampling(temperature=1.0, seed=1, repeat_penalty=1.0, max_tokens=tokens)
        request = GenerateRequest("footprint", "footprint", (ChatMessage("user", QUESTION),), sampling)
        before = cpu_times(pid)
        prompt_tokens = 0
        finished = Finished("cancelled", 0)
        async for item in engine.generate(request):
            match item:
                case Admitted():
                    prompt_tokens = item.prompt_tokens
                case Finished():
                    finished = item
        others = before.others_share(cpu_times(pid))
        memory = memory_use(pid)
    finally:
        await engine.close()
    behind_first = finished.output_tokens - 1
    return Measurement(
        variant=variant.name,
        settings=variant.settings(),
        smaller=variant.smaller,
        memory=memory,
        load_s=ready.load_s,
        prompt_tokens=prompt_tokens,
        prefill_rate=prompt_tokens / finished.prefill_s,
        output_tokens=finished.output_tokens,
        decode_rate=behind_first / finished.decode_s if behind_first > 0 else None,
        others_cpu=others,
    )


async def compare(
    spec: SliceSpec,
    *,
    cache_folder: Path,
    tokens: int,
    rounds: int = 1,
    cold: bool = False,
    on_start: Callable[[int, int, str], None],
) -> list[Row]:
    """Measure every variant of `spec`; one that fails does not end the others.

    Args:
        spec: the slice.
        cache_folder: where models that come in parts are put together.
        tokens: the longest answer.
        rounds: how often all are measured in turn; rows hold medians.
        cold: drop the file from the page cache before each start.
        on_start: is told number, count and name of each measurement before it begins.

    Raises:
        ModelFileError: there is no model file that could be loaded.
    """
    path = prepare_model(spec, cache_folder=cache_folder)
    rows = variants(spec, lazy=reads_lazily(path))
    found: dict[str, list[Measurement]] = {row.name: [] for row in rows}
    problems: dict[str, str] = {}
    for turn in range(rounds):
        for number, row in enumerate(rows):
            on_start(turn * len(rows) + number + 1, rounds * len(rows), row.name)
            try:
                found[row.name].append(
                    await measure(row, cache_folder=cache_folder, tokens=tokens, cold=cold)
                )
            except SliceError as error:
                problems[row.name] = str(error)
    return [
        middle(found[row.name]) if row.name not in problems else Failure(row.name, problems[row.name])
        for row in rows
    ]
