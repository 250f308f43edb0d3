"""The event log on SQLite: the server's adapter of the port EventStore."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import structlog
from msgspec.structs import asdict
from sqlalchemy import delete, insert, literal, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ash.domain.errors import InvalidRequest, NotFound, StoreError
from ash.domain.events import Draft, Record, encode_event
from ash.domain.ports import Clock
from ash.store.compaction import expand, store
from ash.store.connections import translated_errors, warn_of_wal_reset_bug, writer_engine
from ash.store.drafts import encode
from ash.store.inspection import revision_of
from ash.store.projection_tables import LatestChanges
from ash.store.projections import SessionState, apply
from ash.store.queries import Queries, read_records, rows_across
from ash.store.schema import migrate
from ash.store.tables import FULL_TEXT_TABLE, PROJECTIONS, REVISIONS, events
from ash.store.writer import Writer

log = structlog.get_logger(__name__)

REPLAY_EVENTS = 2000
"""Events that a rebuild or a fork holds in memory at a time."""

_Result = TypeVar("_Result")


class SqliteEventStore(Queries):
    """EventStore in one SQLite file: a single writer with group commit, a pool of readers.

    The folder of `path` must exist and belong to this process alone (ash.store.lock).
    """

    def __init__(self, path: Path, *, clock: Clock) -> None:
        super().__init__(path)
        self._clock = clock
        self._engine: AsyncEngine | None = None
        self._connection: AsyncConnection | None = None
        self._writer: Writer | None = None

    async def open(self) -> None:
        """See ash.domain.ports.EventStore.open. Idempotent."""
        if self._writer is not None:
            return
        warn_of_wal_reset_bug()
        # Before the first pragma: a file that is not ours must not be touched.
        revision = await asyncio.to_thread(revision_of, self._path)
        self._engine = writer_engine(self._path)
        try:
            async with translated_errors(self._path, "opening the database (does its folder exist?)"):
                self._connection = await self._engine.connect()
                if revision != REVISIONS[-1]:
                    async with self._connection.begin():
                        await self._connection.run_sync(migrate)
        except BaseException:
            await self._close_writer_connection()
            raise
        self._open_readers()
        self._writer = Writer(self._connection, self._path, self._clock)

    async def close(self) -> None:
        """See ash.domain.ports.EventStore.close. Idempotent."""
        writer = self._writer
        if writer is None:
            return
        await writer.close()
        self._writer = None
        # Readers first: a checkpoint cannot empty the WAL under them.
        await self._close_readers()
        await self._checkpoint()
        await self._close_writer_connection()

    async def _checkpoint(self) -> None:
        assert self._connection is not None
        # Past SQLAlchemy, which would begin a transaction, in which SQLite does not checkpoint.
        driver = (await self._connection.get_raw_connection()).driver_connection
        assert driver is not None
        try:
            async with translated_errors(self._path, "checkpointing"):
                await driver.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
        except StoreError as error:
            # Nothing is lost: what was committed stays in the WAL, and the next start reads it there.
            log.warning("checkpoint_failed", error=str(error))

    async def _close_writer_connection(self) -> None:
        connection, self._connection = self._connection, None
        engine, self._engine = self._engine, None
        if connection is not None:
            await connection.close()
        if engine is not None:
            await engine.dispose()

    async def append(self, session_id: str, drafts: Sequence[Draft]) -> list[Record]:
        """See ash.domain.ports.EventStore.append."""
        encoded = encode(session_id, drafts)
        writer = self._open_writer("appending to the log")
        return await writer.append(session_id, encoded) if encoded else []

    async def fork(self, session_id: str, new_id: str, at_seq: int) -> int:
        """See ash.domain.ports.EventStore.fork. Records keep their seq and ts.

        Raises:
            InvalidRequest: there is a session `new_id` already.
        """

        async def run(connection: AsyncConnection) -> int:
            if await _exists(connection, new_id):
                raise InvalidRequest(
                    f"session {session_id} cannot be forked as {new_id}, which exists already"
                )
            await _copy_log(connection, session_id, new_id, at_seq)
            copied = await _project(connection, new_id)
            if copied == 0:
                raise NotFound(f"there is no session {session_id} with an event at or before seq {at_seq}")
            return copied

        return await self._execute("forking a session", run)

    async def delete(self, session_id: str) -> None:
        """See ash.domain.ports.EventStore.delete."""

        async def run(connection: AsyncConnection) -> None:
            if not await _exists(connection, session_id):
                raise NotFound(f"there is no session {session_id}")
            for table in (events, *PROJECTIONS):
                await connection.execute(delete(table).where(table.c.session_id == session_id))

        await self._execute("deleting a session", run)

    async def rebuild(self) -> int:
        """See ash.domain.ports.EventStore.rebuild."""
        return await self._execute("rebuilding the projections", _rebuild)

    async def _execute(self, doing: str, run: Callable[[AsyncConnection], Awaitable[_Result]]) -> _Result:
        return await self._open_writer(doing).execute(doing, run)

    def _open_writer(self, doing: str) -> Writer:
        if self._writer is None:
            raise StoreError(f"{doing}: the store at {self._path} is not open")
        return self._writer


async def _exists(connection: AsyncConnection, session_id: str) -> bool:
    statement = select(events.c.seq).where(events.c.session_id == session_id).limit(1)
    return (await connection.execute(statement)).first() is not None


async def _copy_log(connection: AsyncConnection, session_id: str, new_id: str, at_seq: int) -> None:
    columns = [literal(new_id) if column.name == "session_id" else column for column in events.c]
    up_to = select(*columns).where(events.c.session_id == session_id, events.c.seq <= at_seq)
    await connection.execute(insert(events).from_select([column.name for column in events.c], up_to))
    # A message that was still being written at `at_seq` is open in the copy: its deltas are cut there.
    rows = (await connection.execute(rows_across(session_id, at_seq))).fetchall()
    deltas = expand(new_id, rows, after_seq=0, limit=None)
    cut = [
        asdict(store(record, encode_event(record.event).decode()))
        for record in deltas
        if record.seq <= at_seq
    ]
    if cut:
        await connection.execute(insert(events), cut)


async def _project(connection: AsyncConnection, session_id: str) -> int:
    state, count = SessionState(), 0
    while records := await read_records(connection, session_id, state.head_seq, REPLAY_EVENTS):
        changes = LatestChanges()
        for record in records:
            state, changed = apply(state, record)
            changes.add(changed)
        await changes.write(connection)
        count += len(records)
    return count


async def _rebuild(connection: AsyncConnection) -> int:
    for table in PROJECTIONS:
        await connection.execute(delete(table))
    session_ids = (await connection.execute(select(events.c.session_id).distinct())).scalars().all()
    count = sum([await _project(connection, session_id) for session_id in session_ids])
    # The triggers have kept the index in step; this rewrites it compactly, and repairs one that was damaged.
    await connection.execute(text(f"INSERT INTO {FULL_TEXT_TABLE}({FULL_TEXT_TABLE}) VALUES ('rebuild')"))  # noqa: S608
    return count
