"""`ash study`: run a plan on a server of its own, and report what it found."""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ash import __version__, logs
from ash.app import DATABASE, models_folder, prepare_data_folder, running, slice_specs, wall_clock
from ash.cli.client import Client, local_token
from ash.cli.options import DEFAULT_CONFIG, Config, out
from ash.config import (
    GatewaySettings,
    ModesSettings,
    RouterSettings,
    SessionSettings,
    Settings,
    StoreSettings,
    load,
)
from ash.domain.errors import AshError, StudyError
from ash.domain.events import Record
from ash.instruments import mode_filter, opened_reference, prepared_encoder
from ash.session.modes import ModeTracker
from ash.slices.catalog import check
from ash.store.queries import SqliteReader
from ash.study.analysis import StudiedSession, analyse
from ash.study.conclusions import conclusions
from ash.study.files import replacing
from ash.study.plan import Plan, parse_plan
from ash.study.progress import (
    FinishedSession,
    Provenance,
    StudyRecord,
    begin_or_resume,
    load_record,
    save_record,
)
from ash.study.report import html_report
from ash.study.result_tables import (
    SHIFT_COLUMNS,
    column_types,
    conditions_table,
    sessions_table,
    shifts_table,
)
from ash.study.runner import Driver
from ash.study.stitching import stitch
from ash.study.tables import csv_text, write_parquet
from ash.study.transcript import view

study_app = typer.Typer(help="Studies of behaviour: run a plan, report its figures.", no_args_is_help=True)

PACKAGES = ("llama-cpp-python", "numpy", "sentence-transformers", "torch")
"""Whose versions a result depends on, beside Ash's and Python's own."""


