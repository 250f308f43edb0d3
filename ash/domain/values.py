"""Values that cross module borders: prompts, routes, modes, and what an engine yields."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from msgspec import Struct

MODES = ("analytic", "creative", "conversational")


class Role(StrEnum):
    """What a token may do: owner all, member its own sessions, observer read only."""

    OWNER = "owner"
    MEMBER = "member"
    OBSERVER = "observer"


class Principal(Struct, frozen=True):
    """Who is behind a connection; comes from the token alone."""

    name: str
    role: Role
    token_id: str


class ChatMessage(Struct, frozen=True):
    """One message of a prompt. `id` is the message id of the log, empty for the persona."""

    role: Literal["system", "user", "assistant"]
    text: str
    id: str = ""


class Sampling(Struct, frozen=True):
    """How the next token is drawn. `seed` None draws a fresh one; `temperature` 0 is greedy.

    `repeat_penalty` looks back over the last 64 tokens (llama.cpp's default window).
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.1
    max_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] = ()


class OutputFormat(Struct, frozen=True):
    """What an answer has to look like: every token is drawn among those that the format allows.

    `definition` is a JSON schema, a Lark grammar or a regular expression, in UTF-8.
    """

    syntax: Literal["json_schema", "lark", "regex"]
    definition: str


class GenerateRequest(Struct, frozen=True):
    """What a run asks of an engine.

    `messages` is the whole prompt in order, the persona first as `system`; it must end with a user
    message. Neighbours may have the same role: engines join those that they do not leave out. `sampling` None
    takes the slice's own defaults. `session_id` lets the engine reuse the KV cache of the session's earlier
    turns.
    `continuation` is assistant text that was already streamed (a run retried after a crash): the engine
    goes on behind it and does not yield it again. `format` constrains the answer, the continuation included.
    """

    run_id: str
    session_id: str
    messages: tuple[ChatMessage, ...]
    sampling: Sampling | None = None
    continuation: str = ""
    format: OutputFormat | None = None


class Admitted(Struct, frozen=True, tag="admitted"):
    """First item of a generation: the prompt was tokenised and fits.

    `dropped_messages` counts the oldest non-system messages that were left out to make it fit.
    """

    prompt_tokens: int
    reused_tokens: int
    dropped_messages: int = 0


class Delta(Struct, frozen=True, tag="delta"):
    """Text to show, in order, never empty; never part of a stop string, never half a UTF-8 character."""

    text: str


class Finished(Struct, frozen=True, tag="finished"):
    """Last item. `prefill_s` and `decode_s` are seconds inside the engine.

    `prompt_tokens` and `reused_tokens` replace those of Admitted where they are given: some remote endpoints
    count at the end, and Admitted then held an estimate.
    """

    reason: Literal["stop", "length", "cancelled"]
    output_tokens: int
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: int | None = None
    reused_tokens: int | None = None


class SliceNotice(Struct, frozen=True, tag="notice"):
    """Something happened to a slice while the run used it; becomes an `ash.slice` event."""

    slice: str
    what: Literal["loaded", "evicted", "crashed", "fell back"]
    reason: str
    to: str | None = None


EngineItem = Admitted | Delta | Finished
SliceItem = Admitted | Delta | Finished | SliceNotice


class SliceRates(Struct, frozen=True):
    """Measured speeds and size of a slice; None where nothing was measured yet.

    Attributes:
        load_s: seconds of a load.
        prefill_tokens_s: prompt tokens per second that one session sees.
        decode_tokens_s: tokens of the answer per second that one session sees.
        bytes: what the slice takes in memory, estimated until it was measured.
    """

    load_s: float | None = None
    prefill_tokens_s: float | None = None
    decode_tokens_s: float | None = None
    bytes: int | None = None


class SliceFacts(Struct, frozen=True):
    """What the policy may know of a slice. `context` is tokens per session; `rates` None before any use."""

    name: str
    tier: Literal["nano", "turbo"]
    context: int
    vision: bool
    resident: bool
    rates: SliceRates | None = None


class Situation(Struct, frozen=True):
    """What the policy knows of the session beside the text.

    `current` is the slice of the last turn (None for a new session), `pinned` the user's choice,
    `in_tool_loop` true between a tool call and its answer, `wants_vision` true with an image.
    """

    current: str | None
    pinned: str | None
    in_tool_loop: bool
    wants_vision: bool
    history_tokens: int
    slices: tuple[SliceFacts, ...]


class Route(Struct, frozen=True):
    """A routing decision. `probabilities` by intent; `alternatives` name the slices not taken and why."""

    slice: str
    intent: str
    probabilities: dict[str, float]
    alternatives: tuple[dict[str, str | float], ...]
    switched: bool
    reason: str


class ModeEstimate(Struct, frozen=True):
    """A head's opinion of one text, before any filter. Probabilities sum to 1 over MODES."""

    probabilities: dict[str, float]
    genre: str | None

    @property
    def mode(self) -> str:
        """The most probable mode."""
        return max(self.probabilities, key=self.probabilities.__getitem__)


class SessionRow(Struct, frozen=True):
    """A session as the projections know it. Times are milliseconds since the epoch."""

    session_id: str
    title: str
    owner: str
    persona: str | None
    pinned_slice: str | None
    state: str
    mode: str | None
    slice: str | None
    head_seq: int
    created_at: int
    updated_at: int


class RunRow(Struct, frozen=True):
    """A run as the projections know it. `state`: running, success, cancelled, interrupt, error."""

    session_id: str
    run_id: str
    origin: str
    state: str
    input_message_id: str | None
    slice: str | None
    intent: str | None
    error_code: str | None
    started_seq: int
    ended_seq: int | None
    input_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None


class MessageRow(Struct, frozen=True):
    """A finished message. `seq` is that of its last event, so rows order as the log does."""

    session_id: str
    message_id: str
    run_id: str | None
    role: str
    text: str
    seq: int
    ts: int


class Match(Struct, frozen=True):
    """A full-text match; `snippet` marks hits with [ and ]; `score` is bm25, lower is better."""

    session_id: str
    message_id: str
    role: str
    seq: int
    ts: int
    snippet: str
    score: float
