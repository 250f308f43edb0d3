"""From token bytes to text that may be shown: whole characters, and nothing of a stop string. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from msgspec import Struct


class Shown(Struct, frozen=True):
    """What can be shown now; `stopped` once a stop string is complete."""

    text: str
    stopped: bool


class StopStrings:
    """Finds the first stop string in a text that comes in pieces.

    The first one is the one that is complete first; of several that end together, the longest. Text that
    could still become a stop string is held back until it is decided, so the result does not depend on how
    the text was cut.

    Args:
        stops: the strings; empty ones are ignored.
        shown: text in front of the first piece that was already shown. A stop string that begins in it is
            found, what was shown of it is not taken back.
    """

    def __init__(self, stops: Iterable[str], *, shown: str = "") -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        longest = max(map(len, self._stops), default=0)
        self._buffer = shown[-(longest - 1) :] if longest > 1 else ""
        self._already_shown = len(self._buffer)

    def feed(self, text: str) -> Shown:
        """Add `text` and return what has become showable."""
        self._buffer += text
        found = [
            (start + len(stop), start) for stop in self._stops if (start := self._buffer.find(stop)) >= 0
        ]
        if found:
            _, start = min(found)
            return Shown(self._buffer[self._already_shown : start], stopped=True)
        undecided = self._undecided()
        decided = len(self._buffer) - undecided
        shown = self._buffer[self._already_shown : decided]
        # Only what may still be the beginning of a stop string has to be remembered.
        self._buffer = self._buffer[decided:]
        self._already_shown = max(0, self._already_shown - decided)
        return Shown(shown, stopped=False)

    def finish(self) -> str:
        """The text held back: it did not become a stop string."""
        return self._buffer[self._already_shown :]

    def _undecided(self) -> int:
        """Length of the longest end of the buffer that begins a stop string."""
        return max(
            (
                length
                for stop in self._stops
                for length in range(1, min(len(stop), len(self._buffer) + 1))
                if self._buffer.endswith(stop[:length])
            ),
            default=0,
        )


class OutputText:
    """Token bytes in, showable text out.

    Bytes that are no UTF-8 become U+FFFD; a character that is not complete yet waits for its other bytes.

    Args:
        stops: what ends the text.
        lead: left out where the text begins with it.
    """

    def __init__(self, stops: StopStrings, *, lead: str = "") -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = stops
        self._lead = lead
        self._start = ""

    def feed(self, piece: bytes) -> Shown:
        """Add the bytes of one token."""
        return self._stops.feed(self._without_lead(self._decoder.decode(piece)))

    def finish(self) -> str:
        """What is left at the end of the output, of a cut character and of a stop string begun."""
        last = self._stops.feed(self._start + self._decoder.decode(b"", final=True))
        self._start = ""
        return last.text if last.stopped else last.text + self._stops.finish()

    def _without_lead(self, text: str) -> str:
        if not self._lead:
            return text
        text = self._start + text
        if len(text) < len(self._lead) and self._lead.startswith(text):
            self._start = text
            return ""
        lead, self._lead, self._start = self._lead, "", ""
        return text.removeprefix(lead)
