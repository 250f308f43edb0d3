"""The WebSocket server: one port with `/ws` (`ash.v1`) and `/chat` (plain text)."""

from __future__ import annotations

import asyncio
import errno
import http
import logging
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import cast

import structlog
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import NegotiationError
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from ash.domain.errors import AshError, RateLimited
from ash.domain.ports import Clock
from ash.gateway.admission import HostPolicy, OriginPolicy, carries_token, split_target
from ash.gateway.auth import Authenticator, FailureLimiter, bearer_token
from ash.gateway.chat import ChatConnection
from ash.gateway.connection import Connection
from ash.gateway.limits import GatewayLimits
from ash.gateway.loop_lag import LoopLag
from ash.gateway.metrics import GatewayMetrics
from ash.gateway.service_port import SessionService
from ash.gateway.tokens import TokenRegistry, wall_clock
from ash.gateway.transport import GOING_AWAY, Census, GatewaySocket

SUBPROTOCOL = Subprotocol("ash.v1")
WS_PATH = "/ws"
CHAT_PATH = "/chat"

MAX_QUEUED_FRAMES = 4
"""Frames of one client that wait for the one in work. Each may be `hard_payload` long, so few."""

log = structlog.get_logger(__name__)

# At DEBUG websockets logs headers and frames, which hold tokens and what people write.
_websockets_log = logging.getLogger("ash.gateway.websockets")
_websockets_log.setLevel(logging.WARNING)


