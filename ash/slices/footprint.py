"""The memory settings of a slice: which ones are worth measuring, and what measurements say. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from ash.domain.errors import InvalidRequest
from ash.slices.process_usage import MemoryUse
from ash.slices.spec import SliceSpec

STOCK: Final = "stock"
"""The row that others are compared with: the settings that llama.cpp has by itself."""

_SAME_SPEED: Final = 0.95
"""A row this close to stock, in prefill and in decoding, lost no speed: repeated runs differ by as much."""

_QUIET: Final = 0.05
"""Speeds are compared only if other processes used no larger share of the processors."""

_SMALL_CONTEXT: Final = 1024
_SMALL_BATCH: Final = 64

MemorySettings = tuple[bool, Literal["off", "auto", "on"], bool, bool]
"""mmap, lazy, repack, release_file."""


class Variant(Struct, frozen=True):
    """A slice with some settings changed. `smaller`: it also holds less than the slice as configured."""

    name: str
    spec: SliceSpec
    smaller: bool = False

    def settings(self) -> dict[str, bool | int | str]:
        """The settings that decide, by their names in config.toml."""
        keys = ["mmap", "lazy", "repack", "release_file"]
        if self.smaller:
            keys += ["context", "slots", "batch"]
        return {key: getattr(self.spec, key) for key in keys}


class Measurement(Struct, frozen=True):
    """One row.

    Attributes:
        variant: its name.
        settings: Variant.settings.
        smaller: context, slots and batch are smaller than configured.
        memory: of the worker, after decoding.
        load_s: seconds from the start of the load to a model that is ready, in the worker.
        prompt_tokens: tokens of the prompt.
        prefill_rate: prompt tokens a second.
        output_tokens: tokens of the answer.
        decode_rate: tokens a second behind the first one; None for answers of one token.
        others_cpu: share of the processors that other processes used meanwhile, 0 to 1.
    """

    variant: str
    settings: dict[str, bool | int | str]
    smaller: bool
    memory: MemoryUse
    load_s: float
    prompt_tokens: int
    prefill_rate: float
    output_tokens: int
    decode_rate: float | None
    others_cpu: float


class Failure(Struct, frozen=True):
    """A row that could not be measured, and why."""

    variant: str
    problem: str


Row = Measurement | Failure


def require_local(spec: SliceSpec) -> None:
    """Refuse what has no memory here.

    Raises:
        InvalidRequest: the slice is remote.
    """
    if spec.remote is not None or spec.model.startswith("openai:"):
        place = spec.remote.url if spec.remote is not None else spec.model
        raise InvalidRequest(
            f"slice {spec.name} is remote ({place}): its memory is that of another server; name a slice "
            "whose model is a local file"
        )


def variants(spec: SliceSpec, *, lazy: bool) -> tuple[Variant, ...]:
    """What is worth measuring: stock first, then the slice as configured if it is none of the others.

    Args:
        spec: the slice.
        lazy: whether the model has tensors that can be read lazily; else such rows would repeat others.
    """
    rows: dict[str, MemorySettings] = {
        STOCK: (True, "auto", True, False),
        "no mmap": (False, "auto", True, False),
        "no repack": (True, "auto", False, False),
        "release_file": (True, "auto", True, True),
    }
    if lazy:
        rows |= {
            "lazy": (True, "on", True, False),
            "no mmap, lazy": (False, "on", True, False),
            "no repack, lazy": (True, "on", False, False),
            "release_file, lazy": (True, "on", True, True),
        }
    smallest = ("no repack, lazy", "release_file, lazy") if lazy else ("no repack", "release_file")
    configured = (spec.mmap, spec.lazy, spec.repack, spec.release_file)
    found = [Variant(name, _with(spec, settings)) for name, settings in rows.items()]
    if configured not in rows.values():
        found.insert(1, Variant("as configured", spec))
    for name in smallest:
        small = replace(
            _with(spec, rows[name]), context=min(spec.context, _SMALL_CONTEXT), slots=1, batch=_SMALL_BATCH
        )
        found.append(Variant(f"{name}, small", small, smaller=True))
    return tuple(found)


def middle(rounds: Sequence[Measurement]) -> Measurement:
    """The medians of several measurements of one variant; the memory is that of one round, the middle one."""
    by_size = sorted(rounds, key=lambda each: each.memory.resident)
    chosen = by_size[len(by_size) // 2]
    rates = [each.decode_rate for each in rounds if each.decode_rate is not None]
    return replace(
        chosen,
        load_s=median(each.load_s for each in rounds),
        prefill_rate=median(each.prefill_rate for each in rounds),
        decode_rate=median(rates) if rates else None,
        others_cpu=max(each.others_cpu for each in rounds),
    )


def advice(rows: Sequence[Row]) -> list[str]:
    """What the measurements say, in sentences; nothing that they do not say. Empty without a stock row."""
    measured = [row for row in rows if isinstance(row, Measurement)]
    stock = next((row for row in measured if row.variant == STOCK), None)
    if stock is None:
        return []
    return list(_sentences(measured, stock))


def _sentences(measured: list[Measurement], stock: Measurement) -> Iterator[str]:
    same_context = [row for row in measured if not row.smaller]
    busiest = max(row.others_cpu for row in measured)
    quiet = busiest <= _QUIET
    smallest = min(same_context, key=_resident)
    yield _sentence("Smallest", smallest, stock, with_speed=quiet)
    smaller = min((row for row in measured if row.smaller), key=_resident, default=None)
    if smaller is not None and _resident(smaller) < _resident(smallest):
        yield _sentence("Smaller still, for one short session", smaller, stock, with_speed=quiet)
    if not quiet:
        yield (
            f"Other processes used up to {busiest:.0%} of the processors, so the speeds are not compared: "
            "measure again on a quiet machine. Memory does not depend on it."
        )
        return
    as_fast = min((row for row in same_context if _is_as_fast(row, stock)), key=_resident)
    if as_fast is stock:
        yield "Nothing that is smaller than stock is as fast."
    else:
        yield _sentence("Smallest at no loss of speed", as_fast, stock, with_speed=True)


def _with(spec: SliceSpec, settings: MemorySettings) -> SliceSpec:
    mmap, lazy, repack, release_file = settings
    return replace(spec, mmap=mmap, lazy=lazy, repack=repack, release_file=release_file)


def _resident(row: Measurement) -> int:
    return row.memory.resident


def _is_as_fast(row: Measurement, stock: Measurement) -> bool:
    if row.decode_rate is None or stock.decode_rate is None:
        return row is stock
    return row is stock or (
        row.decode_rate >= _SAME_SPEED * stock.decode_rate
        and row.prefill_rate >= _SAME_SPEED * stock.prefill_rate
    )


def _sentence(what: str, row: Measurement, stock: Measurement, *, with_speed: bool) -> str:
    share = _resident(row) / _resident(stock) - 1
    facts = [f"{share:+.0%}"]
    if with_speed:
        facts.append(f"prefill {row.prefill_rate / stock.prefill_rate:.2f} of stock")
        if row.decode_rate is not None and stock.decode_rate is not None:
            facts.append(f"decoding {row.decode_rate / stock.decode_rate:.2f}")
    settings = ", ".join(f"{key} = {_toml(value)}" for key, value in row.settings.items())
    return f"{what}: {row.variant}, {_resident(row) / 1e6:.0f} MB ({', '.join(facts)}). Settings: {settings}."


def _toml(value: bool | int | str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)
