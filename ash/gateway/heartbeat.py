"""Shows the peer that the server lives, and frees sockets whose peer has vanished."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from websockets.exceptions import ConnectionClosed

from ash.gateway.transport import SILENT, GatewaySocket

LOOKS = 8
"""How often the watch looks within two intervals; silence is noticed at most one look too late."""


class Heartbeat:
    """Beats every `interval_s`; closes with 4000 after two intervals in which nothing came from the peer.

    Two tasks, because a beat to a peer that does not read blocks, and the watch must not block with it.
    """

    def __init__(
        self,
        socket: GatewaySocket,
        *,
        interval_s: float,
        close_timeout_s: float,
        beat: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._socket = socket
        self._interval_s = interval_s
        self._close_timeout_s = close_timeout_s
        self._beat = beat
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    async def __aenter__(self) -> None:
        self._tasks = (asyncio.create_task(self._send()), asyncio.create_task(self._watch()))

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send(self) -> None:
        try:
            while True:
                await asyncio.sleep(self._interval_s)
                if self._beat is not None:
                    await self._beat()
                await self._socket.ping()
        except ConnectionClosed:
            return

    async def _watch(self) -> None:
        # Looks are counted, not seconds: after a stall of this process (or a suspended machine) the clock
        # says that everyone was silent for long, when nobody was asked anything.
        silent_looks, heard = 0, self._socket.last_heard
        while silent_looks < LOOKS:
            await asyncio.sleep(2 * self._interval_s / LOOKS)
            # While its request is in work nobody reads, so the peer may well have spoken.
            if self._socket.working or self._socket.last_heard != heard:
                silent_looks, heard = 0, self._socket.last_heard
            else:
                silent_looks += 1
        await self._socket.close_within(
            SILENT, "nothing came from the client for two heartbeats", self._close_timeout_s
        )
