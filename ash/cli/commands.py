"""All commands of `ash`, each a thin shell around the library."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from ash import __version__, logs
from ash.app import DATABASE, models_folder, prepare_data_folder, running, slice_specs, until_signalled
from ash.cli.chat import chat_loop
from ash.cli.client import Client, local_token, server_address
from ash.cli.render import event_line, markdown
from ash.config import Settings, load
from ash.domain.errors import NotFound
from ash.domain.events import Record
from ash.domain.values import Role
from ash.gateway.tokens import TokenRegistry
from ash.slices.catalog import check
from ash.store.lock import DataFolderLock
from ash.store.log import SqliteEventStore
from ash.store.queries import SqliteReader

app = typer.Typer(
    help="Ash: persistent agents on local quantised model slices.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
slices_app = typer.Typer(help="The catalogue of model slices.", no_args_is_help=True)
token_app = typer.Typer(help="Access tokens.", no_args_is_help=True)
app.add_typer(slices_app, name="slices")
app.add_typer(token_app, name="token")

Config = Annotated[Path, typer.Option("--config", help="The config file.", envvar="ASH_CONFIG")]
DEFAULT_CONFIG = Path("config.toml")
out = Console()


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
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Show a session's events; `ash log rebuild` recreates the projections from the log instead."""
    settings = load(config)
    if session == "rebuild":
        asyncio.run(_rebuild(settings))
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


@app.command()
def export(
    session: str,
    format_: Annotated[str, typer.Option("--format", help="jsonl or markdown.")] = "jsonl",
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Write a session to standard output. Example: ash export ses_019... --format markdown > talk.md."""
    if format_ not in {"jsonl", "markdown"}:
        raise typer.BadParameter(f"{format_!r} is not a format; write jsonl or markdown")
    records = asyncio.run(_records(load(config), session))
    if format_ == "markdown":
        sys.stdout.write(markdown(session, records))
        return
    for record in records:
        sys.stdout.write(json.dumps(envelope(record), ensure_ascii=False) + "\n")


@slices_app.command("list")
def slices_list(config: Config = DEFAULT_CONFIG) -> None:
    """Show the catalogue. Example: ash slices list."""
    table = Table("slice", "tier", "model", "context", "slots", "fallback")
    for spec in slice_specs(load(config)):
        table.add_row(
            spec.name, spec.tier, spec.model, str(spec.context), str(spec.slots), spec.fallback or ""
        )
    out.print(table)


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
        types = ", ".join(f"{name} x{count}" for name, count in result.tensor_types.items())
        verified = {True: "sha256 verified", None: "sha256 not given", False: "sha256 WRONG"}
        out.print(
            f"{result.slice}: ok, {result.bytes / 1e6:.0f} MB, {result.architecture}, {types}, "
            f"{verified[result.digest_ok]}, licence {result.licence or 'not stated'}",
            soft_wrap=True,
        )
    if any(result.problem is not None for result in results):
        raise typer.Exit(1)


@token_app.command("show")
def token_show(config: Config = DEFAULT_CONFIG) -> None:
    """Print the owner's token. Example: websocat -H "Authorization: Bearer $(ash token show)" ..."""
    sys.stdout.write(local_token(load(config).data_folder) + "\n")


@token_app.command("new")
def token_new(
    name: str,
    role: Annotated[Role, typer.Option(help="What the token may do.")] = Role.MEMBER,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Make a token and print it once. Example: ash token new laptop --role member."""
    folder = prepare_data_folder(load(config))
    sys.stdout.write(TokenRegistry(folder).issue(name, role) + "\n")


@token_app.command("list")
def token_list(config: Config = DEFAULT_CONFIG) -> None:
    """List the tokens; their secrets are not kept."""
    table = Table("id", "name", "role", "active")
    for record in TokenRegistry(load(config).data_folder).list():
        table.add_row(record.id, record.name, record.role, "yes" if record.active else "revoked")
    out.print(table)


@token_app.command("revoke")
def token_revoke(name: str, config: Config = DEFAULT_CONFIG) -> None:
    """Revoke a token by id or name; its live connections close within a second."""
    revoked = TokenRegistry(load(config).data_folder).revoke(name)
    out.print(f"revoked {len(revoked)}")
