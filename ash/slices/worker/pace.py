"""How many prompt tokens a step may hold, from how long steps took. Pure."""

from __future__ import annotations

from typing import Final

_WEIGHT: Final = 0.2
"""Of the latest step in the running means: follows a change of load within about five steps."""

_LEAST_TOKENS: Final = 16
"""Prompts go on even where a single decode step takes longer than the stall that is allowed."""


class Pace:
    """Running means of what a decode step and a prompt token cost on this machine right now.

    Args:
        stall_s: how long one step may keep streaming answers waiting.
        batch: the most tokens of a step.
    """

    def __init__(self, *, stall_s: float, batch: int) -> None:
        self._stall_s = stall_s
        self._batch = batch
        self._decode_s = 0.0
        self._token_s = 0.0

    def observe(self, *, decoding: int, prefilled: int, seconds: float) -> None:
        """Count a step of `decoding` sequences and `prefilled` prompt tokens that took `seconds`."""
        if not prefilled:
            self._decode_s = _mean(self._decode_s, seconds)
            return
        # The last tokens of a prompt cost more each than those of a full chunk, and say little.
        if prefilled >= _LEAST_TOKENS:
            rest = max(0.0, seconds - (self._decode_s if decoding else 0.0))
            self._token_s = _mean(self._token_s, rest / prefilled)

    def prompt_tokens(self, *, decoding: int) -> int:
        """The most prompt tokens of the next step: any number when nobody waits for it to end."""
        if not decoding:
            return self._batch
        if not self._token_s:
            return _LEAST_TOKENS
        fitting = int((self._stall_s - self._decode_s) / self._token_s)
        return max(_LEAST_TOKENS, min(self._batch, fitting))


def _mean(old: float, new: float) -> float:
    return new if not old else (1 - _WEIGHT) * old + _WEIGHT * new
