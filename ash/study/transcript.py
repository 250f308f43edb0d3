"""From the records of one session to what a study reads: messages, turns, modes, shifts, tools. Pure.

A log is taken as it is. Sequence numbers may be missing, a message may lack its start or its end, a session
may be empty or hold nothing but tool calls: what is there is shown, and what could not be read is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from ash.domain.events import (
    Custom,
    CustomValue,
    Event,
    InputValue,
    ModeShiftValue,
    ModeValue,
    Record,
    RouteValue,
    RunError,
    RunFinished,
    RunStarted,
    SliceValue,
    StateDelta,
    StateSnapshot,
    TextMessageContent,
    TextMessageEnd,
    TextMessageStart,
    TickValue,
    TokenUsage,
    ToolCallArgs,
    ToolCallResult,
    ToolCallStart,
)


class Reading(Struct, frozen=True):
    """The mode of one message: the filter's probabilities, and `raw` those of the head before the filter.

    For an input `raw` says how likely it asks for each mode. `observed` false: nobody could look at the text.
    """

    seq: int
    mode: str
    genre: str | None
    probabilities: dict[str, float]
    raw: dict[str, float] | None
    observed: bool


class Message(Struct, frozen=True):
    """One message. `seq` is that of its first event; times are milliseconds since the Unix epoch.

    Attributes:
        message_id: the id in the log; exports keep it, so that it can be cited.
        role: `user` for an input, else AG-UI's role.
        principal: who sent an input; None for an answer.
        key: the idempotency key of an input; a study run marks its own inputs with it.
        origin: why its run started; None where the log does not say.
        complete: false for a message that was never ended.
    """

    message_id: str
    role: str
    text: str
    seq: int
    end_seq: int
    ts: int
    end_ts: int
    run_id: str | None
    origin: str | None
    principal: str | None = None
    key: str | None = None
    reading: Reading | None = None
    complete: bool = True


class ToolCall(Struct, frozen=True):
    """One tool call; `result` None: its outcome is not in the log."""

    tool_call_id: str
    name: str
    arguments: str
    result: str | None
    seq: int
    ts: int
    end_ts: int
    run_id: str | None
    message_id: str | None


class Turn(Struct, frozen=True):
    """One run. `outcome`: success, cancelled, interrupt, error, or open where the log ends before it.

    `inputs` and `answers` are message ids, `tools` tool call ids; `usage` adds up the run's generations;
    `metadata` is that of its last event (times in milliseconds, tokens per second).
    """

    run_id: str
    origin: str | None
    seq: int
    ts: int
    end_ts: int
    outcome: str
    error: str | None
    inputs: tuple[str, ...]
    answers: tuple[str, ...]
    tools: tuple[str, ...]
    route: RouteValue | None
    usage: TokenUsage | None
    metadata: dict[str, Any]
    resumes: str | None = None


class ShiftFact(Struct, frozen=True):
    """A shift that was detected, with the seq and time of the event that reports it."""

    seq: int
    ts: int
    value: ModeShiftValue


class Notice(Struct, frozen=True):
    """Something beside the conversation: a slice that loaded or crashed, a tick, a change of persona."""

    seq: int
    ts: int
    run_id: str | None
    name: str
    value: dict[str, Any]


class SessionView(Struct, frozen=True):
    """One session. Messages, turns, tools, shifts and notices stand in the order of the log.

    Attributes:
        gaps: how many seqs are missing between the first and the last one.
        unreadable: seqs of events whose value has not the shape that this version knows.
    """

    session_id: str
    title: str = ""
    owner: str = ""
    persona: str | None = None
    pinned_slice: str | None = None
    first_ts: int = 0
    last_ts: int = 0
    messages: tuple[Message, ...] = ()
    turns: tuple[Turn, ...] = ()
    tools: tuple[ToolCall, ...] = ()
    shifts: tuple[ShiftFact, ...] = ()
    notices: tuple[Notice, ...] = ()
    gaps: int = 0
    unreadable: tuple[int, ...] = ()

    @property
    def answers(self) -> tuple[Message, ...]:
        """The agent's messages."""
        return tuple(message for message in self.messages if message.role == "assistant")

    @property
    def inputs(self) -> tuple[Message, ...]:
        """What came in from outside as a message."""
        return tuple(message for message in self.messages if message.role == "user")

    def message(self, message_id: str) -> Message | None:
        """The message of that id."""
        return next((message for message in self.messages if message.message_id == message_id), None)


def view(session_id: str, records: Sequence[Record]) -> SessionView:
    """The session in `records`, which stand in seq order; no records give an empty session."""
    fold = _Fold(session_id)
    for record in records:
        fold.apply(record)
    return fold.view()


