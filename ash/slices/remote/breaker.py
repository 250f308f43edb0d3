"""A circuit breaker: leave an endpoint alone while it is down. Pure; the clock is passed in.

The states are those of M. Nygard, Release It! (2nd edition, 2018), chapter 5: closed, requests pass; open,
none does; half-open, one does, and decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half-open"]


class Permit:
    """Leave for one request. The first of `succeeded`, `failed`, `abandoned` ends it; later ones do nothing.

    What is reported after the breaker has changed its state is out of date and changes nothing.
    """

    def __init__(self, breaker: CircuitBreaker, era: int) -> None:
        self._breaker = breaker
        self._era = era
        self._ended = False

    def answered(self) -> None:
        """The endpoint began to answer: enough for a trial, which closes the breaker."""
        if not self._ended and self._breaker.era == self._era:
            self._era = self._breaker.trial_answered()

    def succeeded(self) -> None:
        """The answer is whole."""
        self.answered()
        if self._end():
            self._breaker.count(failed=False)

    def failed(self) -> None:
        """The endpoint failed."""
        if self._end():
            self._breaker.count(failed=True)

    def abandoned(self) -> None:
        """Nothing was learnt of the endpoint: the request was cancelled, or told to wait."""
        if self._end():
            self._breaker.release_trial()

    def _end(self) -> bool:
        current = not self._ended and self._breaker.era == self._era
        self._ended = True
        return current


class CircuitBreaker:
    """Opens after failures in a row, and lets one trial through from time to time.

    Args:
        failures: that many in a row open it.
        reset_s: seconds after which an open breaker lets a trial through.
        monotonic: seconds of a clock that never goes back.

    Attributes:
        era: counts the changes of state.
    """

    def __init__(self, *, failures: int, reset_s: float, monotonic: Callable[[], float]) -> None:
        self._threshold = failures
        self._reset_s = reset_s
        self._monotonic = monotonic
        self._failures = 0
        self._opened_s: float | None = None
        self._trial_running = False
        self.era = 0

    @property
    def state(self) -> State:
        """What the next request meets."""
        if self._opened_s is None:
            return "closed"
        return "half-open" if self.remaining_s == 0 else "open"

    @property
    def remaining_s(self) -> float:
        """Seconds until a trial is let through; 0 unless open."""
        if self._opened_s is None:
            return 0.0
        return max(0.0, self._opened_s + self._reset_s - self._monotonic())

    def admit(self) -> Permit | None:
        """Leave for one request; None if the endpoint is to be left alone."""
        match self.state:
            case "closed":
                return Permit(self, self.era)
            case "half-open" if not self._trial_running:
                self._trial_running = True
                return Permit(self, self.era)
            case _:
                return None

    def trial_answered(self) -> int:
        """Close after a trial; returns the era, a new one if the state has changed."""
        if self._opened_s is not None:
            self._change(None)
        return self.era

    def count(self, *, failed: bool) -> None:
        """Note how a request of the present era ended."""
        self._failures = self._failures + 1 if failed else 0
        if failed and (self._opened_s is not None or self._failures >= self._threshold):
            self._change(self._monotonic())

    def release_trial(self) -> None:
        """Let the next request be the trial."""
        self._trial_running = False

    def _change(self, opened_s: float | None) -> None:
        self._opened_s = opened_s
        self._failures = 0
        self._trial_running = False
        self.era += 1