class Gateway:
    """Listens, admits clients, and serves each of them until it leaves or the gateway stops.

    Args:
        service: the sessions.
        tokens: who may connect; looked at again every `limits.revocation_poll_s`.
        host: address to listen on.
        port: TCP port; 0 lets the system choose, see `address`.
        hosts: names, without ports, that a `Host` header may hold.
        origins: values that an `Origin` header may hold; a client without one is no browser.
        version: the server's version, for clients to read.
    """

    def __init__(
        self,
        service: SessionService,
        tokens: TokenRegistry,
        *,
        host: str,
        port: int,
        hosts: Iterable[str],
        origins: Iterable[str],
        limits: GatewayLimits,
        metrics: GatewayMetrics,
        version: str,
        clock: Clock = wall_clock,
    ) -> None:
        self._service = service
        self._tokens = tokens
        self._host = host
        self._port = port
        self._host_policy = HostPolicy(hosts)
        self._origin_policy = OriginPolicy(origins)
        self._limits = limits
        self._metrics = metrics
        self._version = version
        self._clock = clock
        self._census = Census(
            max_connections=limits.max_connections, max_unauthenticated=limits.max_unauthenticated
        )
        self._authenticator = Authenticator(
            tokens, FailureLimiter(limits.failed_authentications, limits.failed_window_s), time.monotonic
        )
        self._live: set[Connection | ChatConnection] = set()
        self._handlers: set[asyncio.Task[None]] = set()
        self._closers: set[asyncio.Task[None]] = set()
        self._server: Server | None = None
        self._token_watch: asyncio.Task[None] | None = None
        self._loop_lag = LoopLag(metrics.loop_lag.observe)

    async def start(self) -> None:
        """Listen.

        Raises:
            AshError: the address cannot be listened on; says which setting to change.
        """
        limits = self._limits
        try:
            self._server = await serve(
                self._handle,
                self._host,
                self._port,
                select_subprotocol=_select_subprotocol,
                process_request=self._check_request,
                compression="deflate" if limits.compression else None,
                server_header=None,
                open_timeout=limits.first_frame_timeout_s,
                # The gateway has a heartbeat of its own, which the protocol promises to clients.
                ping_interval=None,
                close_timeout=limits.close_timeout_s,
                max_size=limits.hard_first_frame,
                max_queue=MAX_QUEUED_FRAMES,
                write_limit=limits.write_buffer,
                logger=_websockets_log,
                # A factory is documented ("a wrapper or a subclass"); the annotation knows classes only.
                create_connection=cast("type[ServerConnection]", partial(GatewaySocket, census=self._census)),
            )
        except OSError as error:
            raise AshError(_cannot_listen(self._host, self._port, error)) from error
        self._token_watch = asyncio.create_task(self._watch_tokens())
        self._loop_lag.start()
        log.info("gateway.listening", host=self._host, port=self.address[1])

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that are listened on."""
        assert self._server is not None, "start() comes first"
        name = next(iter(self._server.sockets)).getsockname()
        return name[0], name[1]

    @property
    def open_sockets(self) -> int:
        """Sockets that are open, authenticated or not."""
        return len(self._census)

    async def stop(self, *, reason: str, resume_after_ms: int, grace_s: float) -> None:
        """Accept nobody more, announce the shutdown, close after `grace_s` with 1001, wait for the end.

        Requests are still executed in the grace time; the service refuses new input by itself.
        Returns early when every client has left. Does nothing when the gateway does not run.
        """
        server, self._server = self._server, None
        if server is None:
            return
        self._loop_lag.stop()
        server.close(close_connections=False)
        await asyncio.gather(*(live.notify_shutdown(reason, resume_after_ms) for live in self._live))
        closed = asyncio.ensure_future(server.wait_closed())
        await asyncio.wait([closed], timeout=grace_s)
        await asyncio.gather(*(live.close(GOING_AWAY, reason) for live in self._live))
        for socket in self._census.strangers():
            socket.transport.abort()
        await asyncio.wait([closed], timeout=self._limits.close_timeout_s)
        for handler in self._handlers:
            log.warning("gateway.request_abandoned", reason="it did not end with its connection")
            handler.cancel()
        await closed
        if self._token_watch is not None:
            self._token_watch.cancel()
            await asyncio.gather(self._token_watch, *self._closers, return_exceptions=True)
        log.info("gateway.stopped", reason=reason)

    def _check_request(self, connection: ServerConnection, request: Request) -> Response | None:
        """Refuse a handshake by an HTTP answer; None lets it go on."""
        assert isinstance(connection, GatewaySocket)
        path, query = split_target(request.path)
        if not self._host_policy.allows(request.headers.get_all("Host")):
            return self._refuse(connection, 403, "host", "unknown Host; add the name to gateway.hosts")
        if path not in (WS_PATH, CHAT_PATH):
            return self._refuse(connection, 404, "path", f"there is {WS_PATH} and {CHAT_PATH} here")
        if carries_token(query):
            return self._refuse(
                connection,
                400,
                "token_in_url",
                "a token in a URL ends up in logs and histories: revoke it, and send the next one as "
                "`Authorization: Bearer TOKEN` or in initialize",
            )
        if self._census.crowded:
            return self._refuse(connection, 503, "crowded", "too many connections; try again in a moment")
        return self._check_chat(connection, request) if path == CHAT_PATH else None

    def _check_chat(self, connection: GatewaySocket, request: Request) -> Response | None:
        # A plain text client has no first frame to authenticate with, so everything is in the handshake.
        if not self._origin_policy.allows(request.headers.get_all("Origin")):
            return self._refuse(
                connection, 403, "origin", "this Origin may not connect; add it to gateway.origins"
            )
        token = bearer_token(request.headers.get_all("Authorization"))
        try:
            connection.principal = self._authenticator.authenticate(token, connection.address)
        except RateLimited as error:
            return self._refuse(connection, 429, error.kind, str(error))
        except AshError as error:
            response = self._refuse(connection, 401, error.kind, str(error))
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        return None

    def _refuse(self, connection: GatewaySocket, status: int, reason: str, message: str) -> Response:
        self._metrics.refused.labels(reason).inc()
        log.info("gateway.refused", address=connection.address, status=status, reason=reason)
        return connection.respond(http.HTTPStatus(status), message + "\n")

    async def _handle(self, socket: ServerConnection) -> None:
        assert isinstance(socket, GatewaySocket)
        live = self._connection(socket)
        task = asyncio.current_task()
        assert task is not None, "websockets calls this in a task"
        self._handlers.add(task)
        self._live.add(live)
        try:
            await live.run()
        finally:
            self._handlers.discard(task)
            self._live.discard(live)
            # A handler that fails must not leave the socket to a close without an end.
            await socket.close_within(GOING_AWAY, "", self._limits.close_timeout_s)

    def _connection(self, socket: GatewaySocket) -> Connection | ChatConnection:
        request = socket.request
        assert request is not None, "the handshake is over"
        path, query = split_target(request.path)
        if path == CHAT_PATH:
            assert socket.principal is not None, "checked in the handshake"
            socket.admit(socket.principal, hard_payload=self._limits.hard_payload)
            return ChatConnection(
                socket,
                socket.principal,
                self._service,
                self._limits,
                self._metrics,
                session_id=query["session"][0] if "session" in query else None,
            )
        return Connection(
            socket,
            self._service,
            self._authenticator,
            self._limits,
            self._metrics,
            clock=self._clock,
            header_token=bearer_token(request.headers.get_all("Authorization")),
            origin_allowed=self._origin_policy.allows(request.headers.get_all("Origin")),
            version=self._version,
        )

    async def _watch_tokens(self) -> None:
        while True:
            await asyncio.sleep(self._limits.revocation_poll_s)
            self._tokens.refresh()
            for live in list(self._live):
                principal = live.socket.principal
                if principal is None or live.socket.closing or self._tokens.is_active(principal.token_id):
                    continue
                log.info("gateway.token_revoked", principal=principal.name, token_id=principal.token_id)
                # Marked at once, closed aside: one client that does not read must not delay the others.
                live.socket.closing = True
                task = asyncio.create_task(live.revoked())
                self._closers.add(task)
                task.add_done_callback(self._closers.discard)


def _select_subprotocol(connection: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    assert connection.request is not None, "the request was read"
    if split_target(connection.request.path)[0] == CHAT_PATH:
        return None
    if SUBPROTOCOL not in offered:
        raise NegotiationError(f"{WS_PATH} speaks the subprotocol {SUBPROTOCOL}; the client must offer it")
    return SUBPROTOCOL


def _cannot_listen(host: str, port: int, error: OSError) -> str:
    where = f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return (
            f"{where} is in use by another program (or another Ash); stop it, or set gateway.port "
            f"(ASH_GATEWAY__PORT) to another port"
        )
    return (
        f"cannot listen on {where}: {error.strerror or error}; set gateway.host (ASH_GATEWAY__HOST) and "
        f"gateway.port (ASH_GATEWAY__PORT) to an address of this machine"
    )
