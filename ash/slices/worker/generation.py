"""One generation inside the worker: its prompt, its place, and what it has produced."""

from __future__ import annotations

from msgspec import Struct

from ash.domain.values import Sampling
from ash.slices.worker.inference import Constraint, Sampler
from ash.slices.worker.messages import UNACKNOWLEDGED_TOKENS
from ash.slices.worker.sequence import TokenisedText, TokenSequence
from ash.slices.worker.slots import Resident
from ash.slices.worker.text import OutputText, StopStrings


class Prompt(Struct, frozen=True):
    """A prompt that fits the context; `max_output` tokens of answer fit behind it.

    `answer_lead` is whitespace that the model writes before its answer; the first `shared_tokens` tokens
    are those of every conversation with the same system prompt.
    """

    text: TokenisedText
    dropped_messages: int
    max_output: int
    continuation_tokens: tuple[int, ...] = ()
    answer_lead: str = ""
    shared_tokens: int = 0

    @property
    def shared(self) -> tuple[int, ...]:
        """The tokens that other conversations begin with too."""
        return self.text.tokens[: self.shared_tokens]


class Generation:
    """The state of one generation; belongs to the decode thread once it was submitted.

    Args:
        id: the number the server gave it.
        session: whose KV cache it extends.
        prompt: what to continue.
        sampling: how tokens are drawn.
        stop: strings that end the answer.
        continuation: the end of the prompt that the client has already been shown.
        constraint: the format of the answer, with the continuation counted.
    """

    def __init__(
        self,
        id: int,  # noqa: A002 - the protocol's word for it
        session: str,
        prompt: Prompt,
        sampling: Sampling,
        *,
        stop: tuple[str, ...] = (),
        continuation: str = "",
        constraint: Constraint | None = None,
    ) -> None:
        self.id = id
        self.session = session
        self.prompt = prompt
        self.sampling = sampling
        self.constraint = constraint
        self.output = OutputText(StopStrings(stop, shown=continuation), lead=prompt.answer_lead)
        self.output_tokens = 0
        self.unsent_tokens = 0
        self.unacknowledged_tokens = 0
        self.arrival = 0
        self.arrived_step = 0
        self.served_step = 0
        self.admitted_at = 0.0
        self.first_token_at: float | None = None
        self.resident: Resident | None = None
        self.sampler: Sampler | None = None
        # The common beginning that this generation computes for others too; empty when it is kept already.
        self.computes_prefix: tuple[int, ...] = ()
        # What a preempted generation takes along.
        self.sequence: TokenSequence | None = None

    @property
    def held(self) -> Resident:
        """Its slot; only for a generation that has one."""
        assert self.resident is not None
        return self.resident

    @property
    def is_decoding(self) -> bool:
        """True when only the token sampled last is missing in the KV cache."""
        return self.first_token_at is not None and self.held.sequence.pending == 1

    @property
    def is_paused(self) -> bool:
        """True while the consumer is too far behind."""
        return self.unacknowledged_tokens > UNACKNOWLEDGED_TOKENS
