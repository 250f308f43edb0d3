"""Reads of the database: by the server beside its writer, and by programs beside a running server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import (
    Executable,
    ScalarSelect,
    Select,
    and_,
    func,
    literal_column,
    or_,
    select,
    text,
    union_all,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ash.domain.errors import StoreError
from ash.domain.events import Record
from ash.domain.values import Match, MessageRow, RunRow, SessionRow
from ash.store.compaction import expand
from ash.store.connections import reader_engine, translated_errors
from ash.store.cursors import check_page_limit, decode_cursor, encode_cursor
from ash.store.inspection import revision_of
from ash.store.search import SNIPPET_WORDS, full_text_query
from ash.store.tables import REVISIONS, events, messages, runs, sessions

_LOG_COLUMNS = [column for column in events.c if column.name != "session_id"]
_MESSAGE_COLUMNS = [column for column in messages.c if column.name != "id"]

_SEARCH = text(
    f"""
    SELECT messages.session_id, messages.message_id, messages.role, messages.seq, messages.ts,
           snippet(messages_fts, 0, '[', ']', '…', {SNIPPET_WORDS}), bm25(messages_fts)
    FROM messages_fts JOIN messages ON messages.id = messages_fts.rowid
    WHERE messages_fts MATCH :query AND messages.session_id = :session_id
    ORDER BY bm25(messages_fts), messages.seq
    LIMIT :limit
    """  # noqa: S608 -- the only inserted value is a constant of ours
)


def log_rows(session_id: str, after_seq: int, limit: int | None) -> Executable:
    """The statement for every row that may hold one of the next `limit` records after `after_seq`.

    The `limit` rows behind `after_seq` hold at least as many records, for each holds the one at its own seq.
    What they may lack are deltas inside a compacted row that stands behind the page; the second half of the
    union fetches the rows of such messages, which were open across the end of the page. One statement, so
    that both halves see the same snapshot.
    """
    rows = select(*_LOG_COLUMNS).where(events.c.session_id == session_id, events.c.seq > after_seq)
    rows = rows.order_by(events.c.seq)
    if limit is None:
        return rows
    page = rows.limit(limit).cte("page")
    end = select(func.max(page.c.seq)).scalar_subquery()
    return union_all(select(page), rows_across(session_id, end))


def rows_across(session_id: str, seq: int | ScalarSelect[int]) -> Select[Any]:
    """The statement for the compacted rows that begin at or before `seq` and end behind it."""
    # The sum keeps SQLite from using the primary key, with which it would walk the whole log behind `seq`.
    ends_behind = events.c.seq + 0 > seq
    return select(*_LOG_COLUMNS).where(
        events.c.session_id == session_id, events.c.first_seq <= seq, ends_behind
    )


async def read_records(
    connection: AsyncConnection, session_id: str, after_seq: int = 0, limit: int | None = None
) -> list[Record]:
    """EventStore.read on any connection, so that the writer can read what it has not committed."""
    if limit is not None and limit <= 0:
        return []
    rows = (await connection.execute(log_rows(session_id, after_seq, limit))).fetchall()
    return expand(session_id, rows, after_seq, limit)


class Queries:
    """The reading half of the port EventStore, on a pool of connections that cannot write."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._readers: AsyncEngine | None = None

    @property
    def path(self) -> Path:
        """The database file."""
        return self._path

    def _open_readers(self) -> None:
        self._readers = reader_engine(self._path)

    async def _close_readers(self) -> None:
        readers, self._readers = self._readers, None
        if readers is not None:
            await readers.dispose()

    @asynccontextmanager
    async def _connect(self, doing: str) -> AsyncIterator[AsyncConnection]:
        if self._readers is None:
            raise StoreError(f"{doing}: the store at {self._path} is not open")
        async with translated_errors(self._path, doing), self._readers.connect() as connection:
            yield connection

    async def _rows(self, doing: str, statement: Executable, **values: Any) -> Sequence[Any]:
        async with self._connect(doing) as connection:
            return (await connection.execute(statement, values)).fetchall()

    async def read(self, session_id: str, after_seq: int = 0, limit: int | None = None) -> list[Record]:
        """See ash.domain.ports.EventStore.read."""
        async with self._connect("reading the log") as connection:
            return await read_records(connection, session_id, after_seq, limit)

    async def head(self, session_id: str) -> int | None:
        """See ash.domain.ports.EventStore.head."""
        statement = select(func.max(events.c.seq)).where(events.c.session_id == session_id)
        ((head,),) = await self._rows("reading a session's head", statement)
        return None if head is None else int(head)

    async def session(self, session_id: str) -> SessionRow | None:
        """See ash.domain.ports.EventStore.session."""
        statement = select(sessions).where(sessions.c.session_id == session_id)
        rows = await self._rows("reading a session", statement)
        return SessionRow(*rows[0]) if rows else None

    async def sessions(
        self, *, owner: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> tuple[list[SessionRow], str | None]:
        """See ash.domain.ports.EventStore.sessions."""
        check_page_limit(limit)
        rows = await self._rows("listing sessions", _session_page(owner, limit, cursor))
        page = [SessionRow(*row) for row in rows[:limit]]
        return page, encode_cursor(page[-1]) if len(rows) > limit else None

    async def unfinished(self) -> list[str]:
        """See ash.domain.ports.EventStore.unfinished."""
        # The same literal as in the partial index, which SQLite could not use for a bound value.
        statement = select(sessions.c.session_id).where(sessions.c.state != literal_column("'idle'"))
        rows = await self._rows("listing unfinished sessions", statement.order_by(sessions.c.session_id))
        return [session_id for (session_id,) in rows]

    async def run(self, session_id: str, run_id: str) -> RunRow | None:
        """See ash.domain.ports.EventStore.run."""
        statement = select(runs).where(runs.c.session_id == session_id, runs.c.run_id == run_id)
        rows = await self._rows("reading a run", statement)
        return RunRow(*rows[0]) if rows else None

    async def runs(self, session_id: str) -> list[RunRow]:
        """See ash.domain.ports.EventStore.runs."""
        statement = select(runs).where(runs.c.session_id == session_id).order_by(runs.c.started_seq)
        return [RunRow(*row) for row in await self._rows("listing runs", statement)]

    async def messages(self, session_id: str, after_seq: int = 0) -> list[MessageRow]:
        """See ash.domain.ports.EventStore.messages."""
        statement = (
            select(*_MESSAGE_COLUMNS)
            .where(messages.c.session_id == session_id, messages.c.seq > after_seq)
            .order_by(messages.c.seq)
        )
        return [MessageRow(*row) for row in await self._rows("reading messages", statement)]

    async def search(self, query: str, *, session_id: str, limit: int = 10) -> list[Match]:
        """See ash.domain.ports.EventStore.search, and ash.store.search for what matches."""
        full_text = full_text_query(query)
        if full_text is None or limit <= 0:
            return []
        rows = await self._rows(
            "searching messages", _SEARCH, query=full_text, session_id=session_id, limit=limit
        )
        return [Match(*row) for row in rows]


def _session_page(owner: str | None, limit: int, cursor: str | None) -> Select[Any]:
    statement = select(sessions).order_by(sessions.c.updated_at.desc(), sessions.c.session_id)
    if owner is not None:
        statement = statement.where(sessions.c.owner == owner)
    if cursor is not None:
        updated_at, session_id = decode_cursor(cursor)
        older = sessions.c.updated_at < updated_at
        # The first condition follows from the second; the index can use it.
        statement = statement.where(
            and_(sessions.c.updated_at <= updated_at, or_(older, sessions.c.session_id > session_id))
        )
    return statement.limit(limit + 1)


class SqliteReader(Queries):
    """A read-only view for programs of the command line, beside a running server too. It never migrates.

    An async context manager; or `open` and `close`.
    """

    async def open(self) -> None:
        """Check the file and open it.

        Raises:
            SchemaTooNew: the database was written by a newer Ash.
            StoreError: there is no database, it is not Ash's, or it must be migrated first.
        """
        revision = await asyncio.to_thread(revision_of, self._path)
        if revision is None:
            raise StoreError(
                f"there is no database at {self._path}; start the server once, or name its data folder"
            )
        if revision != REVISIONS[-1]:
            raise StoreError(
                f"{self._path} has schema revision {revision}, and this program reads {REVISIONS[-1]}; "
                "start the server once to migrate it"
            )
        self._open_readers()

    async def close(self) -> None:
        """Close the connections. Later calls raise StoreError."""
        await self._close_readers()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        _exc_type: type[BaseException] | None,
        _exc: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        await self.close()
