"""From records to rows: what sessions, runs and messages are, given the log.

Pure. The live writer, the rebuild and the in-memory store all fold the log with `apply`, so their rows are
equal. The state that the fold carries is itself made of stored rows (and of the log's deltas), so a writer
that has just started goes on from where the last one stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from ash.domain.events import (
    Custom,
    InputValue,
    ModeValue,
    Origin,
    QueueValue,
    Record,
    RouteValue,
    RunError,
    RunFinished,
    RunStarted,
    StateDelta,
    StateSnapshot,
    TextMessageContent,
    TextMessageEnd,
    TextMessageStart,
    TokenUsage,
)
from ash.domain.values import MessageRow, RunRow, SessionRow


class WaitingInput(Struct, frozen=True):
    """A queued input; `run_id` names the run that will answer it."""

    session_id: str
    message_id: str
    run_id: str


class OpenMessage(Struct, frozen=True):
    """A message between its START and its END. Its deltas are in the log, here they are at hand."""

    session_id: str
    message_id: str
    role: str
    start_seq: int
    deltas: tuple[Record, ...] = ()

    def text(self) -> str:
        """The deltas so far, joined."""
        return "".join(delta_text(record) for record in self.deltas)


class SessionState(Struct, frozen=True):
    """What the fold must remember of one session. Keys are run ids and message ids.

    `runs` holds the open ones; `session` is None before the first event.
    """

    session: SessionRow | None = None
    runs: dict[str, RunRow] = {}
    waiting: dict[str, WaitingInput] = {}
    open_messages: dict[str, OpenMessage] = {}

    @property
    def head_seq(self) -> int:
        """The last seq, 0 before the first event."""
        return 0 if self.session is None else self.session.head_seq

    @property
    def updated_at(self) -> int:
        """The last ts, 0 before the first event."""
        return 0 if self.session is None else self.session.updated_at


Row = SessionRow | RunRow | MessageRow | WaitingInput | OpenMessage


class Put(Struct, frozen=True):
    """Insert the row, or replace the one with its key."""

    row: Row


class Drop(Struct, frozen=True):
    """Remove the row if it is there."""

    row: WaitingInput | OpenMessage


Change = Put | Drop
Step = tuple[SessionState, list[Change]]


def delta_text(record: Record) -> str:
    """The text of a TEXT_MESSAGE_CONTENT record."""
    assert isinstance(record.event, TextMessageContent)
    return record.event.delta


def apply(state: SessionState, record: Record) -> Step:
    """Fold one record into `state`; returns the new state and the changed rows, in order.

    A log that does not begin with a STATE_SNAPSHOT gives a session without title and owner.

    Raises:
        ValueError: the value of an `ash.*` event or a field of the session's state has the wrong shape.
    """
    handler = _HANDLERS.get(type(record.event))
    changes: list[Change] = []
    if state.session is None:
        state = replace(state, session=_new_session(record))
    if handler is not None:
        state, changes = handler(state, record, record.event)
    session = state.session
    assert session is not None
    session = replace(
        session,
        state="running" if state.runs else "queued" if state.waiting else "idle",
        head_seq=record.seq,
        updated_at=record.ts,
    )
    return replace(state, session=session), [*changes, Put(session)]


def _new_session(record: Record) -> SessionRow:
    return SessionRow(
        session_id=record.session_id,
        title="",
        owner="",
        persona=None,
        pinned_slice=None,
        state="idle",
        mode=None,
        slice=None,
        head_seq=record.seq,
        created_at=record.ts,
        updated_at=record.ts,
    )


_SESSION_FIELDS = {
    "title": "title",
    "owner": "owner",
    "persona": "persona",
    "pinnedSlice": "pinned_slice",
}
_PATCHABLE = {f"/{key}": field for key, field in _SESSION_FIELDS.items()}
_NEVER_NULL = ("title", "owner")


def _with_session(state: SessionState, **fields: Any) -> SessionState:
    assert state.session is not None
    return replace(state, session=replace(state.session, **fields))


def _session_field(field: str, value: object) -> str | None:
    if value is None:
        return "" if field in _NEVER_NULL else None
    if not isinstance(value, str):
        raise ValueError(f"{field} of a session must be text or null, not {type(value).__name__}")
    return value


def _state_snapshot(state: SessionState, _record: Record, event: StateSnapshot) -> Step:
    fields = {
        field: _session_field(field, event.snapshot[key])
        for key, field in _SESSION_FIELDS.items()
        if key in event.snapshot
    }
    return _with_session(state, **fields), []


def _state_delta(state: SessionState, _record: Record, event: StateDelta) -> Step:
    fields: dict[str, str | None] = {}
    for operation in event.delta:
        field = _PATCHABLE.get(operation.get("path", ""))
        if field is None:
            continue
        if operation.get("op") in ("add", "replace"):
            fields[field] = _session_field(field, operation.get("value"))
        elif operation.get("op") == "remove":
            fields[field] = _session_field(field, None)
    return _with_session(state, **fields), []


def _run_started(state: SessionState, record: Record, event: RunStarted) -> Step:
    run = RunRow(
        session_id=record.session_id,
        run_id=event.run_id,
        origin=str(record.origin or Origin.USER),
        state="running",
        input_message_id=(event.metadata or {}).get("messageId"),
        slice=None,
        intent=None,
        error_code=None,
        started_seq=record.seq,
        ended_seq=None,
        input_tokens=None,
        cached_tokens=None,
        output_tokens=None,
    )
    state, changes = _stop_waiting(state, {event.run_id})
    return replace(state, runs={**state.runs, run.run_id: run}), [*changes, Put(run)]


def _stop_waiting(state: SessionState, run_ids: set[str]) -> Step:
    done = [waiting for waiting in state.waiting.values() if waiting.run_id in run_ids]
    if not done:
        return state, []
    kept = {key: waiting for key, waiting in state.waiting.items() if waiting.run_id not in run_ids}
    return replace(state, waiting=kept), [Drop(waiting) for waiting in done]


def _run_finished(state: SessionState, record: Record, event: RunFinished) -> Step:
    usage = event.usage or []
    return _end_run(
        state,
        event.run_id,
        state=str(type(event.outcome).__struct_config__.tag),
        ended_seq=record.seq,
        input_tokens=_total(usage, "input_tokens"),
        cached_tokens=_total(usage, "cached_input_tokens"),
        output_tokens=_total(usage, "output_tokens"),
    )


def _total(usage: list[TokenUsage], field: str) -> int | None:
    counts = [count for part in usage if (count := getattr(part, field)) is not None]
    return sum(counts) if counts else None


def _run_error(state: SessionState, record: Record, event: RunError) -> Step:
    return _end_run(state, record.run_id, state="error", ended_seq=record.seq, error_code=event.code)


def _end_run(session_state: SessionState, run_id: str | None, **fields: Any) -> Step:
    run = session_state.runs.get(run_id or "")
    if run is None:
        return session_state, []
    still_open = {key: row for key, row in session_state.runs.items() if key != run_id}
    return replace(session_state, runs=still_open), [Put(replace(run, **fields))]


def _message_start(state: SessionState, record: Record, event: TextMessageStart) -> Step:
    message = OpenMessage(record.session_id, event.message_id, event.role, record.seq)
    return _with_open_message(state, message), [Put(message)]


def _message_content(state: SessionState, record: Record, event: TextMessageContent) -> Step:
    message = state.open_messages.get(event.message_id)
    if message is None:
        return state, []
    return _with_open_message(state, replace(message, deltas=(*message.deltas, record))), []


def _with_open_message(state: SessionState, message: OpenMessage) -> SessionState:
    return replace(state, open_messages={**state.open_messages, message.message_id: message})


def _message_end(state: SessionState, record: Record, event: TextMessageEnd) -> Step:
    message = state.open_messages.get(event.message_id)
    if message is None:
        return state, []
    row = MessageRow(
        session_id=record.session_id,
        message_id=event.message_id,
        run_id=record.run_id,
        role=message.role,
        text=message.text(),
        seq=record.seq,
        ts=record.ts,
    )
    still_open = {key: value for key, value in state.open_messages.items() if key != event.message_id}
    return replace(state, open_messages=still_open), [Put(row), Drop(message)]


def _custom(state: SessionState, record: Record, event: Custom) -> Step:
    handler = _CUSTOM_HANDLERS.get(event.name)
    return (state, []) if handler is None else handler(state, record, event)


def _input(state: SessionState, record: Record, event: Custom) -> Step:
    value = InputValue.of(event)
    row = MessageRow(
        session_id=record.session_id,
        message_id=value.message_id,
        # The record's own run id is still None while the input waits.
        run_id=value.run_id,
        role="user",
        text=value.text,
        seq=record.seq,
        ts=record.ts,
    )
    if record.run_id is not None:
        return state, [Put(row)]
    waiting = WaitingInput(record.session_id, value.message_id, value.run_id)
    state = replace(state, waiting={**state.waiting, value.message_id: waiting})
    return state, [Put(row), Put(waiting)]


def _queue(state: SessionState, _record: Record, event: Custom) -> Step:
    return _stop_waiting(state, set(QueueValue.of(event).removed))


def _mode(state: SessionState, _record: Record, event: Custom) -> Step:
    value = ModeValue.of(event)
    return (_with_session(state, mode=value.mode), []) if value.role == "assistant" else (state, [])


def _route(state: SessionState, record: Record, event: Custom) -> Step:
    value = RouteValue.of(event)
    state = _with_session(state, slice=value.slice)
    run = state.runs.get(record.run_id or "")
    if run is None:
        return state, []
    run = replace(run, slice=value.slice, intent=value.intent)
    return replace(state, runs={**state.runs, run.run_id: run}), [Put(run)]


# Each handler takes the event of its key; the common type of the values cannot say so.
_Handler = Callable[[SessionState, Record, Any], Step]

_HANDLERS: dict[type, _Handler] = {
    StateSnapshot: _state_snapshot,
    StateDelta: _state_delta,
    RunStarted: _run_started,
    RunFinished: _run_finished,
    RunError: _run_error,
    TextMessageStart: _message_start,
    TextMessageContent: _message_content,
    TextMessageEnd: _message_end,
    Custom: _custom,
}

_CUSTOM_HANDLERS: dict[str, _Handler] = {
    InputValue.event_name: _input,
    QueueValue.event_name: _queue,
    ModeValue.event_name: _mode,
    RouteValue.event_name: _route,
}
