"""`ash export` and `ash import`: sessions out of the log into files, and back."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ash.app import DATABASE, new_id, prepare_data_folder
from ash.cli.options import DEFAULT_CONFIG, Config, out
from ash.config import Settings, load
from ash.domain.errors import NotFound, StudyError
from ash.domain.events import Record
from ash.store.lock import DataFolderLock
from ash.store.log import SqliteEventStore
from ash.store.queries import SqliteReader
from ash.study.dialogue import dialogue, json_lines, read_back, sidecar, sidecar_of
from ash.study.eval_log import write_eval
from ash.study.files import replacing
from ash.study.importing import TimedDraft, imported
from ash.study.markdown import markdown
from ash.study.redaction import Redactor
from ash.study.tables import TURN_COLUMNS, csv_text, turn_rows, write_parquet
from ash.study.transcript import view


class Format(StrEnum):
    """What an export can be."""

    INSPECT = "inspect"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    MARKDOWN = "markdown"


SUFFIXES = {Format.INSPECT: ".eval"}
"""The end of a file's name where the tools that read it go by that."""

BINARY = (Format.INSPECT, Format.PARQUET)


async def stored_sessions(settings: Settings, names: Sequence[str]) -> dict[str, list[Record]]:
    """The logs of sessions by id, in the order asked for.

    Raises:
        NotFound: there is no such session.
        StoreError: there is no database that can be read.
    """
    sessions: dict[str, list[Record]] = {}
    async with SqliteReader(settings.data_folder / DATABASE) as reader:
        for name in names:
            sessions[name] = await reader.read(name)
            if not sessions[name]:
                raise NotFound(f"no session {name}; `ash sessions` lists them")
    return sessions


def export(
    session: Annotated[list[str], typer.Argument(help="One or more session ids.")],
    *,
    format_: Annotated[Format, typer.Option("--format", help="What to write.")] = Format.JSONL,
    target: Annotated[Path | None, typer.Option("--out", help="The file; standard output without.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False,
    redact: Annotated[bool, typer.Option("--redact", help="Remove names, mails, numbers, tokens.")] = False,
    name: Annotated[list[str] | None, typer.Option("--name", help="A name to redact; repeat it.")] = None,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Write sessions to a file. Example: ash export ses_019... --format inspect --out talk.eval."""
    if name and not redact:
        raise typer.BadParameter("--name says what to redact; give --redact too")
    sessions = asyncio.run(stored_sessions(load(config), session))
    if redact:
        sessions = redacted(sessions, name or ())
    if target is None:
        if format_ in BINARY:
            raise typer.BadParameter(f"{format_} is a binary format; name a file with --out")
        sys.stdout.write(as_text(sessions, format_))
        return
    written = write_export(sessions, format_, target, force=force)
    events = sum(map(len, sessions.values()))
    names = ", ".join(map(str, written))
    out.print(f"{names}: {len(sessions)} sessions, {events} events", soft_wrap=True, highlight=False)


def redacted(sessions: dict[str, list[Record]], names: Sequence[str]) -> dict[str, list[Record]]:
    """The sessions after the rules of ash.study.redaction; a value has one pseudonym in all of them."""
    redactor = Redactor(names)
    for records in sessions.values():
        redactor.learn(records)
    return {session_id: redactor.redact(records) for session_id, records in sessions.items()}


def as_text(sessions: dict[str, list[Record]], format_: Format) -> str:
    """The messages, turns or transcripts of the sessions."""
    views = [view(session_id, records) for session_id, records in sessions.items()]
    if format_ is Format.MARKDOWN:
        return "\n".join(markdown(each) for each in views)
    if format_ is Format.CSV:
        return csv_text([row for each in views for row in turn_rows(each)], TURN_COLUMNS)
    return json_lines(dialogue(each) for each in views)


def write_export(
    sessions: dict[str, list[Record]], format_: Format, target: Path, *, force: bool
) -> tuple[Path, ...]:
    """Write the files of an export, all of them or none; returns their names.

    Raises:
        StudyError: a file exists and `force` is false, the disk is full, or an extra is not installed.
    """
    suffix = SUFFIXES.get(format_)
    if suffix is not None and target.suffix != suffix:
        raise StudyError(f"{target}: the tools that read this format want a name that ends in {suffix}")
    targets = (target, sidecar_of(target)) if format_ is Format.JSONL else (target,)
    with replacing(targets, force=force) as files:
        if format_ is Format.INSPECT:
            write_eval([view(session_id, records) for session_id, records in sessions.items()], files[0])
        elif format_ is Format.PARQUET:
            rows = [row for name, records in sessions.items() for row in turn_rows(view(name, records))]
            write_parquet(rows, TURN_COLUMNS, files[0])
        else:
            # Line ends as they are: the csv module writes those of RFC 4180 itself.
            files[0].write_text(as_text(sessions, format_), encoding="utf-8", newline="")
        if format_ is Format.JSONL:
            lines = (line for records in sessions.values() for line in sidecar(records))
            files[1].write_text(json_lines(lines), encoding="utf-8")
    return targets


def import_(
    file: Annotated[Path, typer.Argument(help="The messages file of an export in format jsonl.")],
    events: Annotated[Path | None, typer.Option("--events", help="Its sidecar, if renamed.")] = None,
    as_new: Annotated[bool, typer.Option("--as-new", help="Give the sessions new ids.")] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Bring exported sessions back, read-only; stop the server first. Example: ash import talk.jsonl."""
    settings = load(config)
    sidecar_file = events or sidecar_of(file)
    sessions = read_back(
        _lines(file), _lines(sidecar_file), source=str(file), events_source=str(sidecar_file)
    )
    drafts = {}
    for session_id, records in sessions.items():
        new = new_id("ses") if as_new else session_id
        drafts[new] = imported(records, new)
    for session_id in asyncio.run(_bring_back(settings, drafts)):
        out.print(f"{session_id}: {len(drafts[session_id])} events", soft_wrap=True, highlight=False)


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines(): a text may hold other line separators than the one between the objects.
        return path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} cannot be read: {error}; name the file that `ash export` wrote") from error


async def _bring_back(settings: Settings, sessions: dict[str, list[TimedDraft]]) -> list[str]:
    """Append the sessions to the store, each whole or not at all."""
    folder = prepare_data_folder(settings)
    now = 0
    with DataFolderLock(folder):
        store = SqliteEventStore(folder / DATABASE, clock=lambda: now)
        await store.open()
        try:
            for session_id in sessions:
                if await store.head(session_id) is not None:
                    raise StudyError(f"session {session_id} is in the store already; import it with --as-new")
            for session_id, drafts in sessions.items():
                try:
                    for timed in drafts:
                        now = timed.ts
                        await store.append(session_id, [timed.draft])
                except BaseException:
                    if await store.head(session_id) is not None:
                        await store.delete(session_id)
                    raise
        finally:
            await store.close()
    return list(sessions)
