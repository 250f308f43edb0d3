"""The parameters of every `ash.v1` method, as strict structs; the table of docs/protocol.md in code.

Unknown extra fields are ignored, so that a newer client can talk to an older server.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

PROTOCOL_VERSION = 1

Identifier = Annotated[str, Meta(min_length=1, max_length=256)]
Limit = Annotated[int, Meta(ge=1, le=500)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seq = Count
Text = Annotated[str, Meta(min_length=1)]


class Params(Struct, frozen=True, rename="camel", omit_defaults=True):
    """Base of all parameters; `method` is the name on the wire."""

    method: ClassVar[str]


class ClientInfo(Struct, frozen=True):
    name: str
    version: str = ""


class Initialize(Params, frozen=True):
    method: ClassVar[str] = "initialize"
    protocol_version: int
    client: ClientInfo | None = None
    token: str | None = None


class SessionNew(Params, frozen=True):
    method: ClassVar[str] = "session/new"
    title: str | None = None
    persona: str | None = None
    slice: str | None = None
    goals: list[Text] | None = None


class SessionList(Params, frozen=True):
    method: ClassVar[str] = "session/list"
    limit: Limit = 50
    cursor: str | None = None


class SessionAttach(Params, frozen=True):
    method: ClassVar[str] = "session/attach"
    session_id: Identifier
    after_seq: Seq = 0


class SessionDetach(Params, frozen=True):
    method: ClassVar[str] = "session/detach"
    session_id: Identifier


class TextPart(Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class ImagePart(Struct, frozen=True, rename="camel", tag_field="type", tag="image"):
    """`data` is standard base64 (RFC 4648, section 4)."""

    data: str
    mime_type: Annotated[str, Meta(pattern=r"^image/[\w.+-]+$")]


class SessionPrompt(Params, frozen=True):
    method: ClassVar[str] = "session/prompt"
    session_id: Identifier
    prompt: Annotated[list[TextPart | ImagePart], Meta(min_length=1)]
    idempotency_key: Identifier | None = None
    when_busy: Literal["enqueue", "interrupt", "reject", "steer"] = "enqueue"


class SessionCancel(Params, frozen=True):
    method: ClassVar[str] = "session/cancel"
    session_id: Identifier
    run_id: Identifier | None = None


class SessionFork(Params, frozen=True):
    method: ClassVar[str] = "session/fork"
    session_id: Identifier
    at_seq: Seq | None = None


class SessionDelete(Params, frozen=True):
    method: ClassVar[str] = "session/delete"
    session_id: Identifier


class GoalAdd(Params, frozen=True):
    method: ClassVar[str] = "goal/add"
    session_id: Identifier
    text: Text


class GoalList(Params, frozen=True):
    method: ClassVar[str] = "goal/list"
    session_id: Identifier


class GoalClose(Params, frozen=True):
    method: ClassVar[str] = "goal/close"
    session_id: Identifier
    goal_id: Identifier


class AutonomySet(Params, frozen=True):
    method: ClassVar[str] = "autonomy/set"
    session_id: Identifier
    enabled: bool
    interval_s: Annotated[float, Meta(gt=0)] | None = None
    budget: Count | None = None


class MemorySearch(Params, frozen=True):
    method: ClassVar[str] = "memory/search"
    session_id: Identifier
    query: str
    limit: Limit = 10


class RunResume(Params, frozen=True):
    method: ClassVar[str] = "run/resume"
    session_id: Identifier
    interrupt_id: Identifier
    decision: Literal["approve", "deny"]
    payload: Any = None


ALL: tuple[type[Params], ...] = (
    Initialize,
    SessionNew,
    SessionList,
    SessionAttach,
    SessionDetach,
    SessionPrompt,
    SessionCancel,
    SessionFork,
    SessionDelete,
    GoalAdd,
    GoalList,
    GoalClose,
    AutonomySet,
    MemorySearch,
    RunResume,
)
