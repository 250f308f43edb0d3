"""How many prompt tokens a step may hold, so that those that stream do not wait too long. Pure."""

from __future__ import annotations

from typing import Final

from ash.slices.worker.schedule import Allowance

_FIRST_TOKENS: Final = 32
_LEAST_TOKENS: Final = 16
"""Prompts go on even where a single decode step takes longer than the stall that is allowed."""

_LARGEST_CHANGE: Final = 2.0
"""One odd step at most halves or doubles the number."""

_CLOCK_S: Final = 1e-4
"""No step is shorter; less is a clock that did not move."""

_WEIGHT: Final = 0.3
"""Of the latest step in the running mean: follows a change of load within a few steps."""


class Pace:
    """Follows what steps take on this machine right now.

    Args:
        stall_s: how long streaming answers may wait for their next token while prompts come in.
        batch: the most tokens of a step.

    Attributes:
        stall_s: as given.
    """

    def __init__(self, *, stall_s: float, batch: int) -> None:
        self.stall_s = stall_s
        self._batch = batch
        self._tokens_per_s = _FIRST_TOKENS / stall_s
        self._beside = float(min(_FIRST_TOKENS, batch))

    def observe(self, *, decoding: int, prefilled: int, seconds: float) -> None:
        """Count a step of `decoding` sequences and `prefilled` prompt tokens that took `seconds`."""
        if prefilled and decoding:
            self._steer(prefilled, seconds)
        elif prefilled >= _LEAST_TOKENS:
            rate = prefilled / max(seconds, _CLOCK_S)
            self._tokens_per_s += _WEIGHT * (rate - self._tokens_per_s)

    def allowance(self, *, waited_s: float) -> Allowance:
        """Prompt tokens of the next step, when those that stream got their last token `waited_s` ago."""
        left = max(0.0, 1.0 - waited_s / self.stall_s)
        alone = int(self._tokens_per_s * self.stall_s * left)
        # A step with both takes half of the stall at most, so it may begin until half of that is over.
        beside = int(self._beside) if left > 0.5 else 0
        return Allowance(alone=alone, beside=beside)

    def _steer(self, prefilled: int, seconds: float) -> None:
        """Scale the prompt tokens beside others by how far the step was from the time that is allowed.

        That needs no model of what a decode step and a prompt token cost, which change with the number and
        the length of the sequences and with whatever else uses the machine.
        """
        allowed = self.stall_s / 2
        is_full = prefilled >= int(self._beside)
        if is_full or seconds > allowed:
            change = allowed / seconds if seconds > 0 else _LARGEST_CHANGE
            change = max(1 / _LARGEST_CHANGE, min(_LARGEST_CHANGE, change))
            self._beside = max(_LEAST_TOKENS, min(self._batch, self._beside * change))
