"""How fast a slice was lately: the measured rates that the router prices a switch with. Pure."""

from __future__ import annotations

from typing import Final

from ash.domain.values import Admitted, Finished, SliceRates

_KEPT: Final = 0.8
"""Weight of the past against the newest measurement: about the last five count."""


class _Rate:
    """Tokens per second over the past, where older answers count less and longer ones more."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        if tokens > 0 and seconds > 0:
            self._tokens = _KEPT * self._tokens + tokens
            self._seconds = _KEPT * self._seconds + seconds

    @property
    def value(self) -> float | None:
        return self._tokens / self._seconds if self._seconds > 0 else None


class RateMeter:
    """The rates of one slice."""

    def __init__(self) -> None:
        self._load_s: float | None = None
        self._prefill = _Rate()
        self._decode = _Rate()

    def loaded(self, seconds: float) -> None:
        """A load took so long."""
        before = self._load_s
        self._load_s = seconds if before is None else _KEPT * before + (1 - _KEPT) * seconds

    def answered(self, admitted: Admitted, finished: Finished) -> None:
        """A generation ended. The first token belongs to the prefill, whose last step gives it."""
        # An endpoint may know its counts only at the end.
        prompt = admitted.prompt_tokens if finished.prompt_tokens is None else finished.prompt_tokens
        reused = admitted.reused_tokens if finished.reused_tokens is None else finished.reused_tokens
        self._prefill.add(prompt - reused, finished.prefill_s)
        self._decode.add(finished.output_tokens - 1, finished.decode_s)

    def rates(self, resident_bytes: int | None) -> SliceRates | None:
        """What is known; None while nothing is."""
        known = SliceRates(self._load_s, self._prefill.value, self._decode.value, resident_bytes)
        return None if known == SliceRates() else known
