"""Between the fold of ash.store.projections and the tables: loading its state, writing its changes."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from sqlalchemy import Delete, Table, bindparam, delete, func, select
from sqlalchemy.dialects.sqlite import Insert, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from ash.domain.errors import StoreError
from ash.domain.events import Record, TextMessageContent
from ash.domain.values import MessageRow, RunRow, SessionRow
from ash.store.projections import Change, Drop, OpenMessage, Row, SessionState, WaitingInput
from ash.store.queries import read_records
from ash.store.tables import events, messages, open_messages, runs, sessions, waiting_inputs


def _upsert(table: Table, *key: str) -> Insert:
    statement = insert(table)
    replaced = [column.name for column in table.c if column.name not in key and column.name != "id"]
    return statement.on_conflict_do_update(
        index_elements=key, set_={name: statement.excluded[name] for name in replaced}
    )


def _delete_one(table: Table) -> Delete:
    # Named apart from the columns, which SQLAlchemy reserves for the values of an UPDATE or INSERT.
    return delete(table).where(
        table.c.session_id == bindparam("of_session"), table.c.message_id == bindparam("of_message")
    )


_PUT: dict[type[Row], Insert] = {
    SessionRow: _upsert(sessions, "session_id"),
    RunRow: _upsert(runs, "session_id", "run_id"),
    MessageRow: _upsert(messages, "session_id", "message_id"),
    WaitingInput: _upsert(waiting_inputs, "session_id", "message_id"),
    OpenMessage: _upsert(open_messages, "session_id", "message_id"),
}
_DROP: dict[type[Row], Delete] = {
    WaitingInput: _delete_one(waiting_inputs),
    OpenMessage: _delete_one(open_messages),
}

_SESSION = select(sessions).where(sessions.c.session_id == bindparam("session_id"))
_HEAD = select(func.max(events.c.seq)).where(events.c.session_id == bindparam("session_id"))
_OPEN_RUNS = select(runs).where(runs.c.session_id == bindparam("session_id"), runs.c.state == "running")
_WAITING = select(waiting_inputs).where(waiting_inputs.c.session_id == bindparam("session_id"))
_OPEN_MESSAGES = select(open_messages).where(open_messages.c.session_id == bindparam("session_id"))


def _key(row: Row) -> tuple[type[Row], str, str]:
    if isinstance(row, SessionRow):
        return SessionRow, row.session_id, ""
    return type(row), row.session_id, row.run_id if isinstance(row, RunRow) else row.message_id


def _values(row: Row) -> dict[str, object]:
    values = msgspec.structs.asdict(row)
    # The deltas of an open message are in the log.
    values.pop("deltas", None)
    return values


class LatestChanges:
    """Changes of a transaction; of several to one row only the last is written."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[type[Row], str, str], Change] = {}

    def add(self, changes: Iterable[Change]) -> None:
        """Take further changes, later than those before."""
        for change in changes:
            self._by_key[_key(change.row)] = change

    async def write(self, connection: AsyncConnection) -> None:
        """Execute what was added: one statement for each table and kind of change."""
        puts: dict[type[Row], list[dict[str, object]]] = {}
        drops: dict[type[Row], list[dict[str, object]]] = {}
        for (kind, session_id, key), change in self._by_key.items():
            if isinstance(change, Drop):
                drops.setdefault(kind, []).append({"of_session": session_id, "of_message": key})
            else:
                puts.setdefault(kind, []).append(_values(change.row))
        for kind, rows in puts.items():
            await connection.execute(_PUT[kind], rows)
        for kind, rows in drops.items():
            await connection.execute(_DROP[kind], rows)


async def load_state(connection: AsyncConnection, session_id: str) -> SessionState:
    """The state of the fold at the end of the session's log.

    Raises:
        StoreError: the projections do not stand where the log does, so that going on would spoil both.
    """
    of_session = {"session_id": session_id}
    session = (await connection.execute(_SESSION, of_session)).first()
    head = (await connection.execute(_HEAD, of_session)).scalar_one()
    state = SessionState(session=None if session is None else SessionRow(*session))
    if state.head_seq != (head or 0):
        raise StoreError(
            f"session {session_id}: its log ends at seq {head} and its projections at {state.head_seq}; "
            "rebuild the projections from the log"
        )
    if state.session is None:
        return state
    open_runs = [RunRow(*row) for row in await connection.execute(_OPEN_RUNS, of_session)]
    waiting = [WaitingInput(*row) for row in await connection.execute(_WAITING, of_session)]
    unended = [OpenMessage(*row) for row in await connection.execute(_OPEN_MESSAGES, of_session)]
    return SessionState(
        session=state.session,
        runs={run.run_id: run for run in open_runs},
        waiting={entry.message_id: entry for entry in waiting},
        open_messages=await _with_deltas(connection, session_id, unended),
    )


async def _with_deltas(
    connection: AsyncConnection, session_id: str, unended: list[OpenMessage]
) -> dict[str, OpenMessage]:
    if not unended:
        return {}
    deltas: dict[str, list[Record]] = {message.message_id: [] for message in unended}
    started = {message.message_id: message.start_seq for message in unended}
    for record in await read_records(connection, session_id, min(started.values())):
        event = record.event
        if isinstance(event, TextMessageContent) and record.seq > started.get(event.message_id, record.seq):
            deltas[event.message_id].append(record)
    return {
        message.message_id: msgspec.structs.replace(message, deltas=tuple(deltas[message.message_id]))
        for message in unended
    }