class _Draft(Struct):
    """A message that is being read."""

    message_id: str
    role: str
    seq: int
    ts: int
    end_seq: int
    end_ts: int
    run_id: str | None
    origin: str | None
    parts: list[str] = []
    principal: str | None = None
    key: str | None = None
    reading: Reading | None = None
    complete: bool = False


class _Tool(Struct):
    tool_call_id: str
    name: str
    seq: int
    ts: int
    end_ts: int
    run_id: str | None
    message_id: str | None
    arguments: list[str] = []
    result: str | None = None


class _Run(Struct):
    run_id: str
    origin: str | None
    seq: int
    ts: int
    end_ts: int
    outcome: str = "open"
    error: str | None = None
    asked: str | None = None
    resumes: str | None = None
    route: RouteValue | None = None
    usage: TokenUsage | None = None
    metadata: dict[str, Any] = {}


class _Fold:
    """The reading of one log."""

    def __init__(self, session_id: str) -> None:
        self._session_id = session_id
        self._state: dict[str, Any] = {}
        self._messages: dict[str, _Draft] = {}
        self._runs: dict[str, _Run] = {}
        self._tools: dict[str, _Tool] = {}
        self._shifts: list[ShiftFact] = []
        self._notices: list[Notice] = []
        self._unreadable: list[int] = []
        self._first: Record | None = None
        self._last: Record | None = None
        self._count = 0

    def apply(self, record: Record) -> None:
        """Take one record."""
        self._first = self._first or record
        self._last = record
        self._count += 1
        if record.run_id is not None:
            self._run(record).end_ts = record.ts
        match record.event:
            case StateSnapshot(snapshot=snapshot):
                self._state.update(snapshot)
            case StateDelta(delta=patch):
                self._apply_patch(patch, record)
            case RunStarted() | RunFinished() | RunError():
                self._apply_run(record.event, record)
            case TextMessageStart() | TextMessageContent() | TextMessageEnd():
                self._apply_text(record.event, record)
            case ToolCallStart() | ToolCallArgs() | ToolCallResult():
                self._apply_tool(record.event, record)
            case Custom() as event:
                try:
                    self._apply_custom(event, record)
                except msgspec.ValidationError:
                    # Another version's event: the study counts it instead of failing on the whole log.
                    self._unreadable.append(record.seq)
            case _:
                pass

    def _run(self, record: Record) -> _Run:
        """The run of a record; one whose start is missing begins with its first record."""
        assert record.run_id is not None
        origin = None if record.origin is None else str(record.origin)
        return self._runs.setdefault(
            record.run_id, _Run(record.run_id, origin, record.seq, record.ts, record.ts)
        )

    def _apply_run(self, event: RunStarted | RunFinished | RunError, record: Record) -> None:
        if record.run_id is None:
            return
        run = self._run(record)
        match event:
            case RunStarted(parent_run_id=parent, metadata=metadata):
                run.resumes, run.asked = parent, (metadata or {}).get("messageId")
            case RunFinished(outcome=outcome, usage=usage, metadata=metadata):
                run.outcome = str(outcome.__struct_config__.tag)
                run.usage, run.metadata = _sum(usage), metadata or {}
            case RunError(message=message, code=code, metadata=metadata):
                run.outcome, run.error, run.metadata = "error", f"{code}: {message}", metadata or {}

    def _message(self, message_id: str, role: str, record: Record) -> _Draft:
        origin = None if record.origin is None else str(record.origin)
        draft = self._messages.setdefault(
            message_id,
            _Draft(message_id, role, record.seq, record.ts, record.seq, record.ts, record.run_id, origin),
        )
        draft.end_seq, draft.end_ts = record.seq, record.ts
        return draft

    def _apply_text(
        self, event: TextMessageStart | TextMessageContent | TextMessageEnd, record: Record
    ) -> None:
        role = event.role if isinstance(event, TextMessageStart) else "assistant"
        draft = self._message(event.message_id, role, record)
        match event:
            case TextMessageContent(delta=delta):
                draft.parts.append(delta)
            case TextMessageEnd():
                draft.complete = True
            case _:
                pass

    def _apply_tool(self, event: ToolCallStart | ToolCallArgs | ToolCallResult, record: Record) -> None:
        call = event.tool_call_id
        tool = self._tools.setdefault(
            call, _Tool(call, "", record.seq, record.ts, record.ts, record.run_id, None)
        )
        tool.end_ts = record.ts
        match event:
            case ToolCallStart(tool_call_name=name, parent_message_id=parent):
                tool.name, tool.message_id = name, parent
            case ToolCallArgs(delta=delta):
                tool.arguments.append(delta)
            case ToolCallResult(content=content):
                tool.result = content

    def _apply_custom(self, event: Custom, record: Record) -> None:
        match event.name:
            case InputValue.event_name:
                value = InputValue.of(event)
                draft = self._message(value.message_id, "user", record)
                draft.parts, draft.complete = [value.text], True
                draft.run_id, draft.principal, draft.key = (
                    value.run_id,
                    value.principal,
                    value.idempotency_key,
                )
            case ModeValue.event_name:
                self._apply_mode(ModeValue.of(event), record)
            case ModeShiftValue.event_name:
                self._shifts.append(ShiftFact(record.seq, record.ts, ModeShiftValue.of(event)))
            case RouteValue.event_name if record.run_id is not None:
                self._run(record).route = RouteValue.of(event)
            case SliceValue.event_name:
                self._notice(SliceValue.of(event), record)
            case TickValue.event_name:
                self._notice(TickValue.of(event), record)
            case _:
                pass

    def _apply_mode(self, value: ModeValue, record: Record) -> None:
        draft = self._messages.get(value.message_id)
        if draft is not None:
            draft.reading = Reading(
                record.seq, value.mode, value.genre, value.probabilities, value.raw, value.observed
            )

    def _notice(self, value: CustomValue, record: Record) -> None:
        content = msgspec.to_builtins(value)
        self._notices.append(Notice(record.seq, record.ts, record.run_id, value.event_name, content))

    def _apply_patch(self, patch: Sequence[dict[str, Any]], record: Record) -> None:
        for operation in patch:
            path, value = str(operation.get("path", "")), operation.get("value")
            if path in {"/title", "/owner", "/persona", "/pinnedSlice"}:
                self._state[path[1:]] = value
            if path == "/persona":
                self._notices.append(Notice(record.seq, record.ts, record.run_id, "persona", {"to": value}))

    def view(self) -> SessionView:
        """Everything that was read."""
        if self._first is None or self._last is None:
            return SessionView(self._session_id)
        messages = tuple(_finished(draft) for draft in self._messages.values())
        tools = tuple(
            ToolCall(
                tool.tool_call_id,
                tool.name,
                "".join(tool.arguments),
                tool.result,
                tool.seq,
                tool.ts,
                tool.end_ts,
                tool.run_id,
                tool.message_id,
            )
            for tool in self._tools.values()
        )
        return SessionView(
            session_id=self._session_id,
            title=str(self._state.get("title") or ""),
            owner=str(self._state.get("owner") or ""),
            persona=self._state.get("persona"),
            pinned_slice=self._state.get("pinnedSlice"),
            first_ts=self._first.ts,
            last_ts=self._last.ts,
            messages=messages,
            turns=tuple(self._turn(run, messages, tools) for run in self._runs.values()),
            tools=tools,
            shifts=tuple(self._shifts),
            notices=tuple(self._notices),
            gaps=self._last.seq - self._first.seq + 1 - self._count,
            unreadable=tuple(self._unreadable),
        )

    def _turn(self, run: _Run, messages: Sequence[Message], tools: Sequence[ToolCall]) -> Turn:
        of_run = [message for message in messages if message.run_id == run.run_id]
        inputs = [message.message_id for message in of_run if message.role == "user"]
        if run.asked is not None and run.asked not in inputs and run.asked in self._messages:
            inputs.insert(0, run.asked)
        return Turn(
            run_id=run.run_id,
            origin=run.origin,
            seq=run.seq,
            ts=run.ts,
            end_ts=run.end_ts,
            outcome=run.outcome,
            error=run.error,
            inputs=tuple(inputs),
            answers=tuple(message.message_id for message in of_run if message.role == "assistant"),
            tools=tuple(tool.tool_call_id for tool in tools if tool.run_id == run.run_id),
            route=run.route,
            usage=run.usage,
            metadata=run.metadata,
            resumes=run.resumes,
        )


def _finished(draft: _Draft) -> Message:
    return Message(
        message_id=draft.message_id,
        role=draft.role,
        text="".join(draft.parts),
        seq=draft.seq,
        end_seq=draft.end_seq,
        ts=draft.ts,
        end_ts=draft.end_ts,
        run_id=draft.run_id,
        origin=draft.origin,
        principal=draft.principal,
        key=draft.key,
        reading=draft.reading,
        complete=draft.complete,
    )


def _sum(usage: Sequence[TokenUsage] | None) -> TokenUsage | None:
    """A run's generations as one; the model is the last one's."""
    if not usage:
        return None
    return TokenUsage(
        provider=usage[-1].provider,
        model=usage[-1].model,
        input_tokens=sum(each.input_tokens or 0 for each in usage),
        output_tokens=sum(each.output_tokens or 0 for each in usage),
        cached_input_tokens=sum(each.cached_input_tokens or 0 for each in usage),
        total_tokens=sum(each.total_tokens or 0 for each in usage),
    )


def readable(event: Event) -> str:
    """The name by which people know an event: that of a CUSTOM event, else AG-UI's type."""
    tag = type(event).__struct_config__.tag
    return event.name if isinstance(event, Custom) else str(tag)
