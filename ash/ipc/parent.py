"""The child's end of the channel: blocking, for a process that has its own threads and no event loop."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any, Final, Generic, TypeVar

from ash.ipc.frames import MAX_FRAME_BYTES, FrameDecoder, FrameEncoder

Received = TypeVar("Received")

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_READ_BYTES: Final = 256 * 1024


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends (prctl(2), Linux).

    A parent that died before this call is noticed as the end of the channel.

    Raises:
        OSError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")


class ParentConnection(Generic[Received]):
    """Frames from and to the parent. `messages` belongs to one thread, `send` may be called from any."""

    def __init__(
        self, file_descriptor: int, payload_type: Any, *, max_frame_bytes: int = MAX_FRAME_BYTES
    ) -> None:
        self._socket = socket.socket(fileno=file_descriptor)
        self._decoder: FrameDecoder[Received] = FrameDecoder(payload_type, max_frame_bytes=max_frame_bytes)
        self._encoder = FrameEncoder(max_frame_bytes=max_frame_bytes)
        self._writing = threading.Lock()

    def messages(self) -> Iterator[Received]:
        """Every message until the parent closes the channel or dies.

        Raises:
            FrameError: the parent sent something that is no frame, or was cut off inside one.
        """
        while data := self._receive():
            yield from self._decoder.feed(data)
        self._decoder.finish()

    def send(self, message: object) -> None:
        """Write one message; blocks while the parent does not read.

        Raises:
            FrameError: the message is too long.
            OSError: the parent is gone.
        """
        with self._writing:
            self._socket.sendall(self._encoder.encode(message))

    def close(self) -> None:
        """Close the channel: the parent reads its end."""
        self._socket.close()

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(_READ_BYTES)
        except ConnectionResetError:
            # The parent died with unread bytes in its end; to a child that is the same as a close.
            return b""
