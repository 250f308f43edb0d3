"""`ash slices footprint`: the memory and the speed of a slice, and what each setting changes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from ash import logs
from ash.app import models_folder, prepare_data_folder, slice_specs
from ash.cli.options import DEFAULT_CONFIG, Config, out
from ash.config import load
from ash.domain.errors import NotFound
from ash.slices.footprint import (
    STOCK,
    Failure,
    Measurement,
    Row,
    Variant,
    advice,
    require_local,
)
from ash.slices.footprint_run import compare, measure

_NUMBERS: Final = (
    "anonymous", "file", "resident", "to stock", "PSS", "peak", "load s", "prefill/s", "decode/s", "others",
)  # fmt: skip
_CAPTION: Final = (
    "memory in MB (1,000,000 bytes), speeds in tokens, `others`: processor share of other processes; "
    "small: one session of at most 1024 tokens"
)
_TABLE_WIDTH: Final = 125


def slices_footprint(
    name: Annotated[str, typer.Argument(metavar="SLICE", help="A slice of the catalogue.")],
    *,
    tokens: Annotated[int, typer.Option(min=2, help="The longest answer.")] = 64,
    compared: Annotated[
        bool, typer.Option("--compare", help="Measure the settings that are worth trying, one after another.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="With --compare: repeat all, show medians.")] = 1,
    cold: Annotated[
        bool, typer.Option("--cold", help="Drop the model file from the page cache before each start.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Start a slice, decode, show its memory and speed. Example: ash slices footprint nano --compare."""
    settings = load(config)
    specs = {spec.name: spec for spec in slice_specs(settings)}
    if name not in specs:
        raise NotFound(f"there is no slice {name!r}; the catalogue has {', '.join(specs)}")
    spec = specs[name]
    require_local(spec)
    logs.configure("warning", None)  # to standard error: standard output belongs to the table
    prepare_data_folder(settings)
    folder = models_folder(settings)
    if not compared:
        variant = Variant("as configured", spec)
        _show([asyncio.run(measure(variant, cache_folder=folder, tokens=tokens, cold=cold))], as_json=as_json)
        return

    def on_start(number: int, count: int, variant: str) -> None:
        sys.stderr.write(f"[{number}/{count}] {variant}\n")

    rows = asyncio.run(
        compare(spec, cache_folder=folder, tokens=tokens, rounds=rounds, cold=cold, on_start=on_start)
    )
    _show(rows, as_json=as_json)
    if not any(isinstance(row, Measurement) for row in rows):
        raise typer.Exit(1)


def _show(rows: Sequence[Row], *, as_json: bool) -> None:
    lines = advice(rows)
    if as_json:
        sys.stdout.write(msgspec.json.encode({"rows": rows, "advice": lines}).decode() + "\n")
        return
    stock = next((row for row in rows if isinstance(row, Measurement) and row.variant == STOCK), None)
    table = Table(caption=_CAPTION)
    table.add_column("settings", no_wrap=True)
    for heading in _NUMBERS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if isinstance(row, Measurement):
            table.add_row(*_cells(row, stock))
    # A line that a narrow terminal breaks can be read; a cell that was cut cannot.
    Console(width=max(out.width, _TABLE_WIDTH)).print(table)
    for row in rows:
        if isinstance(row, Failure):
            out.print(f"{row.variant}: not measured: {row.problem}", soft_wrap=True, markup=False)
    for line in lines:
        out.print(line, soft_wrap=True, markup=False, highlight=False)


def _cells(row: Measurement, stock: Measurement | None) -> tuple[str, ...]:
    memory = row.memory
    difference = "" if stock is None else f"{(memory.resident - stock.memory.resident) / 1e6:+.0f}"
    return (
        row.variant,
        *(f"{size / 1e6:.0f}" for size in (memory.anonymous, memory.file_backed, memory.resident)),
        difference,
        *(f"{size / 1e6:.0f}" for size in (memory.proportional, memory.peak)),
        f"{row.load_s:.1f}",
        f"{row.prefill_rate:.1f}",
        "" if row.decode_rate is None else f"{row.decode_rate:.2f}",
        f"{row.others_cpu:.0%}",
    )
