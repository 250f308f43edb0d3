"""Many WebSocket clients that only listen."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from benchmarks.harness.conversation import SystemFailedError

AT_ONCE = 32
"""Handshakes at the same time; the gateway refuses the 65th stranger."""

SPARE_FILES = 256
"""Descriptors that a server needs beside its sockets."""

Greeting = Callable[[ClientConnection, int], Awaitable[None]]


def allow_open_files(count: int) -> None:
    """Raise the soft limit of open files, which child processes inherit.

    Raises:
        SystemFailedError: the hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + SPARE_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SystemFailedError(
            f"{count} sockets need {needed} open files, the hard limit is {hard}; raise it (ulimit -Hn) or "
            f"measure fewer: --sockets {max(0, hard - SPARE_FILES)}"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class IdleClients:
    """Open sockets whose incoming frames are read and dropped.

    Args:
        greeting: what a socket says and hears before it idles; it is given the socket and its number.
    """

    def __init__(self, url: str, greeting: Greeting, *, compression: bool, subprotocols: Sequence[str] = ()):
        self._url = url
        self._greeting = greeting
        self._compression = "deflate" if compression else None
        self._subprotocols = [Subprotocol(name) for name in subprotocols] or None
        self._sockets: list[ClientConnection] = []
        self._readers: list[asyncio.Task[None]] = []

    async def open(self, count: int) -> None:
        """Open `count` sockets, some at a time."""
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> None:
            async with slots:
                socket = await connect(
                    self._url,
                    subprotocols=self._subprotocols,
                    compression=self._compression,
                    max_size=None,
                    ping_interval=None,
                )
                await self._greeting(socket, number)
                self._sockets.append(socket)
                self._readers.append(asyncio.create_task(_drop_frames(socket)))

        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(one(number))

    @property
    def still_open(self) -> int:
        """Sockets that nobody has closed."""
        return sum(not reader.done() for reader in self._readers)

    async def close(self) -> None:
        """Close them all."""
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(socket: ClientConnection) -> None:
            async with slots:
                await socket.close()

        await asyncio.gather(*(one(socket) for socket in self._sockets))
        await asyncio.gather(*self._readers)


async def _drop_frames(socket: ClientConnection) -> None:
    # Unread frames would stop the reading, and with it the pongs that keep the connection alive.
    with contextlib.suppress(ConnectionClosed):
        async for _ in socket:
            pass


async def call(socket: ClientConnection, number: int, method: str, params: dict[str, Any]) -> dict[str, Any]:
    """One JSON-RPC request; notifications before its answer are dropped.

    Raises:
        SystemFailedError: the server answers with an error.
    """
    await socket.send(json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params}))
    while True:
        message: dict[str, Any] = json.loads(await socket.recv())
        if message.get("id") == number:
            break
    if "error" in message:
        raise SystemFailedError(f"{method} was refused: {message['error']['message']}")
    result: dict[str, Any] = message["result"]
    return result
