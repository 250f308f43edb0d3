"""One accepted socket: a websockets connection that is counted, timed, and can always be closed."""

from __future__ import annotations

import asyncio
from typing import Any

from websockets.asyncio.server import Server, ServerConnection
from websockets.frames import CloseCode
from websockets.protocol import State
from websockets.server import ServerProtocol

from ash.domain.values import Principal

UNAUTHENTICATED = 4401
FORBIDDEN_ORIGIN = 4403
SILENT = 4000
SLOW_CONSUMER = 4008

GOING_AWAY = int(CloseCode.GOING_AWAY)
POLICY_VIOLATION = int(CloseCode.POLICY_VIOLATION)
INTERNAL_ERROR = int(CloseCode.INTERNAL_ERROR)
NORMAL = int(CloseCode.NORMAL_CLOSURE)

MAX_REASON = 123
"""Bytes a close frame has for its reason (RFC 6455, section 5.5)."""


class GatewaySocket(ServerConnection):
    """A server connection of the gateway.

    Attributes:
        last_heard: loop time at which bytes last came from the peer; any byte counts, so that a long
            frame on a slow line is not silence.
        working: true while a request of the peer is executed. Frames wait meanwhile, pongs among them.
        closing: true once this side decided to close; frames that still wait are not executed.
        principal: who authenticated, None until then.
    """

    def __init__(self, protocol: ServerProtocol, server: Server, *, census: Census, **options: Any) -> None:
        super().__init__(protocol, server, **options)
        self.last_heard = self.loop.time()
        self.working = False
        self.closing = False
        self.principal: Principal | None = None
        self._census = census

    @property
    def address(self) -> str:
        """The peer's IP address, empty when it is gone already."""
        name = self.remote_address
        return str(name[0]) if name else ""

    def admit(self, principal: Principal, *, hard_payload: int) -> None:
        """The peer proved who it is: count it as known and read frames up to `hard_payload` bytes."""
        self.principal = principal
        self.protocol.max_message_size = hard_payload
        self._census.authenticated(self)

    async def close_within(self, code: int, reason: str, timeout_s: float) -> None:
        """Close with `code`; after `timeout_s` without the peer's consent, drop the socket.

        websockets bounds its wait for the peer's close frame, but not the wait for room in the write
        buffer that comes first, and a peer that never reads makes none.
        """
        self.closing = True
        # The frame holds bytes, not characters; half a character at the end is left out.
        short = reason.encode()[:MAX_REASON].decode(errors="ignore")
        try:
            async with asyncio.timeout(timeout_s):
                await self.close(code, short)
        except TimeoutError:
            self.transport.abort()
            await self.wait_closed()

    @property
    def is_open(self) -> bool:
        """Whether frames can still be sent."""
        return not self.closing and self.protocol.state is State.OPEN

    # asyncio.Protocol: called by the event loop, in the order that asyncio documents.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._census.enter(self)
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._census.leave(self)

    def data_received(self, data: bytes) -> None:
        self.last_heard = self.loop.time()
        super().data_received(data)


class Census:
    """Counts open sockets, from the moment TCP is accepted until it is closed.

    Sockets that have not authenticated are counted on their own, so that strangers can be limited
    without limiting clients that are already in.
    """

    def __init__(self, *, max_connections: int, max_unauthenticated: int) -> None:
        self._max_connections = max_connections
        self._max_unauthenticated = max_unauthenticated
        self._strangers: set[GatewaySocket] = set()
        self._known: set[GatewaySocket] = set()

    def __len__(self) -> int:
        return len(self._strangers) + len(self._known)

    @property
    def crowded(self) -> bool:
        """Whether there is one socket too many."""
        return len(self) > self._max_connections or len(self._strangers) > self._max_unauthenticated

    def strangers(self) -> list[GatewaySocket]:
        """The open sockets whose peer has not authenticated."""
        return list(self._strangers)

    def enter(self, socket: GatewaySocket) -> None:
        """A socket was accepted."""
        self._strangers.add(socket)

    def authenticated(self, socket: GatewaySocket) -> None:
        """The peer of a socket proved who it is; the socket may be closed by now."""
        if socket in self._strangers:
            self._strangers.discard(socket)
            self._known.add(socket)

    def leave(self, socket: GatewaySocket) -> None:
        """The socket is closed; idempotent."""
        self._strangers.discard(socket)
        self._known.discard(socket)
