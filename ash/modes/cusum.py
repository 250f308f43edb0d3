"""A second opinion on shifts: cumulative sums of log odds, with no model of how modes follow each other.

One sum for each mode other than the established one (Page, Continuous inspection schemes, Biometrika 1954):
a message adds the log odds of that mode against the established one, capped, less a drift; the sum never
falls below 0, and at `threshold` it alarms. It is a cross-check of the hidden Markov model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec import Struct

from ash.domain.values import MODES
from ash.modes.filter import Shift

_SMALLEST = 1e-9
"""Probability below which an estimate does not count as more certain."""


class CusumState(Struct, frozen=True):
    """Everything the detector remembers.

    Attributes:
        established: the mode the session is known to be in; None before the first alarm.
        sums: of each of MODES, in that order.
        starts: seq of the message with which each sum last rose from 0; None where it is 0.
    """

    established: str | None = None
    sums: tuple[float, ...] = (0.0,) * len(MODES)
    starts: tuple[int | None, ...] = (None,) * len(MODES)


class Cusum:
    """The detector's constants and its step; `CusumState` is passed through."""

    def __init__(self, *, threshold: float = 8.0, drift: float = 1.0, cap: float = 4.0) -> None:
        """Fix the constants, all in nats.

        Args:
            threshold: sum that alarms.
            drift: taken off each message's log odds, so that doubtful messages do not add up.
            cap: the most that one message counts either way; below `threshold`, so that no single one alarms.

        Raises:
            ValueError: a constant is out of its range.
        """
        if not 0 <= drift < cap:
            raise ValueError(f"drift is {drift}; it must be at least 0 and below the cap of {cap}")
        if not cap - drift < threshold:
            raise ValueError(
                f"threshold is {threshold}; one message may add {cap - drift}, want more than that"
            )
        self._threshold = threshold
        self._drift = drift
        self._cap = cap

    def step(
        self, state: CusumState, probabilities: Mapping[str, float], seq: int
    ) -> tuple[CusumState, Shift | None]:
        """Take in the estimate of the message at `seq`.

        Args:
            state: after the message before.
            probabilities: the head's, over MODES.
            seq: the message's place in the log.
        """
        logs = [math.log(max(_SMALLEST, probabilities[mode])) for mode in MODES]
        sums: list[float] = []
        starts: list[int | None] = []
        for place, mode in enumerate(MODES):
            if mode == state.established:
                sums.append(0.0)
                starts.append(None)
                continue
            # Before any mode is established, each is weighed against the best of the others.
            against = (
                logs[MODES.index(state.established)]
                if state.established is not None
                else max(value for other, value in enumerate(logs) if other != place)
            )
            odds = max(-self._cap, min(self._cap, logs[place] - against))
            total = max(0.0, state.sums[place] + odds - self._drift)
            sums.append(total)
            starts.append((state.starts[place] if state.sums[place] > 0 else seq) if total > 0 else None)
        best = max(range(len(MODES)), key=sums.__getitem__)
        if sums[best] < self._threshold:
            return CusumState(state.established, tuple(sums), tuple(starts)), None
        onset = starts[best]
        assert onset is not None
        new = CusumState(MODES[best])
        if state.established is None:
            return new, None
        return new, Shift(state.established, MODES[best], onset, seq)