@study_app.command("run")
def study_run(
    plan_file: Annotated[Path, typer.Argument(help="The plan; docs/study.md says what stands in it.")],
    folder: Annotated[Path | None, typer.Option("--out", help="The study's folder.")] = None,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Run what is missing of a study. Example: ash study run PLAN.toml."""
    try:
        plan = parse_plan(plan_file.read_text(encoding="utf-8"), str(plan_file))
    except OSError as error:
        raise StudyError(f"{plan_file} cannot be read: {error.strerror}; name the plan's file") from error
    target = folder or plan_file.parent / plan.name
    settings = load(config)
    target.mkdir(parents=True, exist_ok=True)

    async def run() -> None:
        record = begin_or_resume(plan, await provenance(settings, plan), target)
        await _run(settings, record, target)

    asyncio.run(run())
    out.print(f"report it: ash study report {target}", soft_wrap=True, highlight=False)


@study_app.command("report")
def study_report(
    folder: Annotated[Path, typer.Argument(help="The study's folder.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an earlier report.")] = False,
) -> None:
    """Write report.html, and its figures as CSV and Parquet. Example: ash study report FOLDER."""
    record = load_record(folder)
    if record is None:
        raise StudyError(f"there is no study in {folder}; run one: ash study run PLAN.toml")
    if not record.finished:
        raise StudyError(f"no session of the study in {folder} is finished; run it: ash study run PLAN.toml")
    written = asyncio.run(_report(record, folder, force=force))
    for path in written:
        out.print(str(path), soft_wrap=True, highlight=False)


# -- running -----------------------------------------------------------------------------------------------


def study_settings(settings: Settings, plan: Plan, folder: Path, seed: int) -> Settings:
    """The settings of the server for one seed: data of its own, free ports, seeded slices."""
    chosen = {
        name: value for name, value in msgspec.structs.asdict(plan.sampling).items() if value is not None
    }
    slices = {
        name: msgspec.structs.replace(
            spec, sampling=msgspec.structs.replace(spec.sampling, seed=seed, **chosen)
        )
        for name, spec in settings.slices.items()
    }
    gateway = GatewaySettings(port=0, http_port=0)
    store = StoreSettings(path=str(folder.absolute() / "data"), cache=str(settings.cache_folder.absolute()))
    return msgspec.structs.replace(settings, slices=slices, gateway=gateway, store=store)


async def provenance(settings: Settings, plan: Plan) -> Provenance:
    """What a result of this installation depends on. Reads every model file once.

    Raises:
        StudyError: a slice that the study may use cannot be loaded, or the plan's slice is unknown.
    """
    if plan.slice is not None and plan.slice not in settings.slices:
        names = ", ".join(settings.slices)
        raise StudyError(f"slice: there is no slice {plan.slice!r} in the configuration; there are {names}")
    prepare_data_folder(settings)
    weights: dict[str, str | None] = {}
    for spec in slice_specs(settings):
        if plan.slice is None or spec.name in {plan.slice, settings.slices[plan.slice].fallback}:
            result = await asyncio.to_thread(check, spec, cache_folder=models_folder(settings))
            if result.problem is not None:
                raise StudyError(f"slice {spec.name} cannot be used: {result.problem}")
            weights[spec.name] = result.sha256
    encoder = await prepared_encoder(settings)
    await encoder.open()
    identity = encoder.identity
    await encoder.close()
    # Through JSON, for a tuple that comes back from the study file is a list.
    relevant: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(settings))
    for table in ("folder", "gateway", "store", "log"):
        relevant.pop(table)
    return Provenance(
        versions={"ash": __version__, "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        config=relevant,
        weights=weights,
        encoder=identity,
        machine={
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
        },
    )


async def _run(settings: Settings, record: StudyRecord, folder: Path) -> None:
    """Seed by seed, for a slice takes its seed when it is loaded; the conditions of a seed side by side."""
    missing = record.missing()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )

    def keep(finished: FinishedSession) -> None:
        # At once, so that an interruption costs what is running and nothing that is done.
        nonlocal record
        record = record.with_session(finished)
        save_record(record, folder)

    failures: list[str] = []
    with bar:
        task = bar.add_task("turns", total=len(missing) * (record.plan.turns + 1))
        for seed in dict.fromkeys(seed for _, seed in missing):
            conditions = [condition for condition, each in missing if each == seed]
            bar.update(task, description=f"seed {seed}")
            served = study_settings(settings, record.plan, folder, seed)
            failures += await _one_seed(
                served,
                record.plan,
                conditions,
                seed,
                on_turn=lambda: bar.advance(task),
                on_finished=keep,
            )
    if failures:
        raise StudyError(f"{len(failures)} sessions failed ({failures[0]}); run the study again")


async def _one_seed(
    served: Settings,
    plan: Plan,
    conditions: Sequence[str],
    seed: int,
    *,
    on_turn: Callable[[], None],
    on_finished: Callable[[FinishedSession], None],
) -> list[str]:
    """The sessions of one seed, each on a connection of its own, on one server with the settings `served`.

    Returns what went wrong; one session that fails leaves the others alone.
    """
    data = prepare_data_folder(served)
    logs.configure(served.log.level, data / served.log.file)
    async with running(served) as server:
        address, token = f"ws://{server.address[0]}:{server.address[1]}/ws", local_token(data)

        async def session(condition: str) -> str | None:
            try:
                async with Client(address, token) as client:
                    on_finished(await Driver(client, plan, condition, seed, wall_clock).run(on_turn))
            except AshError as error:
                return str(error)
            return None

        return [problem for problem in await asyncio.gather(*map(session, conditions)) if problem]


# -- reporting ---------------------------------------------------------------------------------------------


async def _report(record: StudyRecord, folder: Path, *, force: bool) -> tuple[Path, ...]:
    """Everything with the settings that the study ran with; returns the files."""
    config = record.provenance.config
    session = msgspec.convert(config["session"], SessionSettings)
    router = msgspec.convert(config["router"], RouterSettings)
    modes = msgspec.convert(config["modes"], ModesSettings)
    sessions = [
        StudiedSession(each.condition, each.seed, view(each.session_id, records))
        for each, records in await _logs(modes, record, folder)
    ]
    persona = record.plan.persona or session.persona or None
    sessions, persona_vector = await _encoded(router.encoder, sessions, persona)
    result = analyse(record.plan, sessions, persona_vector)
    found, summaries = sessions_table(result.sessions), conditions_table(result.conditions)
    tables = {
        "sessions": (found, column_types(found)),
        "conditions": (summaries, column_types(summaries)),
        "shifts": (shifts_table(result.shifts), SHIFT_COLUMNS),
    }
    with_parquet = find_spec("pyarrow") is not None
    suffixes = (".csv", ".parquet") if with_parquet else (".csv",)
    parts = [(f"{name}{suffix}", *table) for name, table in tables.items() for suffix in suffixes]
    paths = [folder / "report.html", *(folder / name for name, *_ in parts)]
    with replacing(paths, force=force) as files:
        files[0].write_text(html_report(record, result, sessions), encoding="utf-8")
        for file, (_, rows, types) in zip(files[1:], parts, strict=True):
            if file.suffix == ".csv":
                file.write_text(csv_text(rows, types), encoding="utf-8", newline="")
            else:
                write_parquet(rows, types, file)
    if not with_parquet:
        out.print("no Parquet files: install the extra `study` for them", highlight=False)
    for sentence in conclusions(result.conditions):
        out.print(f"- {sentence}", highlight=False)
    return tuple(paths)


async def _logs(
    modes: ModesSettings, record: StudyRecord, folder: Path
) -> list[tuple[FinishedSession, list[Record]]]:
    """Every finished session with its log, condition by condition in the plan's order."""
    ordered = sorted(
        record.finished,
        key=lambda each: (record.plan.conditions.index(each.condition), record.plan.seeds.index(each.seed)),
    )
    found = []
    async with SqliteReader(folder / "data" / DATABASE) as reader:
        for each in ordered:
            records = await reader.read(each.session_id)
            if not records:
                raise StudyError(f"session {each.session_id} is not in the study's log; was it deleted?")
            if each.fork_seq is not None:
                copies = [await reader.read(name) for name in each.continuations]
                tracker = ModeTracker(mode_filter(modes))
                records = stitch(records, copies, each.fork_seq, tracker)
            found.append((each, records))
    return found


async def _encoded(
    model: str, sessions: Sequence[StudiedSession], persona: str | None
) -> tuple[list[StudiedSession], list[float] | None]:
    """The sessions with the vectors of their answers, and the vector of the persona."""
    # Distances between texts are what this model was made for; a light one knows requests only.
    async with opened_reference(model) as encoder:
        encoded = []
        for session in sessions:
            texts = [answer.text for answer in session.view.answers]
            vectors = await encoder.encode(texts) if texts else []
            encoded.append(msgspec.structs.replace(session, vectors=vectors))
        return encoded, (await encoder.encode([persona]))[0] if persona else None
