"""Plain chat: text frames in, one text frame per finished answer out."""

from __future__ import annotations

import asyncio

import structlog
from websockets.exceptions import ConnectionClosed

from ash.domain.errors import AshError
from ash.domain.events import (
    Cancelled,
    Interrupted,
    Record,
    RunError,
    RunFinished,
    TextMessageContent,
    TextMessageEnd,
    TextMessageStart,
)
from ash.domain.values import Principal
from ash.gateway.delivery import Delivery
from ash.gateway.heartbeat import Heartbeat
from ash.gateway.limits import GatewayLimits
from ash.gateway.methods import require_role
from ash.gateway.metrics import GatewayMetrics
from ash.gateway.service_port import Published, SessionService, Subscription
from ash.gateway.transport import (
    INTERNAL_ERROR,
    NORMAL,
    POLICY_VIOLATION,
    SLOW_CONSUMER,
    UNAUTHENTICATED,
    GatewaySocket,
)

log = structlog.get_logger(__name__)


class AnswerAssembler:
    """Folds a session's records into what a person reads: one text for each run that ends."""

    def __init__(self) -> None:
        self._open: dict[str, list[str]] = {}
        self._finished: dict[str, list[str]] = {}

    def feed(self, record: Record) -> str | None:
        """Take the next record; returns the text to show when it ends a run, None otherwise."""
        event = record.event
        match event:
            case TextMessageStart(message_id=message_id, role="assistant"):
                self._open[message_id] = []
            case TextMessageContent(message_id=message_id, delta=delta) if message_id in self._open:
                self._open[message_id].append(delta)
            case TextMessageEnd(message_id=message_id) if message_id in self._open:
                text = "".join(self._open.pop(message_id))
                if text and record.run_id is not None:
                    self._finished.setdefault(record.run_id, []).append(text)
            case RunFinished() | RunError() if record.run_id is not None:
                return _outcome(event, "\n\n".join(self._finished.pop(record.run_id, [])))
        return None


def _outcome(event: RunFinished | RunError, answer: str) -> str:
    if isinstance(event, RunError):
        return _error(f"{event.message} ({event.code})")
    match event.outcome:
        case Cancelled():
            return answer or _error("the run was cancelled")
        case Interrupted():
            return answer or _error("the run waits for a decision; give it with run/resume of ash.v1")
        case _:
            return answer


def _error(message: object) -> str:
    return f"error: {message}"


class ChatConnection:
    """Serves plain chat on one open, authenticated socket until it closes.

    Answers to everyone's inputs are shown. Without a session id a new session is made.
    """

    def __init__(
        self,
        socket: GatewaySocket,
        principal: Principal,
        service: SessionService,
        limits: GatewayLimits,
        metrics: GatewayMetrics,
        *,
        session_id: str | None,
    ) -> None:
        self.socket = socket
        self._principal = principal
        self._service = service
        self._limits = limits
        self._metrics = metrics
        self._session_id = session_id

    async def run(self) -> None:
        """Serve the client; returns when the socket is closed."""
        delivery: Delivery | None = None
        try:
            with self._metrics.connections.labels("/chat").track_inprogress():
                session_id, delivery = await self._open()
                delivery.start()
                heartbeat = Heartbeat(
                    self.socket,
                    interval_s=self._limits.heartbeat_ms / 1000,
                    close_timeout_s=self._limits.close_timeout_s,
                )
                async with heartbeat:
                    await self._serve(session_id)
        except ConnectionClosed:
            return
        except AshError as error:
            await self.close(POLICY_VIOLATION, str(error), last_words=_error(error))
        finally:
            if delivery is not None:
                await delivery.stop()

    async def close(self, code: int, reason: str, *, last_words: str | None = None) -> None:
        """Execute nothing more, say `last_words` if the client still reads, and close."""
        self.socket.closing = True
        if last_words is not None:
            try:
                async with asyncio.timeout(self._limits.close_timeout_s):
                    await self._send(last_words)
            except (TimeoutError, ConnectionClosed):
                # The client does not read or is gone; closing is all that is left to do.
                log.debug("chat.last_words_unheard", code=code)
        await self.socket.close_within(code, reason, self._limits.close_timeout_s)

    async def revoked(self) -> None:
        """The token behind this connection is no longer good."""
        message = "the token was revoked; the owner can issue another one"
        await self.close(UNAUTHENTICATED, message, last_words=_error(message))

    async def notify_shutdown(self, reason: str, resume_after_ms: int) -> None:
        """Nothing is said: every line of a chat is an answer, and the close code tells the client."""
        log.debug("chat.shutdown", reason=reason, resume_after_ms=resume_after_ms)

    async def _open(self) -> tuple[str, Delivery]:
        session_id = self._session_id
        if session_id is None:
            require_role(self._principal, "session/new")
            session_id = await self._service.new_session(
                self._principal, title=None, persona=None, slice_name=None, goals=()
            )
        subscription = await self._attach(session_id, 0)
        shown_after = subscription.head_seq
        if subscription.state == "idle":
            # Nothing is under way, so no answer that is still to come began before the head.
            subscription.close()
            subscription = await self._attach(session_id, shown_after)
        assembler = AnswerAssembler()

        async def show(published: Published) -> None:
            text = assembler.feed(published.record)
            if text and published.record.seq > shown_after:
                await self._send(text)
                self._metrics.events_sent.inc()

        return session_id, Delivery(
            subscription, send=show, overflow=self._overflow, failed=self._failed, ended=self._ended
        )

    async def _attach(self, session_id: str, after_seq: int) -> Subscription:
        return await self._service.attach(
            self._principal, session_id, after_seq=after_seq, max_buffered=self._limits.max_buffered
        )

    async def _serve(self, session_id: str) -> None:
        while self.socket.is_open:
            frame = await self.socket.recv()
            if self.socket.is_open:
                await self._receive(session_id, frame)
        await self.socket.wait_closed()

    async def _receive(self, session_id: str, frame: str | bytes) -> None:
        if isinstance(frame, bytes):
            await self._send(_error("text frames only"))
            return
        if not frame.strip():
            return
        limit = self._limits.max_payload
        if len(frame.encode()) > limit:
            await self._send(_error(f"the message has more than {limit} bytes"))
            return
        outcome = "ok"
        self.socket.working = True
        try:
            require_role(self._principal, "session/prompt")
            await self._service.prompt(
                self._principal,
                session_id,
                text=frame,
                images=(),
                idempotency_key=None,
                when_busy="enqueue",
            )
        except AshError as error:
            outcome = error.kind
            message = _error(error)
        except Exception:
            # The last line of defence: a defect in one method must not take the connection with it.
            outcome = AshError.kind
            log.exception("chat.prompt_failed", principal=self._principal.name)
            message = _error("the prompt failed inside the server; its log says why")
        finally:
            self.socket.working = False
        self._metrics.requests.labels("chat", outcome).inc()
        if outcome != "ok":
            await self._send(message)

    async def _overflow(self) -> None:
        if self.socket.closing:
            return
        self._metrics.slow_consumer_closes.inc()
        await self.close(SLOW_CONSUMER, "too slow: connect again")

    async def _failed(self) -> None:
        await self.close(INTERNAL_ERROR, "the session's events broke off; connect again")

    async def _ended(self) -> None:
        await self.close(NORMAL, "the session was deleted")

    async def _send(self, text: str) -> None:
        await self.socket.send(text)
        self._metrics.bytes_sent.inc(len(text))
