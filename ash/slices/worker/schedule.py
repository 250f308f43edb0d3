"""Which tokens the next decode call holds. Pure.

Prompts go shortest first, since a short one is answered soon and hardly delays the others, but each step of
waiting counts as much as AGEING_TOKENS fewer tokens: a prompt of n tokens is passed only by those that arrive
within n / AGEING_TOKENS steps of it, so none starves (shortest remaining processing time with ageing).

Sequences that decode wait while prompts are computed that can be finished before the next tokens are due. One
prompt at a time costs no more than all at once (measured: 293 to 302 tokens a second for one to sixteen
prompts of 30 tokens in a batch), and the first ones are answered earlier. A prompt too long for that is
computed in pieces beside the tokens of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

AGEING_TOKENS: Final = 16
"""A prompt of 2,000 tokens is overtaken for at most 125 steps, about four seconds at 32 steps a second."""


STEP_TOKENS: Final = 24
"""Shorter prompts share a step: a step of fewer tokens takes hardly less time."""


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


class Allowance(Struct, frozen=True):
    """How many prompt tokens a step may hold while sequences decode.

    Attributes:
        alone: in steps of prompts only, until the next tokens of the others are due.
        beside: in a step that has a token of each of the others, too.
    """

    alone: int
    beside: int


class StepPlan(Struct, frozen=True):
    """Keys that decode one token each, and (key, tokens) of prompts, in the order of the batch."""

    decode: tuple[int, ...]
    prefill: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        """Tokens in the whole step."""
        return len(self.decode) + sum(tokens for _, tokens in self.prefill)


def plan_step(
    decoding: Sequence[Decoding], prefills: Sequence[Prefill], *, batch: int, allowance: Allowance
) -> StepPlan:
    """Choose the tokens of one step.

    Args:
        decoding: sequences that decode.
        prefills: prompts that are not in the KV cache yet; `remaining` of each is at least 1.
        batch: the most tokens of a step, at least 2.
        allowance: of prompt tokens while something decodes.

    When there are more sequences than `batch`, those that waited longest come first. One place is kept for
    prompts, so that neither kind can shut out the other.
    """
    prompts = sorted(prefills, key=_urgency)
    if not decoding:
        return StepPlan((), _chunks(_few(prompts, batch), batch))
    if prompts and prompts[0].remaining <= min(allowance.alone, batch):
        return StepPlan((), _chunks(_few(prompts, min(allowance.alone, batch)), batch))
    places = batch - 1 if prompts else batch
    longest_waiting = sorted(decoding, key=lambda entry: -entry.waited)[:places]
    room = min(batch - len(longest_waiting), allowance.beside)
    return StepPlan(tuple(entry.key for entry in longest_waiting), _chunks(prompts, room))


def _few(prompts: Sequence[Prefill], room: int) -> Sequence[Prefill]:
    """The first prompt, and those behind it that it takes to fill a step and that fit `room` as a whole."""
    count, tokens = min(1, len(prompts)), sum(prompt.remaining for prompt in prompts[:1])
    while count < len(prompts) and tokens < STEP_TOKENS and tokens + prompts[count].remaining <= room:
        tokens += prompts[count].remaining
        count += 1
    return prompts[:count]


def _chunks(prompts: Sequence[Prefill], room: int) -> tuple[tuple[int, int], ...]:
    chunks: list[tuple[int, int]] = []
    for prompt in prompts:
        if room == 0:
            break
        tokens = min(room, prompt.remaining)
        chunks.append((prompt.key, tokens))
        room -= tokens
    return tuple(chunks)


def _urgency(prompt: Prefill) -> tuple[int, int]:
    return (prompt.remaining - AGEING_TOKENS * prompt.waited, prompt.arrival)
