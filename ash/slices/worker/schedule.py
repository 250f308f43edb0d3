"""Which tokens the next decode call holds. Pure.

Each sequence that decodes gets its one token; what room is left goes to prompts. Prompts go shortest first,
since a short one is answered soon and hardly delays the others, but each step of waiting counts as much as
AGEING_TOKENS fewer tokens: a prompt of n tokens is passed only by those that arrive within n / AGEING_TOKENS
steps of it, so none starves (shortest remaining processing time with ageing).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

AGEING_TOKENS: Final = 16
"""A prompt of 2,000 tokens is overtaken for at most 125 steps, about four seconds at 32 steps a second."""


class Decoding(Struct, frozen=True):
    """A sequence that wants its next token. `waited` is steps since it was last served."""

    key: int
    waited: int = 0


class Prefill(Struct, frozen=True):
    """A prompt with `remaining` tokens to compute, `waited` steps after it arrived as number `arrival`."""

    key: int
    remaining: int
    arrival: int
    waited: int = 0


class StepPlan(Struct, frozen=True):
    """Keys that decode one token each, and (key, tokens) of prompts, in the order of the batch."""

    decode: tuple[int, ...]
    prefill: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        """Tokens in the whole step."""
        return len(self.decode) + sum(tokens for _, tokens in self.prefill)


def plan_step(
    decoding: Sequence[Decoding], prefills: Sequence[Prefill], *, batch: int, prefill_chunk: int
) -> StepPlan:
    """Choose the tokens of one step.

    Args:
        decoding: sequences that decode.
        prefills: prompts that are not in the KV cache yet; `remaining` of each is at least 1.
        batch: the most tokens of a step, at least 2.
        prefill_chunk: the most prompt tokens of a step while something decodes, at least 1.

    When there are more sequences than `batch`, those that waited longest come first. One place is kept for
    prompts, so that neither kind can shut out the other.
    """
    places = batch - 1 if prefills else batch
    longest_waiting = sorted(decoding, key=lambda entry: -entry.waited)[:places]
    room = batch - len(longest_waiting)
    if longest_waiting:
        room = min(room, prefill_chunk)
    chunks: list[tuple[int, int]] = []
    for prompt in sorted(prefills, key=_urgency):
        if room == 0:
            break
        tokens = min(room, prompt.remaining)
        chunks.append((prompt.key, tokens))
        room -= tokens
    return StepPlan(decode=tuple(entry.key for entry in longest_waiting), prefill=tuple(chunks))


def _urgency(prompt: Prefill) -> tuple[int, int]:
    return (prompt.remaining - AGEING_TOKENS * prompt.waited, prompt.arrival)
