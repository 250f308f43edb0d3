"""What can go wrong with one request. None of these leaves the package: the engine raises domain errors."""

from __future__ import annotations

from enum import Enum
from typing import Final

from ash.domain.errors import SliceError

MESSAGE_CHARACTERS: Final = 300
"""Foreign text is cut to this length before it enters an error message."""


class Retry(Enum):
    """Whether the same request may be sent again while nothing of its answer was shown."""

    NEVER = "never"
    ONCE = "once"
    ALLOWED = "allowed"


class AttemptFailed(Exception):
    """One request brought no whole answer.

    Attributes:
        error: what to raise unless a retry succeeds.
        retry: whether to send it again.
        retry_after_s: the wait that the endpoint asked for, seconds; None if it did not.
        endpoint_down: whether it counts for the circuit breaker.
    """

    def __init__(
        self,
        error: SliceError,
        *,
        retry: Retry = Retry.NEVER,
        retry_after_s: float | None = None,
        endpoint_down: bool = True,
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry = retry
        self.retry_after_s = retry_after_s
        self.endpoint_down = endpoint_down


class ContextExceeded(Exception):
    """The endpoint refused the prompt as too long.

    Attributes:
        prompt_tokens: what it counted; None if it did not say.
        context: what it takes, prompt and answer; None if it did not say.
    """

    def __init__(self, message: str, *, prompt_tokens: int | None = None, context: int | None = None) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.context = context


class MalformedStream(Exception):
    """Bytes that are no stream of chat completion chunks."""


def printable(text: str) -> str:
    """Foreign `text` fit for an error message: one line, no control characters, bounded."""
    # Cut first: the text may be megabytes.
    cut = text[: 4 * MESSAGE_CHARACTERS]
    line = " ".join("".join(c if c.isprintable() else " " for c in cut).split())
    return line if len(line) <= MESSAGE_CHARACTERS else line[: MESSAGE_CHARACTERS - 1] + "…"
