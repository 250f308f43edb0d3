"""`ash slices`: the catalogue of model slices."""

from __future__ import annotations

import typer
from rich.table import Table

from ash.app import models_folder, prepare_data_folder, residency_limits, slice_sizes, slice_specs
from ash.cli.footprint import slices_footprint
from ash.cli.options import DEFAULT_CONFIG, Config, out
from ash.cli.pull import slices_pull
from ash.config import load
from ash.domain.errors import ModelFileError
from ash.slices.catalog import check
from ash.slices.sizes import RememberedSizes
from ash.slices.spec import SliceSpec

slices_app = typer.Typer(help="The catalogue of model slices.", no_args_is_help=True)
slices_app.command("footprint")(slices_footprint)
slices_app.command("pull")(slices_pull)


@slices_app.command("list")
def slices_list(config: Config = DEFAULT_CONFIG) -> None:
    """Show the catalogue and what each slice takes in memory. Example: ash slices list."""
    settings = load(config)
    prepare_data_folder(settings)
    sizes = slice_sizes(settings)
    table = Table("slice", "tier", "model", "context", "slots", "fallback", "memory")
    for spec in slice_specs(settings):
        table.add_row(
            spec.name,
            spec.tier,
            spec.model,
            str(spec.context),
            str(spec.slots),
            spec.fallback or "",
            _memory(sizes, spec),
        )
    out.print(table)
    budget = residency_limits(settings.residency).budget_bytes or 0
    out.print(f"Memory budget {budget / 1e6:.0f} MB; ~ is estimated, the rest was measured.")


def _memory(sizes: RememberedSizes, spec: SliceSpec) -> str:
    """What a loaded slice takes, to be read."""
    if spec.remote is not None:
        return "remote"
    try:
        size = sizes.of_unchecked(spec)
    except ModelFileError:
        return "no usable file"
    return f"{'' if size.is_measured else '~'}{size.bytes / 1e6:.0f} MB"


@slices_app.command("check")
def slices_check(config: Config = DEFAULT_CONFIG) -> None:
    """Find, assemble and verify every model file; exit status 1 if one cannot be used."""
    settings = load(config)
    prepare_data_folder(settings)
    results = [check(spec, cache_folder=models_folder(settings)) for spec in slice_specs(settings)]
    for result in results:
        if result.problem is not None:
            out.print(f"{result.slice}: NOT USABLE: {result.problem}", soft_wrap=True)
            continue
        if result.endpoint is not None:
            out.print(f"{result.slice}: remote, {result.endpoint}, no file to check", soft_wrap=True)
            continue
        types = ", ".join(f"{name} x{count}" for name, count in result.tensor_types.items())
        verified = {True: "sha256 verified", None: "sha256 not given", False: "sha256 WRONG"}
        out.print(
            f"{result.slice}: ok, {result.bytes / 1e6:.0f} MB, {result.architecture}, {types}, "
            f"{verified[result.digest_ok]}, licence {result.licence or 'not stated'}",
            soft_wrap=True,
        )
    if any(result.problem is not None for result in results):
        raise typer.Exit(1)
