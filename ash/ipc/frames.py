"""Frames of the channel between the server and a child process: bytes in, messages out; no I/O.

A frame is a 4-byte big-endian length and as many bytes of MessagePack. The length comes first so that a
reader can refuse a frame before it buffers it, and so that a cut stream is told from a complete one.
"""

from __future__ import annotations

from typing import Any, Final, Generic, TypeVar

import msgspec

from ash.domain.errors import FrameError

Received = TypeVar("Received")

HEADER_BYTES: Final = 4
MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
"""Far above any prompt that fits a context, far below what would exhaust memory."""


class FrameEncoder:
    """Turns messages into frames. Not thread safe: one per writer."""

    def __init__(self, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, message: object) -> bytes:
        """The frame that carries `message` (a msgspec struct or builtin values).

        Raises:
            FrameError: the message is longer than a frame may be, or holds text that has no UTF-8.
        """
        try:
            payload = self._encoder.encode(message)
        except UnicodeEncodeError as error:
            raise FrameError(
                f"a {type(message).__name__} holds text that has no UTF-8 (a lone surrogate): {error.reason}"
            ) from error
        if len(payload) > self._max_frame_bytes:
            raise FrameError(
                f"a {type(message).__name__} of {len(payload)} bytes does not fit a frame of at most "
                f"{self._max_frame_bytes} bytes; send it in parts"
            )
        return len(payload).to_bytes(HEADER_BYTES, "big") + payload


class FrameDecoder(Generic[Received]):
    """Turns a stream of bytes, cut anywhere, into messages.

    Args:
        payload_type: what each frame holds; anything msgspec can decode, also a union of tagged structs.
        max_frame_bytes: longer frames are refused as soon as their header has been read.
    """

    def __init__(self, payload_type: Any, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(payload_type)
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Received]:
        """Every message that is complete with `data`, in order.

        Raises:
            FrameError: a frame is too long or does not hold a message of the protocol. The stream cannot
                be followed any further: close it.
        """
        self._buffer += data
        messages: list[Received] = []
        start = 0
        while len(self._buffer) - start >= HEADER_BYTES:
            body = start + HEADER_BYTES
            length = int.from_bytes(self._buffer[start:body], "big")
            if length > self._max_frame_bytes:
                raise FrameError(
                    f"a frame announces {length} bytes, the limit is {self._max_frame_bytes}: "
                    "the other end does not speak this protocol"
                )
            if len(self._buffer) - body < length:
                break
            start = body + length
            messages.append(self._decode(bytes(self._buffer[body:start])))
        del self._buffer[:start]
        return messages

    def finish(self) -> None:
        """Say that the stream has ended.

        Raises:
            FrameError: it ended inside a frame.
        """
        if self._buffer:
            raise FrameError(f"the stream ended inside a frame, {len(self._buffer)} bytes into it")

    def _decode(self, payload: bytes) -> Received:
        try:
            return self._decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FrameError(f"a frame of {len(payload)} bytes is not a message: {error}") from error
