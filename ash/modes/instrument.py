"""The two observers behind the Observer port: what a text is, and where an input pulls."""

from __future__ import annotations

from collections.abc import Sequence

from ash.domain.values import ModeEstimate
from ash.modes.attribution import pull
from ash.modes.observer import ModeObserver, RequestObserver


class Instrument:
    """Port Observer. Pure: the same text gives the same answers."""

    def __init__(self, modes: ModeObserver, requests: RequestObserver) -> None:
        self._modes = modes
        self._requests = requests

    def observe(self, vector: Sequence[float], text: str) -> ModeEstimate:
        """The mode of `text`."""
        return self._modes.observe(vector, text)

    def pull(self, vector: Sequence[float], text: str) -> dict[str, float]:
        """By mode, how likely the input `text` asks for it or resembles it."""
        asked = self._requests.asked(vector, text)
        return pull(asked, self._modes.observe(vector, text).probabilities, text)
