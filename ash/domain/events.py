"""What the log holds: AG-UI 1.0 events as frozen structs, inside the Ash envelope.

The structs mirror the wire names of package `ag-ui-protocol` 1.0 (checked by a test against its pydantic
models); msgspec is used in their place because one event is encoded for every token that is streamed.
Ash's own facts travel as CUSTOM events whose values are the `*Value` structs below.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar, Literal, Self

import msgspec
from msgspec import Struct


class Origin(StrEnum):
    """Why a run started."""

    USER = "user"
    TICK = "tick"
    SCHEDULE = "schedule"
    RESUME = "resume"


class AgentEvent(Struct, frozen=True, tag_field="type", rename="camel", omit_defaults=True):
    """Base of the AG-UI events; the tag is AG-UI's `type`."""


class RunStarted(AgentEvent, frozen=True, tag="RUN_STARTED"):
    """`metadata["messageId"]` names the input that is answered; a resume run names its `parent_run_id`."""

    thread_id: str
    run_id: str
    protocol_version: str = msgspec.field(default_factory=lambda: "1.0")
    parent_run_id: str | None = None
    metadata: dict[str, Any] | None = None


class Success(Struct, frozen=True, tag_field="type", tag="success"):
    pass


class Cancelled(Struct, frozen=True, tag_field="type", tag="cancelled"):
    pass


class Interrupted(Struct, frozen=True, tag_field="type", tag="interrupt"):
    """The run waits for a decision from outside; `interrupts` are AG-UI interrupts."""

    interrupts: list[dict[str, Any]]


Outcome = Success | Cancelled | Interrupted


class TokenUsage(Struct, frozen=True, rename="camel", omit_defaults=True):
    """AG-UI token usage; `cached_input_tokens` is the part of the prompt that was not prefilled again."""

    provider: str | None = None
    model: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_input_tokens: int | None = None
    total_tokens: int | None = None


class RunFinished(AgentEvent, frozen=True, tag="RUN_FINISHED"):
    thread_id: str
    run_id: str
    outcome: Outcome
    usage: list[TokenUsage] | None = None
    metadata: dict[str, Any] | None = None


class RunError(AgentEvent, frozen=True, tag="RUN_ERROR"):
    """`code` is `interrupted` after a restart, else the `kind` of an error in domain/errors.py."""

    message: str
    code: str
    metadata: dict[str, Any] | None = None


class StepStarted(AgentEvent, frozen=True, tag="STEP_STARTED"):
    step_name: str


class StepFinished(AgentEvent, frozen=True, tag="STEP_FINISHED"):
    step_name: str


class TextMessageStart(AgentEvent, frozen=True, tag="TEXT_MESSAGE_START"):
    message_id: str
    # No default: msgspec would omit it, and AG-UI clients expect to see it.
    role: Literal["assistant", "user", "system", "developer"]


class TextMessageContent(AgentEvent, frozen=True, tag="TEXT_MESSAGE_CONTENT"):
    message_id: str
    delta: str


class TextMessageEnd(AgentEvent, frozen=True, tag="TEXT_MESSAGE_END"):
    message_id: str


class ToolCallStart(AgentEvent, frozen=True, tag="TOOL_CALL_START"):
    tool_call_id: str
    tool_call_name: str
    parent_message_id: str | None = None


class ToolCallArgs(AgentEvent, frozen=True, tag="TOOL_CALL_ARGS"):
    tool_call_id: str
    delta: str


class ToolCallEnd(AgentEvent, frozen=True, tag="TOOL_CALL_END"):
    tool_call_id: str


class ToolCallResult(AgentEvent, frozen=True, tag="TOOL_CALL_RESULT"):
    message_id: str
    tool_call_id: str
    content: str
    role: Literal["tool"] | None = None


class StateSnapshot(AgentEvent, frozen=True, tag="STATE_SNAPSHOT"):
    snapshot: dict[str, Any]


class StateDelta(AgentEvent, frozen=True, tag="STATE_DELTA"):
    """`delta` is a JSON Patch (RFC 6902)."""

    delta: list[dict[str, Any]]


class Custom(AgentEvent, frozen=True, tag="CUSTOM"):
    name: str
    value: dict[str, Any]


