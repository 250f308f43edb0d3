"""One client of `ash.v1`: authentication first, then requests one after the other, events beside them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from websockets.exceptions import ConnectionClosed

from ash.domain.errors import AshError, Forbidden, InvalidRequest, TooLarge, Unauthenticated
from ash.domain.ports import Clock
from ash.domain.values import Principal
from ash.gateway import codec
from ash.gateway.auth import Authenticator
from ash.gateway.delivery import Delivery
from ash.gateway.heartbeat import Heartbeat
from ash.gateway.limits import GatewayLimits
from ash.gateway.methods import Result, SessionMethods, require_role
from ash.gateway.metrics import GatewayMetrics
from ash.gateway.params import PROTOCOL_VERSION, Initialize, Params, SessionAttach, SessionDetach
from ash.gateway.service_port import Published, SessionService
from ash.gateway.transport import (
    FORBIDDEN_ORIGIN,
    INTERNAL_ERROR,
    SLOW_CONSUMER,
    UNAUTHENTICATED,
    GatewaySocket,
)

log = structlog.get_logger(__name__)


class Connection:
    """Speaks `ash.v1` on one open socket until it closes.

    Requests are executed in the order they came. Every message is one unfragmented frame, written in
    one step, so that answers, events and heartbeats never mix.

    Args:
        socket: past the opening handshake.
        header_token: the bearer token of the handshake; `initialize.token` goes before it.
        origin_allowed: whether the page behind the socket, if there is one, may talk to the server.
        version: the server's version, for the client to read.
    """

    def __init__(
        self,
        socket: GatewaySocket,
        service: SessionService,
        authenticator: Authenticator,
        limits: GatewayLimits,
        metrics: GatewayMetrics,
        *,
        clock: Clock,
        header_token: str | None,
        origin_allowed: bool,
        version: str,
    ) -> None:
        self.socket = socket
        self._service = service
        self._methods = SessionMethods(service)
        self._authenticator = authenticator
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._header_token = header_token
        self._origin_allowed = origin_allowed
        self._version = version
        self._deliveries: dict[str, Delivery] = {}

    async def run(self) -> None:
        """Serve the client; returns when the socket is closed."""
        try:
            if not self._origin_allowed:
                error = Forbidden("this Origin may not connect; add it to gateway.origins")
                await self._refuse(codec.encode_error(codec.NULL_ID, error), FORBIDDEN_ORIGIN, str(error))
                return
            principal = await self._initialize()
            if principal is None:
                return
            with self._metrics.connections.labels("/ws").track_inprogress():
                await self._serve(principal)
        except ConnectionClosed:
            return
        finally:
            await asyncio.gather(*(delivery.stop() for delivery in self._deliveries.values()))

    async def close(self, code: int, reason: str, *, last_words: bytes | None = None) -> None:
        """Execute nothing more, say `last_words` if the client still reads, and close."""
        self.socket.closing = True
        if last_words is not None:
            try:
                async with asyncio.timeout(self._limits.close_timeout_s):
                    await self._send(last_words)
            except (TimeoutError, ConnectionClosed):
                # The client does not read or is gone; closing is all that is left to do.
                log.debug("connection.last_words_unheard", code=code)
        await self.socket.close_within(code, reason, self._limits.close_timeout_s)

    async def revoked(self) -> None:
        """The token behind this connection is no longer good."""
        error = Unauthenticated("the token was revoked; the owner can issue another one")
        await self.close(UNAUTHENTICATED, str(error), last_words=codec.encode_error(codec.NULL_ID, error))

    async def notify_shutdown(self, reason: str, resume_after_ms: int) -> None:
        """Tell the client that the server goes away; a client that does not read is not waited for."""
        if self.socket.principal is None:
            return
        try:
            async with asyncio.timeout(self._limits.close_timeout_s):
                await self._notify("server/shutdown", {"reason": reason, "resumeAfterMs": resume_after_ms})
        except (TimeoutError, ConnectionClosed):
            log.debug("connection.shutdown_unheard")

    # Before authentication.

    async def _initialize(self) -> Principal | None:
        """The principal of a good first frame; None when the client was refused and closed."""
        try:
            async with asyncio.timeout(self._limits.first_frame_timeout_s):
                frame = await self.socket.recv()
        except TimeoutError:
            seconds = self._limits.first_frame_timeout_s
            await self._refuse_as(Unauthenticated(f"no initialize within {seconds:g} s"), codec.NULL_ID)
            return None
        request = await self._first_request(frame)
        if request is None:
            return None
        assert isinstance(request.params, Initialize)
        offered = request.params.protocol_version
        if offered != PROTOCOL_VERSION:
            message = f"protocolVersion {offered} is not spoken here; this server speaks {PROTOCOL_VERSION}"
            data = {"kind": InvalidRequest.kind, "field": "protocolVersion", "supported": [PROTOCOL_VERSION]}
            response = codec.encode_failure(request.id, codec.INVALID_PARAMS, message, data)
            await self._refuse(response, UNAUTHENTICATED, message)
            return None
        try:
            principal = self._authenticator.authenticate(
                request.params.token or self._header_token, self.socket.address
            )
        except AshError as error:
            self._metrics.refused.labels(error.kind).inc()
            await self._refuse_as(error, request.id)
            return None
        self.socket.admit(principal, hard_payload=self._limits.hard_payload)
        await self._send(codec.encode_result(request.id, self._welcome(principal)))
        return principal

    async def _first_request(self, frame: str | bytes) -> codec.Request | None:
        """The initialize request in the first frame; None when the client was refused and closed."""
        if isinstance(frame, bytes):
            await self._refuse(_text_frames_only(), UNAUTHENTICATED, "text frames only")
            return None
        limit = self._limits.max_first_frame
        if _size(frame) > limit:
            error = TooLarge(f"initialize has more than {limit} bytes", limit=limit)
            await self._refuse_as(error, codec.frame_id(frame))
            return None
        parsed = codec.parse(frame)
        match parsed:
            case codec.Request(params=Initialize()):
                return parsed
            case codec.InvalidFrame(response=bytes() as response, reason=reason):
                await self._refuse(response, UNAUTHENTICATED, reason)
            case codec.Request(id=request_id):
                await self._refuse_as(Unauthenticated("the first request must be initialize"), request_id)
            case _:
                message = "the first frame must be an initialize request with an id"
                await self._refuse_as(Unauthenticated(message), codec.NULL_ID)
        return None

    def _welcome(self, principal: Principal) -> Result:
        return {
            "protocolVersion": PROTOCOL_VERSION,
            "server": {"name": "ash", "version": self._version},
            "principal": {"name": principal.name, "role": principal.role},
            "policy": {
                "maxPayload": self._limits.max_payload,
                "maxBuffered": self._limits.max_buffered,
                "heartbeatMs": self._limits.heartbeat_ms,
            },
        }

    async def _refuse_as(self, error: AshError, request_id: bytes) -> None:
        await self._refuse(codec.encode_error(request_id, error), UNAUTHENTICATED, str(error))

    async def _refuse(self, response: bytes, code: int, reason: str) -> None:
        log.info("connection.refused", address=self.socket.address, code=code, reason=reason)
        await self.close(code, reason, last_words=response)

    # After authentication.

    async def _serve(self, principal: Principal) -> None:
        heartbeat = Heartbeat(
            self.socket,
            interval_s=self._limits.heartbeat_ms / 1000,
            close_timeout_s=self._limits.close_timeout_s,
            beat=self._beat,
        )
        async with heartbeat:
            while self.socket.is_open:
                frame = await self.socket.recv()
                # Frames may have waited while this side decided to close: a revoked token does nothing more.
                if self.socket.is_open:
                    await self._receive(principal, frame)
            await self.socket.wait_closed()

    async def _receive(self, principal: Principal, frame: str | bytes) -> None:
        if isinstance(frame, bytes):
            self._count("invalid", "invalid")
            await self._send(_text_frames_only())
            return
        limit = self._limits.max_payload
        if (size := _size(frame)) > limit:
            self._count("invalid", TooLarge.kind)
            error = TooLarge(f"the frame has {size} bytes; at most {limit} are taken", limit=limit)
            await self._send(codec.encode_error(codec.frame_id(frame), error))
            return
        match codec.parse(frame):
            case codec.Request(id=request_id, params=params):
                await self._answer(principal, params, request_id)
            case codec.Notification(params=params):
                await self._answer(principal, params, None)
            case codec.InvalidFrame(response=response, code=code, reason=reason):
                self._count("invalid", "invalid")
                log.info("connection.invalid_frame", code=code, reason=reason, principal=principal.name)
                if response is not None:
                    await self._send(response)

    async def _answer(self, principal: Principal, params: Params, request_id: bytes | None) -> None:
        """Execute one call and answer it; events of an attach follow its answer."""
        delivery: Delivery | None = None
        outcome = "ok"
        self.socket.working = True
        try:
            match params:
                case Initialize():
                    outcome = InvalidRequest.kind
                    response = _already_initialized(request_id)
                case SessionAttach():
                    require_role(principal, params.method)
                    result, delivery = await self._attach(principal, params)
                    response = _result(request_id, result)
                case SessionDetach():
                    require_role(principal, params.method)
                    await self._detach(params.session_id)
                    response = _result(request_id, {})
                case _:
                    require_role(principal, params.method)
                    response = _result(request_id, await self._methods.call(principal, params))
        except AshError as error:
            outcome = error.kind
            response = codec.encode_error(request_id or codec.NULL_ID, error)
        except Exception:
            # The last line of defence: a defect in one method must not take the connection with it.
            outcome = AshError.kind
            log.exception("connection.request_failed", method=params.method, principal=principal.name)
            response = codec.encode_failure(
                request_id or codec.NULL_ID,
                codec.INTERNAL_ERROR,
                f"{params.method} failed inside the server; its log says why",
                {"kind": AshError.kind},
            )
        finally:
            self.socket.working = False
        self._count(params.method, outcome)
        if request_id is not None:
            await self._send(response)
        if delivery is not None:
            delivery.start()

    async def _attach(self, principal: Principal, params: SessionAttach) -> tuple[Result, Delivery]:
        session_id = params.session_id
        if session_id not in self._deliveries and len(self._deliveries) >= self._limits.max_attachments:
            limit = self._limits.max_attachments
            raise TooLarge(f"a connection attaches to at most {limit} sessions; detach one", limit=limit)
        subscription = await self._service.attach(
            principal,
            session_id,
            after_seq=params.after_seq,
            max_buffered=self._limits.max_buffered,
        )
        # Only now, so that a failed attach leaves the former one as it was.
        await self._detach(session_id)

        async def ended() -> None:
            if self._deliveries.get(session_id) is delivery:
                del self._deliveries[session_id]

        delivery = Delivery(
            subscription,
            send=self._send_event,
            overflow=self._overflow,
            failed=self._delivery_failed(session_id),
            ended=ended,
        )
        self._deliveries[session_id] = delivery
        return {
            "headSeq": subscription.head_seq,
            "minSeq": subscription.min_seq,
            "state": subscription.state,
            "queue": list(subscription.queue),
        }, delivery

    async def _detach(self, session_id: str) -> None:
        delivery = self._deliveries.pop(session_id, None)
        if delivery is not None:
            await delivery.stop()

    async def _overflow(self) -> None:
        if self.socket.closing:
            return
        self._metrics.slow_consumer_closes.inc()
        log.info("connection.slow_consumer", address=self.socket.address)
        await self.close(SLOW_CONSUMER, "too slow: attach again with afterSeq")

    def _delivery_failed(self, session_id: str) -> Callable[[], Awaitable[None]]:
        async def close() -> None:
            # Silence would look like a quiet session; a closed socket makes the client attach again.
            await self.close(INTERNAL_ERROR, f"events of session {session_id} broke off; attach again")

        return close

    async def _beat(self) -> None:
        await self._notify("server/heartbeat", {"ts": self._clock()})

    async def _send_event(self, published: Published) -> None:
        await self._send(codec.encode_event(published.params_json))
        self._metrics.events_sent.inc()

    async def _notify(self, method: str, params: Result) -> None:
        await self._send(codec.encode_notification(method, params))

    async def _send(self, frame: bytes) -> None:
        await self.socket.send(frame, text=True)
        self._metrics.bytes_sent.inc(len(frame))

    def _count(self, method: str, outcome: str) -> None:
        self._metrics.requests.labels(method, outcome).inc()


def _result(request_id: bytes | None, result: Result) -> bytes:
    return codec.encode_result(request_id or codec.NULL_ID, result)


def _text_frames_only() -> bytes:
    return codec.encode_failure(
        codec.NULL_ID, codec.INVALID_REQUEST, "text frames only", {"kind": InvalidRequest.kind}
    )


def _already_initialized(request_id: bytes | None) -> bytes:
    return codec.encode_failure(
        request_id or codec.NULL_ID,
        codec.INVALID_REQUEST,
        "the connection is initialized already; open another one for another token",
        {"kind": InvalidRequest.kind},
    )


def _size(frame: str) -> int:
    """Bytes of the frame on the wire."""
    return len(frame) if frame.isascii() else len(frame.encode())
