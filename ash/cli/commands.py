"""`ash` itself: serve, chat, and reading the log; other commands stand in groups of their own."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Annotated, Any

import msgspec
import typer
from rich.table import Table

from ash import __version__, logs
from ash.app import DATABASE, prepare_data_folder, running, until_signalled
from ash.cli.chat import chat_loop
from ash.cli.client import Client, local_token, server_address
from ash.cli.export import export, import_
from ash.cli.modes import modes_app
from ash.cli.options import DEFAULT_CONFIG, Config, out
from ash.cli.render import event_line
from ash.cli.router import router_app
from ash.cli.slices import slices_app
from ash.cli.study import study_app
from ash.cli.timeline import timeline
from ash.cli.tokens import token_app
from ash.config import Settings, load
from ash.domain.errors import NotFound
from ash.domain.events import Record
from ash.store.lock import DataFolderLock
from ash.store.log import SqliteEventStore
from ash.store.queries import SqliteReader
from ash.study.transcript import view

app = typer.Typer(
    help="Ash: persistent agents on local quantised model slices.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(modes_app, name="modes")
app.add_typer(router_app, name="router")
app.add_typer(slices_app, name="slices")
app.add_typer(study_app, name="study")
app.add_typer(token_app, name="token")
app.command()(export)
app.command("import")(import_)


@app.command()
def version() -> None:
    """Print the version."""
    out.print(__version__)


@app.command()
def serve(config: Config = DEFAULT_CONFIG) -> None:
    """Run the server until it is told to stop. Example: ash serve --config config.toml."""
    settings = load(config)
    folder = prepare_data_folder(settings)
    logs.configure(settings.log.level, folder / settings.log.file)

    async def run() -> None:
        async with running(settings) as server:
            host, port = server.address
            sys.stdout.write(
                f"ash {__version__} is ready\n"
                f"  ws://{host}:{port}/ws    (ash.v1)\n"
                f"  ws://{host}:{port}/chat  (plain text)\n"
                f"  http://{server.http_address[0]}:{server.http_address[1]}/readyz\n"
                f"  chat with it: {sys.argv[0]} chat --config {config}\n"
            )
            sys.stdout.flush()
            await until_signalled()

    asyncio.run(run())


@app.command()
def chat(
    session: Annotated[str | None, typer.Argument(help="A session to go on with.")] = None,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Talk to an agent. Ctrl-C cancels the answer, twice leaves. Example: ash chat ses_019..."""
    settings = load(config)
    token = local_token(settings.data_folder)
    asyncio.run(chat_loop(server_address(settings), token, session))


@app.command()
def sessions(
    limit: Annotated[int, typer.Option(help="How many at most.")] = 20, config: Config = DEFAULT_CONFIG
) -> None:
    """List the sessions, latest first. Example: ash sessions --limit 5."""

    async def rows() -> None:
        async with SqliteReader(load(config).data_folder / DATABASE) as reader:
            found, _ = await reader.sessions(limit=limit)
        table = Table("session", "title", "state", "mode", "slice", "events")
        for row in found:
            table.add_row(
                row.session_id, row.title, row.state, row.mode or "", row.slice or "", str(row.head_seq)
            )
        out.print(table)

    asyncio.run(rows())


async def _records(settings: Settings, session: str) -> list[Record]:
    async with SqliteReader(settings.data_folder / DATABASE) as reader:
        records = await reader.read(session)
    if not records:
        raise NotFound(f"no session {session}; `ash sessions` lists them")
    return records


@app.command("log", context_settings={"allow_interspersed_args": True})
def show_log(
    session: Annotated[str, typer.Argument(help="A session id, or `rebuild`.")],
    follow: Annotated[bool, typer.Option("--follow", help="Go on with live events.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    as_timeline: Annotated[bool, typer.Option("--timeline", help="Draw turns, modes and shifts.")] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Show a session's events; `ash log rebuild` recreates the projections from the log instead."""
    settings = load(config)
    if session == "rebuild":
        asyncio.run(_rebuild(settings))
        return

    if as_timeline:
        out.print(timeline(view(session, asyncio.run(_records(settings, session))), out.width))
        return

    def show(params: dict[str, Any]) -> None:
        line = json.dumps(params, ensure_ascii=False) if as_json else event_line(params)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    async def follow_live() -> None:
        async with Client(server_address(settings), local_token(settings.data_folder)) as client:
            await client.request("session/attach", sessionId=session, afterSeq=0)
            async for params in client.events():
                show(params)

    if follow:
        asyncio.run(follow_live())
        return
    for record in asyncio.run(_records(settings, session)):
        show(envelope(record))


def envelope(record: Record) -> dict[str, Any]:
    """A record as `session/event` params."""
    built: dict[str, Any] = msgspec.to_builtins(record)
    return {
        "sessionId": built["session_id"],
        "seq": built["seq"],
        "ts": built["ts"],
        "runId": built["run_id"],
        "origin": built["origin"],
        "event": built["event"],
    }


async def _rebuild(settings: Settings) -> None:
    with DataFolderLock(settings.data_folder):
        store = SqliteEventStore(settings.data_folder / DATABASE, clock=lambda: 0)
        await store.open()
        try:
            count = await store.rebuild()
        finally:
            await store.close()
    out.print(f"projections rebuilt from {count} events")
