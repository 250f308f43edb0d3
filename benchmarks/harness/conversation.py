"""A conversation with any system, and when the pieces of its answers arrived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol


class SystemFailedError(Exception):
    """A system under test could not be started, or has ended."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that arrived at once. `at` is in seconds of `time.perf_counter`, `characters` its length."""

    at: float
    characters: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as the client saw it.

    Attributes:
        asked_at: when the request was sent, in seconds of `time.perf_counter`.
        pieces: what arrived, in order.
        text: all of it.
        tokens: output tokens as the system counts them; where it does not say, one for each piece.
        prompt_tokens: tokens of the whole prompt; None where the system does not say.
        cached_tokens: those of the prompt that were not computed again; None where it does not say.
        failure: why there is no whole answer; None where there is one.
    """

    asked_at: float
    pieces: tuple[Piece, ...]
    text: str
    tokens: int
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    failure: str | None = None

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the request to the first text."""
        return self.pieces[0].at - self.asked_at if self.pieces else None

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [later.at - earlier.at for earlier, later in pairwise(self.pieces)]

    def tokens_between(self, begin: float, end: float) -> float:
        """Tokens that arrived in (begin, end], by their share of the characters."""
        inside = sum(piece.characters for piece in self.pieces if begin < piece.at <= end)
        whole = sum(piece.characters for piece in self.pieces)
        return self.tokens * inside / whole if whole else 0.0


class Conversation(Protocol):
    """One session with its history. Questions are asked one after the other."""

    async def ask(self, text: str) -> Answer:
        """Ask and wait for the whole answer; what goes wrong is in `Answer.failure`."""

    async def close(self) -> None: ...


class System(Protocol):
    """Something that holds conversations: Ash, or a peer."""

    @property
    def name(self) -> str: ...

    async def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            SystemFailedError: it does not; the message holds the end of what it printed.
        """

    async def stop(self) -> None: ...

    def process_ids(self) -> list[int]:
        """Roots of its process trees."""

    async def converse(self, count: int) -> Sequence[Conversation]:
        """As many new conversations, each on a connection of its own."""
