"""Server-sent events: bytes in, the data of whole events out. Pure.

The rules are those of the HTML standard, section 9.2.6 (https://html.spec.whatwg.org/multipage/
server-sent-events.html): lines end with LF, CR or both; an empty line ends an event; comments and unknown
fields are ignored. Only the field `data` is of interest here.
"""

from __future__ import annotations

import re
from typing import Final

from ash.slices.remote.failure import MalformedStream

EVENT_LIMIT_BYTES: Final = 1 << 20
"""The longest line and the longest event; one chunk of an answer has a few hundred bytes."""

_LINE_END: Final = re.compile(rb"[\r\n]")
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class SseParser:
    """Takes a stream apart however it was cut. Holds at most `limit` bytes of a line and of an event."""

    def __init__(self, *, limit: int = EVENT_LIMIT_BYTES) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._searched = 0
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._first_line = True
        self._after_carriage_return = False

    def feed(self, piece: bytes) -> list[str]:
        """Add bytes and return the data of the events that they complete; bad UTF-8 becomes U+FFFD.

        Raises:
            MalformedStream: a line or an event is longer than the limit.
        """
        self._buffer += piece
        events: list[str] = []
        start = 0
        while end := _LINE_END.search(self._buffer, max(start, self._searched)):
            line = bytes(self._buffer[start : end.start()])
            # CR LF is one end of line, also when the two come in different pieces.
            line_feed_of_pair = end[0] == b"\n" and not line and self._after_carriage_return
            self._after_carriage_return = end[0] == b"\r"
            start = end.end()
            if not line_feed_of_pair:
                self._line(line, events)
        del self._buffer[:start]
        self._searched = len(self._buffer)
        if len(self._buffer) > self._limit:
            raise MalformedStream(f"a line of more than {self._limit} bytes")
        return events

    def _line(self, line: bytes, events: list[str]) -> None:
        if self._first_line:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            self._first_line = False
        if not line:
            if self._data:
                events.append(b"\n".join(self._data).decode("utf-8", "replace"))
            self._data, self._data_bytes = [], 0
            return
        field, _, value = line.partition(b":")
        if field != b"data":
            return
        self._data.append(value.removeprefix(b" "))
        self._data_bytes += len(value) + 1
        if self._data_bytes > self._limit:
            raise MalformedStream(f"an event of more than {self._limit} bytes")
