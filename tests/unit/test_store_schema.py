"""Migrations, foreign files, and the reader that stands beside a server."""

from __future__ import annotations

import logging
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import structlog.testing
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine

from ash.domain.errors import SchemaTooNew, StoreError
from ash.domain.events import Draft, InputValue, StateSnapshot
from ash.domain.values import MessageRow, RunRow, SessionRow
from ash.store import connections, schema, tables
from ash.store.compaction import StoredRow
from ash.store.log import SqliteEventStore
from ash.store.projections import OpenMessage, WaitingInput
from ash.store.queries import SqliteReader


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ash.db"


def make(path: Path) -> SqliteEventStore:
    return SqliteEventStore(path, clock=lambda: 1_000)


async def created(path: Path) -> None:
    store = make(path)
    await store.open()
    value = InputValue("i1", "hello there", "ada", "r1")
    await store.append(
        "s", [Draft(StateSnapshot(snapshot={"title": "T", "owner": "ada"})), Draft(value.event())]
    )
    await store.close()


def set_revision(path: Path, revision: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        connection.commit()


def full_text_objects(connection: Connection) -> set[str]:
    statements = connection.exec_driver_sql(
        "SELECT sql FROM sqlite_master WHERE (sql LIKE '%messages_fts%' OR type = 'trigger')"
    ).scalars()
    return {
        re.sub(r"\s+|(?<=\() | (?=\))", " ", sql).replace("( ", "(").replace(" )", ")") for sql in statements
    }


async def test_migrating_from_nothing_gives_the_tables_of_the_program(path: Path, tmp_path: Path) -> None:
    await created(path)
    migrated, described = (
        create_engine(f"sqlite:///{path}"),
        create_engine(f"sqlite:///{tmp_path / 'other.db'}"),
    )
    with migrated.connect() as left, described.connect() as right:
        context = MigrationContext.configure(
            left,
            opts={
                "include_name": lambda name, kind, _: kind != "table" or not name.startswith("messages_fts"),
                "compare_type": True,
            },
        )
        assert compare_metadata(context, tables.metadata) == []
        tables.metadata.create_all(right)
        assert full_text_objects(left) == full_text_objects(right)
        assert len(full_text_objects(left)) >= 4
        # Autogeneration does not look at these.
        details = (
            "SELECT name, sql LIKE '%WITHOUT ROWID%' FROM sqlite_master WHERE type = 'table' AND name != ?"
        )
        partial = "SELECT name, sql LIKE '%WHERE%' FROM sqlite_master WHERE type = 'index' AND tbl_name != ?"
        for query in (details, partial):
            found = [set(side.exec_driver_sql(query, ("alembic_version",)).all()) for side in (left, right)]
            assert found[0] == found[1]
    migrated.dispose()
    described.dispose()


def test_revisions_are_those_of_the_scripts() -> None:
    scripts = ScriptDirectory.from_config(schema.alembic_config())
    assert tuple(script.revision for script in reversed(list(scripts.walk_revisions()))) == tables.REVISIONS


def test_an_installed_package_has_its_own_migrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "ash"
    (tmp_path / "migrations").mkdir()
    monkeypatch.setattr(schema, "_PACKAGE", package)
    assert schema.migrations_folder() == tmp_path / "migrations"
    (package / "_migrations").mkdir(parents=True)
    assert schema.migrations_folder() == package / "_migrations"


@pytest.mark.parametrize(
    ("table", "struct", "not_stored"),
    [
        (tables.events, StoredRow, ()),
        (tables.sessions, SessionRow, ()),
        (tables.runs, RunRow, ()),
        (tables.messages, MessageRow, ()),
        (tables.waiting_inputs, WaitingInput, ()),
        (tables.open_messages, OpenMessage, ("deltas",)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_columns_stand_in_the_order_of_the_fields(
    table: object, struct: type, not_stored: tuple[str, ...]
) -> None:
    names = [column.name for column in table.c if column.name != "id"]  # type: ignore[attr-defined]  # a Table
    assert names == [field.name for field in msgspec.structs.fields(struct) if field.name not in not_stored]


async def test_opening_again_changes_nothing_and_leaves_logging_alone(path: Path) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers), logging.getLogger("test_store_schema").disabled)
    await created(path)
    store = make(path)
    await store.open()
    await store.open()
    assert await store.head("s") == 2
    await store.close()
    assert (root.level, list(root.handlers), logging.getLogger("test_store_schema").disabled) == before


# -- files that cannot be opened ---------------------------------------------------------------------------


async def test_a_newer_database_is_refused_and_left_alone(path: Path) -> None:
    await created(path)
    set_revision(path, "9999")
    before = path.read_bytes()
    for store in (make(path), SqliteReader(path)):
        with pytest.raises(SchemaTooNew, match=r"9999.*0001"):
            await store.open()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"These are the notes of a human being.\n" * 40, b"SQLite format 3\x00" + b"\x07" * 99]
)
async def test_a_file_that_is_not_sqlite_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for store in (make(path), SqliteReader(path)):
        with pytest.raises(StoreError, match="not a database of Ash"):
            await store.open()
    assert path.read_bytes() == content