Event = (
    RunStarted
    | RunFinished
    | RunError
    | StepStarted
    | StepFinished
    | TextMessageStart
    | TextMessageContent
    | TextMessageEnd
    | ToolCallStart
    | ToolCallArgs
    | ToolCallEnd
    | ToolCallResult
    | StateSnapshot
    | StateDelta
    | Custom
)

TERMINAL = (RunFinished, RunError)


class CustomValue(Struct, frozen=True, rename="camel", omit_defaults=True):
    """Base of the values of `ash.*` custom events."""

    event_name: ClassVar[str]

    def event(self) -> Custom:
        """This value as a CUSTOM event."""
        return Custom(name=self.event_name, value=msgspec.to_builtins(self))

    @classmethod
    def of(cls, event: Custom) -> Self:
        """The typed value of `event`.

        Raises:
            msgspec.ValidationError: the value does not have this shape.
        """
        return msgspec.convert(event.value, cls)


class InputValue(CustomValue, frozen=True):
    """One input. `run_id` names the run that will answer it, also while it waits in the queue."""

    event_name: ClassVar[str] = "ash.input"
    message_id: str
    text: str
    principal: str
    run_id: str
    idempotency_key: str | None = None
    when_busy: str | None = None
    images: list[dict[str, str]] | None = None


class QueueValue(CustomValue, frozen=True):
    """The queue after a change: run ids that wait, first in front; `removed` were cancelled unstarted."""

    event_name: ClassVar[str] = "ash.queue"
    queue: list[str]
    removed: list[str] = []


class RouteValue(CustomValue, frozen=True):
    event_name: ClassVar[str] = "ash.route"
    slice: str
    intent: str
    probabilities: dict[str, float]
    alternatives: list[dict[str, Any]]
    switched: bool
    reason: str
    router_ms: float


class ModeValue(CustomValue, frozen=True):
    """The mode of one message. `observed` false: the encoder was down and the filter's prediction stands."""

    event_name: ClassVar[str] = "ash.mode"
    message_id: str
    probabilities: dict[str, float]
    mode: str
    genre: str | None
    role: str = "assistant"
    observed: bool = True
    raw: dict[str, float] | None = None


class ModeShiftValue(CustomValue, frozen=True):
    event_name: ClassVar[str] = "ash.mode_shift"
    from_: str = msgspec.field(name="from")
    to: str
    genre: str | None
    onset_seq: int
    alarm_seq: int
    trigger: str
    evidence: list[int]


class TickValue(CustomValue, frozen=True):
    event_name: ClassVar[str] = "ash.tick"
    tick_id: str
    outcome: str
    reason: str


class SliceValue(CustomValue, frozen=True):
    """Something happened to a slice: loaded, evicted, crashed, fell back."""

    event_name: ClassVar[str] = "ash.slice"
    slice: str
    what: str
    reason: str
    to: str | None = None


class CompactionValue(CustomValue, frozen=True):
    """History up to and including `before` message no longer enters the prompt; the log keeps it."""

    event_name: ClassVar[str] = "ash.compaction"
    dropped: int
    first_kept: str
    reason: str


class Draft(Struct, frozen=True):
    """An event on its way to the log; the writer gives it seq and ts."""

    event: Event
    run_id: str | None = None
    origin: Origin | None = None


class Record(Struct, frozen=True):
    """One immutable row of a session's log. `ts` is milliseconds since the Unix epoch."""

    session_id: str
    seq: int
    ts: int
    run_id: str | None
    origin: Origin | None
    event: Event


_event_decoder = msgspec.json.Decoder(Event)
_event_encoder = msgspec.json.Encoder()


def event_type(event: Event) -> str:
    """AG-UI's `type` of an event, such as RUN_STARTED."""
    tag = type(event).__struct_config__.tag
    assert isinstance(tag, str)
    return tag


def encode_event(event: Event) -> bytes:
    """The event as AG-UI JSON."""
    return _event_encoder.encode(event)


def decode_event(body: bytes | str) -> Event:
    """The event in AG-UI JSON `body`.

    Raises:
        msgspec.DecodeError: not JSON, or not an event that Ash writes.
    """
    event: Event = _event_decoder.decode(body)
    return event
