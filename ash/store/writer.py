"""The single writer: one task, one connection, many callers in one commit."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import structlog
from msgspec import Struct
from msgspec.structs import asdict
from sqlalchemy import bindparam, delete, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from ash.domain.errors import AshError, StoreError, StoreFull
from ash.domain.events import Record
from ash.domain.ports import Clock
from ash.store.compaction import StoredRow, compact, store
from ash.store.connections import translated_errors
from ash.store.drafts import EncodedDraft, Sequenced, sequence
from ash.store.projection_tables import LatestChanges, load_state
from ash.store.projections import SessionState
from ash.store.tables import events

log = structlog.get_logger(__name__)

GROUP_EVENTS = 512
"""A commit takes waiting appends until it holds at least so many events."""

CACHED_SESSIONS = 256
"""Sessions whose state the writer keeps at hand; others are loaded again."""

_Result = TypeVar("_Result")

_INSERT = insert(events)
# Named apart from the columns, which SQLAlchemy reserves for the values of an UPDATE or INSERT.
_DELETE = delete(events).where(
    events.c.session_id == bindparam("of_session"), events.c.seq == bindparam("of_seq")
)


class _Append(Struct, frozen=True, eq=False):
    session_id: str
    drafts: list[EncodedDraft]
    future: asyncio.Future[list[Record]]


class _Operation(Struct, frozen=True, eq=False):
    doing: str
    run: Callable[[AsyncConnection], Awaitable[Any]]
    future: asyncio.Future[Any]


class _LogChanges:
    """Rows of the log to delete, then rows to insert."""

    def __init__(self) -> None:
        self._inserts: dict[tuple[str, int], StoredRow] = {}
        self._deletes: list[dict[str, object]] = []

    def add(self, drafts: list[EncodedDraft], sequenced: Sequenced) -> None:
        for record, draft in zip(sequenced.records, drafts, strict=True):
            self._inserts[record.session_id, record.seq] = store(record, draft.body)
        for message in sequenced.ended:
            compacted = compact(message.deltas)
            if compacted is None:
                continue
            for delta in message.deltas:
                if self._inserts.pop((delta.session_id, delta.seq), None) is None:
                    self._deletes.append({"of_session": delta.session_id, "of_seq": delta.seq})
            self._inserts[compacted.session_id, compacted.seq] = compacted

    async def write(self, connection: AsyncConnection) -> None:
        if self._deletes:
            await connection.execute(_DELETE, self._deletes)
        if self._inserts:
            await connection.execute(_INSERT, [asdict(row) for row in self._inserts.values()])


class Writer:
    """Serves appends and exclusive operations in the order of the calls.

    Appends that wait at the same time share one commit; if it fails for a reason other than a full disk,
    each is tried alone, so that only the one at fault fails. A caller that is cancelled before its turn is
    skipped; later, its append is committed or not as a whole like any other.
    """

    def __init__(self, connection: AsyncConnection, path: Path, clock: Clock) -> None:
        self._connection = connection
        self._path = path
        self._clock = clock
        self._queue: asyncio.Queue[_Append | _Operation | None] = asyncio.Queue()
        self._held: _Append | _Operation | None = None
        self._states: OrderedDict[str, SessionState] = OrderedDict()
        self._closing = False
        self._task = asyncio.create_task(self._serve(), name="event-log-writer")

    async def append(self, session_id: str, drafts: list[EncodedDraft]) -> list[Record]:
        """Commit `drafts` as a whole; see EventStore.append."""
        future: asyncio.Future[list[Record]] = asyncio.get_running_loop().create_future()
        self._enqueue(_Append(session_id, drafts, future))
        return await future

    async def execute(self, doing: str, run: Callable[[AsyncConnection], Awaitable[_Result]]) -> _Result:
        """Await `run` in a transaction of its own, between the appends before and behind it.

        The cached state of every session is dropped: `run` may change any.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._enqueue(_Operation(doing, run, future))
        return cast("_Result", await future)

    async def close(self) -> None:
        """Commit what was accepted and stop."""
        if not self._closing:
            self._closing = True
            self._queue.put_nowait(None)
        # Unlike awaiting the task, this does not pass a cancellation of the caller on to it.
        await asyncio.wait([self._task])

    def _enqueue(self, request: _Append | _Operation) -> None:
        if self._closing or self._task.done():
            raise StoreError(f"the store at {self._path} is closed; nothing was written")
        self._queue.put_nowait(request)

    async def _serve(self) -> None:
        group: list[_Append] | _Operation | None = None
        try:
            while (group := await self._next_group()) is not None:
                if isinstance(group, _Operation):
                    await self._operate(group)
                else:
                    await self._commit_group(group)
        finally:
            # Reached with work left only when the event loop is being torn down around the task.
            self._closing = True
            self._refuse_all(group)

    async def _next_group(self) -> list[_Append] | _Operation | None:
        first = await self._queue.get() if self._held is None else self._held
        self._held = None
        if not isinstance(first, _Append):
            return first
        group = [first]
        events_in_group = len(first.drafts)
        while events_in_group < GROUP_EVENTS and not self._queue.empty():
            request = self._queue.get_nowait()
            if not isinstance(request, _Append):
                if request is None:
                    self._queue.put_nowait(None)
                else:
                    self._held = request
                break
            group.append(request)
            events_in_group += len(request.drafts)
        return group

    def _refuse_all(self, group: list[_Append] | _Operation | None) -> None:
        unserved: list[_Append | _Operation | None] = [self._held]
        unserved.extend(group if isinstance(group, list) else [group])
        while not self._queue.empty():
            unserved.append(self._queue.get_nowait())
        for request in unserved:
            if request is not None:
                message = f"the writer of {self._path} was stopped; read the log to see what was written"
                _fail(request.future, StoreError(message))

    async def _commit_group(self, group: list[_Append]) -> None:
        group = [request for request in group if not request.future.done()]
        if not group:
            return
        try:
            outcomes = await self._commit(group)
        except StoreFull as error:
            log.error("disk_full", error=str(error), refused=len(group))
            for request in group:
                # One each: an exception that several callers raise would collect all their tracebacks.
                _fail(request.future, StoreFull(str(error)))
        except Exception as error:  # noqa: BLE001 -- whatever it is, its callers must hear it and the writer go on
            if len(group) > 1:
                for request in group:
                    await self._commit_group([request])
            else:
                self._report(group[0], "appending", error)
        else:
            # Outside the try: what is committed must not be tried again.
            for request, outcome in outcomes:
                if isinstance(outcome, StoreError):
                    _fail(request.future, outcome)
                elif not request.future.done():
                    request.future.set_result(outcome)

    async def _commit(self, group: list[_Append]) -> list[tuple[_Append, list[Record] | StoreError]]:
        states: dict[str, SessionState] = {}
        log_changes, row_changes = _LogChanges(), LatestChanges()
        outcomes: list[tuple[_Append, list[Record] | StoreError]] = []
        async with translated_errors(self._path, "appending to the log"), self._connection.begin():
            for request in group:
                try:
                    state = states.get(request.session_id) or await self._state(request.session_id)
                    sequenced = sequence(state, request.session_id, request.drafts, self._clock())
                except StoreError as error:
                    outcomes.append((request, error))
                    continue
                states[request.session_id] = sequenced.state
                log_changes.add(request.drafts, sequenced)
                row_changes.add(sequenced.changes)
                outcomes.append((request, sequenced.records))
            await log_changes.write(self._connection)
            await row_changes.write(self._connection)
        self._remember(states)
        return outcomes

    async def _state(self, session_id: str) -> SessionState:
        cached = self._states.get(session_id)
        return cached if cached is not None else await load_state(self._connection, session_id)

    def _remember(self, states: dict[str, SessionState]) -> None:
        for session_id, state in states.items():
            self._states[session_id] = state
            self._states.move_to_end(session_id)
        while len(self._states) > CACHED_SESSIONS:
            self._states.popitem(last=False)

    async def _operate(self, operation: _Operation) -> None:
        if operation.future.done():
            return
        self._states.clear()
        try:
            async with translated_errors(self._path, operation.doing), self._connection.begin():
                result = await operation.run(self._connection)
        except Exception as error:  # noqa: BLE001 -- as for an append
            self._report(operation, operation.doing, error)
        else:
            if not operation.future.done():
                operation.future.set_result(result)

    def _report(self, request: _Append | _Operation, doing: str, error: Exception) -> None:
        if not isinstance(error, AshError):
            log.error("writer_failed", doing=doing, exc_info=error)
            unexpected = StoreError(f"{doing}: {type(error).__name__}: {error}; nothing was written")
            unexpected.__cause__ = error
            error = unexpected
        _fail(request.future, error)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    # A caller that was cancelled while it waited has ended its future already.
    if not future.done():
        future.set_exception(error)