@pytest.mark.parametrize("foreign", ["recipes", "alembic_version"])
async def test_a_database_of_another_program_is_refused_and_left_alone(path: Path, foreign: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"CREATE TABLE {foreign} (version_num TEXT)")
    before = path.read_bytes()
    for store in (make(path), SqliteReader(path)):
        with pytest.raises(StoreError, match=f"not a database of Ash.*{foreign}"):
            await store.open()
    assert path.read_bytes() == before


async def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="folder"):
        await make(tmp_path / "missing" / "ash.db").open()


async def test_an_empty_file_becomes_a_database(path: Path) -> None:
    path.touch()
    await created(path)


async def test_a_folder_name_may_hold_what_uris_and_formats_use(tmp_path: Path) -> None:
    folder = tmp_path / "50% of ?this#"
    folder.mkdir()
    await created(folder / "ash.db")
    async with SqliteReader(folder / "ash.db") as reader:
        assert await reader.head("s") == 2


async def test_a_failed_migration_leaves_nothing_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(connection: Connection) -> None:
        schema.migrate(connection)
        raise RuntimeError("broken off")

    monkeypatch.setattr("ash.store.log.migrate", break_off)
    with pytest.raises(RuntimeError, match="broken off"):
        await make(path).open()
    monkeypatch.undo()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    await created(path)


# -- the reader ----------------------------------------------------------------------------------------


async def test_a_reader_sees_what_a_running_server_commits(path: Path) -> None:
    store = make(path)
    await store.open()
    async with SqliteReader(path) as reader:
        assert await reader.sessions() == ([], None)
        snapshot = Draft(StateSnapshot(snapshot={"title": "T", "owner": "ada"}))
        records = await store.append("s", [snapshot, Draft(InputValue("i1", "hello", "ada", "r1").event())])
        assert await reader.read("s") == records
        assert [match.message_id for match in await reader.search("hello", session_id="s")] == ["i1"]
    await store.close()


async def test_a_reader_needs_a_database(path: Path) -> None:
    with pytest.raises(StoreError, match="no database"):
        await SqliteReader(path).open()
    assert not path.exists()


async def test_a_reader_does_not_migrate(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await created(path)
    for module in ("inspection", "queries"):
        monkeypatch.setattr(f"ash.store.{module}.REVISIONS", ("0001", "0002"))
    with pytest.raises(StoreError, match=r"0001.*0002.*start the server"):
        await SqliteReader(path).open()


async def test_a_closed_reader_refuses(path: Path) -> None:
    await created(path)
    reader = SqliteReader(path)
    async with reader:
        pass
    with pytest.raises(StoreError, match="not open"):
        await reader.head("s")


# -- the warning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "warned"), [((3, 40, 1), True), ((3, 51, 2), True), ((3, 51, 3), False), ((3, 6, 23), False)]
)
def test_a_sqlite_that_can_corrupt_a_wal_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int], warned: bool
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    connections.warn_of_wal_reset_bug.cache_clear()
    with structlog.testing.capture_logs() as logs:
        connections.warn_of_wal_reset_bug()
        connections.warn_of_wal_reset_bug()
    assert [entry["event"] for entry in logs] == (["sqlite_wal_reset_bug"] if warned else [])
