"""How many prompt tokens a step may hold, so that those that stream do not wait too long. Pure.

The number is steered, not computed: after each step that was full it is scaled by how far the step was from
the time that is allowed. That needs no model of what a decode step and a prompt token cost, which change with
the number and the length of the sequences and with whatever else uses the machine.
"""

from __future__ import annotations

from typing import Final

_FIRST_TOKENS: Final = 32
_LEAST_TOKENS: Final = 16
"""Prompts go on even where a single decode step takes longer than the stall that is allowed."""

_LARGEST_CHANGE: Final = 2.0
"""One odd step at most halves or doubles the number."""


class Pace:
    """Follows what steps take on this machine right now.

    Args:
        stall_s: how long one step may keep streaming answers waiting.
        batch: the most tokens of a step.

    Attributes:
        stall_s: as given.
    """

    def __init__(self, *, stall_s: float, batch: int) -> None:
        self.stall_s = stall_s
        self._batch = batch
        self._tokens = float(min(_FIRST_TOKENS, batch))

    def observe(self, *, decoding: int, prefilled: int, seconds: float) -> None:
        """Count a step of `decoding` sequences and `prefilled` prompt tokens that took `seconds`."""
        if not decoding or not prefilled:
            return
        is_full = prefilled >= int(self._tokens)
        if is_full or seconds > self.stall_s:
            change = self.stall_s / seconds if seconds > 0 else _LARGEST_CHANGE
            change = max(1 / _LARGEST_CHANGE, min(_LARGEST_CHANGE, change))
            self._tokens = max(_LEAST_TOKENS, min(self._batch, self._tokens * change))

    def prompt_tokens(self, *, decoding: int) -> int:
        """The most prompt tokens of the next step: any number when nobody waits for it to end."""
        return int(self._tokens) if decoding else self._batch
