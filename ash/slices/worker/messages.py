"""What the server and a worker say to each other, as frames of ash.ipc.

The first frame to a worker is Configure; it answers Ready or LoadFailed. Every Generate is answered, inside
Step frames, by Begun, any number of Progress and one Ended, or by Refused at any point.
"""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct

from ash.domain.values import GenerateRequest
from ash.slices.spec import SliceSpec

EndReason = Literal["stop", "length", "cancelled"]

UNACKNOWLEDGED_TOKENS: Final = 256
"""A generation whose consumer is this many tokens behind is paused; others go on."""


class Message(Struct, frozen=True, tag=True, array_like=True):
    """Base of what is sent: arrays headed by the class name, since one is sent for every token."""


class Configure(Message, frozen=True):
    """Load `path` as `spec` says; `template` is the jinja2 source, None takes the one inside the file.

    KV states are kept in `states_folder`; None keeps them in RAM only.
    """

    spec: SliceSpec
    path: str
    template: str | None
    states_folder: str | None = None


class Generate(Message, frozen=True):
    id: int
    request: GenerateRequest


class Cancel(Message, frozen=True):
    id: int


class Acknowledge(Message, frozen=True):
    """The consumer has taken `tokens` more tokens of generation `id`."""

    id: int
    tokens: int


class Ping(Message, frozen=True):
    number: int


class Forget(Message, frozen=True):
    """The session was deleted: remove its KV state everywhere."""

    session: str


ToWorker = Configure | Generate | Cancel | Acknowledge | Ping | Forget


class Ready(Message, frozen=True):
    """The model is loaded. Sizes are bytes; `context` is tokens per session, at most the model's own."""

    context: int
    vocabulary: int
    template_source: Literal["configuration", "model file"]
    kv_bytes: int
    weight_bytes: int
    load_s: float
    description: str


class LoadFailed(Message, frozen=True):
    kind: Literal["model_file", "unavailable"]
    reason: str


class Begun(Message, frozen=True):
    """The prompt fits and holds a slot: the numbers of Admitted."""

    id: int
    prompt_tokens: int
    reused_tokens: int
    dropped_messages: int


class Progress(Message, frozen=True):
    """Text to show and the tokens it took, among them those whose text was held back until now."""

    id: int
    text: str
    tokens: int


class Ended(Message, frozen=True):
    id: int
    reason: EndReason
    output_tokens: int
    prefill_s: float
    decode_s: float


class Refused(Message, frozen=True):
    """This generation cannot go on; the worker and every other generation can.

    `limit` is in tokens and belongs to `too_long`.
    """

    id: int
    kind: Literal["too_long", "template", "format", "failed"]
    message: str
    limit: int = 0


Update = Begun | Progress | Ended | Refused


class Step(Message, frozen=True):
    """Everything that one step of the decoder has to tell."""

    updates: list[Update]


class WorkerStatistics(Struct, frozen=True):
    """Counters since the start, and what is held now.

    `unsaved_sessions` have KV state that is not on its way to the disk yet or has not arrived there.
    `step_age_s` is seconds since the running step began, 0 between steps; `busy_s` the sum of all steps.
    """

    steps: int = 0
    step_age_s: float = 0.0
    busy_s: float = 0.0
    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    active: int = 0
    waiting: int = 0
    resident_sessions: int = 0
    unsaved_sessions: int = 0
    preempted: int = 0
    ram_sessions: int = 0
    ram_bytes: int = 0
    disk_sessions: int = 0
    disk_bytes: int = 0


class Pong(Message, frozen=True):
    number: int
    statistics: WorkerStatistics


FromWorker = Ready | LoadFailed | Step | Pong
