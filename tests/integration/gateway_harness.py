"""A gateway on a real port over sessions in memory, and clients to talk to it."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket as sockets
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from websockets.asyncio.client import ClientConnection, connect
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from ash.domain.errors import Busy, InvalidRequest, NotFound, ShuttingDown, SlowConsumer
from ash.domain.events import (
    Custom,
    Event,
    Origin,
    Record,
    RunFinished,
    RunStarted,
    Success,
    TextMessageContent,
    TextMessageEnd,
    TextMessageStart,
)
from ash.domain.values import Match, Principal, Role, SessionRow
from ash.gateway.limits import GatewayLimits
from ash.gateway.metrics import GatewayMetrics
from ash.gateway.tokens import TokenRegistry
from ash.gateway.ws import Gateway

V1 = Subprotocol("ash.v1")
HOSTS = ("localhost", "127.0.0.1", "::1")


def signal_after(target: Any, method: str, event: asyncio.Event) -> None:
    """Make `target.method` set `event` after each call, so that tests can wait instead of poll."""
    original = getattr(target, method)

    def noticed(*arguments: Any) -> Any:
        result = original(*arguments)
        event.set()
        return result

    setattr(target, method, noticed)


class FakePublished:
    def __init__(self, record: Record) -> None:
        self.record = record
        self.params_json = msgspec.json.encode(
            {
                "sessionId": record.session_id,
                "seq": record.seq,
                "ts": record.ts,
                "runId": record.run_id,
                "origin": record.origin,
                "event": record.event,
            }
        )


class FakeSubscription:
    """`pulled` counts what the consumer took; `closed` is set when it let go."""

    def __init__(self, session: FakeSession, after_seq: int, max_buffered: int) -> None:
        self.head_seq = session.head_seq
        self.min_seq = 1
        self.state = session.state
        self.queue: list[str] = []
        self.pulled = 0
        self.closed = asyncio.Event()
        self.broken: Exception | None = None
        self._session = session
        self._cursor = after_seq
        self._max_buffered = max_buffered
        self._over = asyncio.Event()
        self._wake = asyncio.Event()

    def offered(self) -> None:
        live = self._session.log[max(self._cursor, self.head_seq) :]
        if sum(len(published.params_json) for published in live) > self._max_buffered:
            self._over.set()
        self._wake.set()

    async def overflowed(self) -> None:
        await self._over.wait()

    def close(self) -> None:
        self._session.subscriptions.discard(self)
        self.closed.set()
        self._wake.set()

    def fail(self, error: Exception) -> None:
        self.broken = error
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[FakePublished]:
        while not self.closed.is_set():
            if self.broken is not None:
                raise self.broken
            if self._over.is_set():
                raise SlowConsumer("too slow")
            # Sequence numbers have no gaps here, so the cursor is an index.
            if self._cursor >= self._session.head_seq:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._cursor += 1
            self.pulled += 1
            yield self._session.log[self._cursor - 1]


@dataclass
class FakeSession:
    session_id: str
    owner: str
    title: str
    state: str = "idle"
    log: list[FakePublished] = field(default_factory=list)
    subscriptions: set[FakeSubscription] = field(default_factory=set)

    @property
    def head_seq(self) -> int:
        return self.log[-1].record.seq if self.log else 0

    def publish(self, *events: Event, run_id: str | None = None) -> None:
        for event in events:
            record = Record(self.session_id, self.head_seq + 1, 1_000, run_id, Origin.USER, event)
            self.log.append(FakePublished(record))
        for subscription in list(self.subscriptions):
            subscription.offered()

    def run(self, run_id: str, *answers: str) -> None:
        """A whole run that answers with these messages."""
        events: list[Event] = [RunStarted(thread_id=self.session_id, run_id=run_id)]
        for index, answer in enumerate(answers):
            message_id = f"{run_id}-{index}"
            events.append(TextMessageStart(message_id=message_id, role="assistant"))
            events += [TextMessageContent(message_id=message_id, delta=letter) for letter in answer]
            events.append(TextMessageEnd(message_id=message_id))
        events.append(RunFinished(thread_id=self.session_id, run_id=run_id, outcome=Success()))
        self.publish(*events, run_id=run_id)


@dataclass(frozen=True)
class FakeReceipt:
    run_id: str
    message_id: str
    disposition: str


class FakeSessions:
    """Echoes every prompt in a run of its own. `calls` is what came through the gateway."""

    def __init__(self) -> None:
        self.sessions: dict[str, FakeSession] = {}
        self.subscriptions: list[FakeSubscription] = []
        self.calls: list[tuple[str, str, dict[str, Any]]] = []
        self.fault: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.entered = asyncio.Event()
        self.refusing = False
        self._attached = asyncio.Event()
        self._ids = itertools.count(1)

    def add(self, owner: str = "owner", session_id: str | None = None) -> FakeSession:
        session = FakeSession(session_id or f"ses{next(self._ids)}", owner, "a title")
        self.sessions[session.session_id] = session
        return session

    async def _call(self, name: str, principal: Principal, **arguments: Any) -> None:
        self.calls.append((name, principal.name, arguments))
        self.entered.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault

    def _session(self, session_id: str) -> FakeSession:
        if session_id not in self.sessions:
            raise NotFound(f"no session {session_id}")
        return self.sessions[session_id]

    async def new_session(
        self,
        principal: Principal,
        *,
        title: str | None,
        persona: str | None,
        slice_name: str | None,
        goals: Sequence[str],
    ) -> str:
        await self._call(
            "new", principal, title=title, persona=persona, slice_name=slice_name, goals=list(goals)
        )
        return self.add(principal.name).session_id

    async def list_sessions(
        self, principal: Principal, *, limit: int, cursor: str | None
    ) -> tuple[list[SessionRow], str | None]:
        await self._call("list", principal, limit=limit, cursor=cursor)
        rows = [
            SessionRow(
                s.session_id,
                s.title,
                s.owner,
                None,
                None,
                s.state,
                "analytic",
                None,
                s.head_seq,
                1_000,
                2_000,
            )
            for s in self.sessions.values()
        ]
        return rows[:limit], "next" if len(rows) > limit else None

    async def attach(
        self, principal: Principal, session_id: str, *, after_seq: int, max_buffered: int
    ) -> FakeSubscription:
        await self._call("attach", principal, session_id=session_id, after_seq=after_seq)
        session = self._session(session_id)
        subscription = FakeSubscription(session, after_seq, max_buffered)
        session.subscriptions.add(subscription)
        self.subscriptions.append(subscription)
        self._attached.set()
        return subscription

    async def attached(self, count: int) -> FakeSubscription:
        """Wait until this many subscriptions were made, and return the latest."""
        while len(self.subscriptions) < count:
            self._attached.clear()
            await self._attached.wait()
        return self.subscriptions[-1]

    async def prompt(
        self,
        principal: Principal,
        session_id: str,
        *,
        text: str,
        images: Sequence[dict[str, str]],
        idempotency_key: str | None,
        when_busy: str,
    ) -> FakeReceipt:
        await self._call(
            "prompt",
            principal,
            text=text,
            images=list(images),
            idempotency_key=idempotency_key,
            when_busy=when_busy,
        )
        if self.refusing:
            raise ShuttingDown("the server is shutting down")
        session = self._session(session_id)
        if when_busy == "reject" and session.state == "running":
            raise Busy("a run is active")
        number = next(self._ids)
        session.run(f"run{number}", f"echo {text}")
        return FakeReceipt(f"run{number}", f"msg{number}", "started")

    async def cancel(self, principal: Principal, session_id: str, run_id: str | None) -> list[str]:
        await self._call("cancel", principal, session_id=session_id, run_id=run_id)
        return [run_id] if run_id else []

    async def fork(self, principal: Principal, session_id: str, at_seq: int | None) -> str:
        await self._call("fork", principal, session_id=session_id, at_seq=at_seq)
        return self.add(principal.name).session_id

    async def delete(self, principal: Principal, session_id: str) -> None:
        await self._call("delete", principal, session_id=session_id)
        for subscription in list(self._session(session_id).subscriptions):
            subscription.close()
        del self.sessions[session_id]

    async def add_goal(self, principal: Principal, session_id: str, text: str) -> str:
        await self._call("add_goal", principal, session_id=session_id, text=text)
        return "goal1"

    async def list_goals(self, principal: Principal, session_id: str) -> list[dict[str, Any]]:
        await self._call("list_goals", principal, session_id=session_id)
        return [{"goalId": "goal1", "text": "win", "state": "open"}]

    async def close_goal(self, principal: Principal, session_id: str, goal_id: str) -> None:
        await self._call("close_goal", principal, session_id=session_id, goal_id=goal_id)

    async def set_autonomy(
        self,
        principal: Principal,
        session_id: str,
        *,
        enabled: bool,
        interval_s: float | None,
        budget: int | None,
    ) -> Mapping[str, Any]:
        await self._call("set_autonomy", principal, enabled=enabled, interval_s=interval_s, budget=budget)
        return {"enabled": enabled, "intervalS": interval_s or 60.0, "budget": budget or 10}

    async def search_memory(
        self, principal: Principal, session_id: str, query: str, limit: int
    ) -> Sequence[Match]:
        await self._call("search", principal, query=query, limit=limit)
        return [Match(session_id, "msg1", "user", 3, 1_000, f"[{query}]", -1.5)]

    async def resume_run(
        self, principal: Principal, session_id: str, *, interrupt_id: str, approve: bool, payload: Any
    ) -> str:
        await self._call("resume", principal, interrupt_id=interrupt_id, approve=approve, payload=payload)
        if interrupt_id == "unknown":
            raise InvalidRequest("no such interrupt")
        return "run9"


class RpcError(Exception):
    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.code: int = error["code"]
        self.data: dict[str, Any] = error["data"]
        self.kind: str = error["data"]["kind"]


class Client:
    """An `ash.v1` client that keeps the notifications it meets on the way to an answer."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.welcome: dict[str, Any] = {}
        self._notifications: deque[dict[str, Any]] = deque()
        self._ids = itertools.count(1)

    async def receive(self) -> dict[str, Any]:
        """The next frame, whatever it is."""
        frame: dict[str, Any] = json.loads(await self.connection.recv())
        return frame

    async def call(self, method: str, **params: Any) -> Any:
        request_id = next(self._ids)
        await self.send(method, params, request_id)
        return await self.answer(request_id)

    async def send(self, method: str, params: dict[str, Any], request_id: int) -> None:
        request = {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}
        await self.connection.send(json.dumps(request))

    async def answer(self, request_id: int | None) -> Any:
        while True:
            frame = await self.receive()
            if "method" in frame:
                self._notifications.append(frame)
                continue
            assert frame["id"] == request_id
            if "error" in frame:
                raise RpcError(frame["error"])
            return frame["result"]

    async def notification(self, method: str) -> dict[str, Any]:
        """The params of the next notification of this name; others are dropped."""
        while True:
            frame = self._notifications.popleft() if self._notifications else await self.receive()
            assert "method" in frame, frame
            if frame["method"] == method:
                params: dict[str, Any] = frame["params"]
                return params

    async def seqs(self, until: int) -> list[int]:
        """Sequence numbers of the session events up to and including `until`."""
        got: list[int] = []
        while not got or got[-1] != until:
            got.append((await self.notification("session/event"))["seq"])
        return got

    async def close_code(self) -> int | None:
        """Wait until the server closed and return its code."""
        with suppress(ConnectionClosed):
            while True:
                await self.connection.recv()
        return self.connection.close_code


class RawPeer:
    """A client that does nothing on its own: it answers no ping and no close, and reads when told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, uri: str) -> None:
        self._reader = reader
        self._writer = writer
        self.protocol = ClientProtocol(parse_uri(uri), subprotocols=[V1], max_size=None)

    async def open(self, token: str) -> None:
        self.protocol.send_request(self.protocol.connect())
        self._flush()
        await self._event()
        call = {"protocolVersion": 1, "client": {"name": "raw", "version": "0"}, "token": token}
        self.send("initialize", call)
        await self._event()

    def send(self, method: str, params: dict[str, Any]) -> None:
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        self.protocol.send_text(json.dumps(request).encode())
        self._flush()

    def _flush(self) -> None:
        for data in self.protocol.data_to_send():
            self._writer.write(data)

    async def _event(self) -> None:
        """Read until the next event: the answer to the handshake, then frames."""
        while not self.protocol.events_received():
            self.protocol.receive_data(await self._reader.read(65536))

    async def until_closed(self) -> int | None:
        """Read up to the server's close frame and return its code; None when the end comes without one."""
        with suppress(ConnectionResetError):
            while data := await self._reader.read(65536):
                self.protocol.receive_data(data)
                self.protocol.events_received()
                if self.protocol.close_rcvd is not None:
                    return self.protocol.close_rcvd.code
        return None

    async def until_dropped(self) -> None:
        """Read until the server dropped the connection."""
        with suppress(ConnectionResetError):
            while await self._reader.read(65536):
                pass


@dataclass
class Served:
    gateway: Gateway
    sessions: FakeSessions
    tokens: TokenRegistry
    folder: Path
    registry: CollectorRegistry
    owner: str
    sockets_changed: asyncio.Event

    async def sockets(self, count: int) -> None:
        """Wait until this many sockets are open."""
        while self.gateway.open_sockets != count:
            self.sockets_changed.clear()
            await self.sockets_changed.wait()

    @property
    def base(self) -> str:
        return f"ws://127.0.0.1:{self.gateway.address[1]}"

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def token(self, role: Role, name: str | None = None) -> str:
        return self.tokens.issue(name or str(role), role)

    @asynccontextmanager
    async def socket(self, path: str = "/ws", **options: Any) -> AsyncIterator[ClientConnection]:
        """A socket past the opening handshake."""
        options.setdefault("subprotocols", [V1] if path.startswith("/ws") else None)
        async with connect(self.base + path, max_size=None, ping_interval=None, **options) as connection:
            yield connection

    @asynccontextmanager
    async def client(self, token: str | None = None, **options: Any) -> AsyncIterator[Client]:
        """An authenticated client; the owner's without a token."""
        async with self.socket(**options) as connection:
            client = Client(connection)
            client.welcome = await client.call(
                "initialize",
                protocolVersion=1,
                client={"name": "test", "version": "1"},
                token=token or self.owner,
            )
            yield client

    @asynccontextmanager
    async def raw(self, token: str | None = None) -> AsyncIterator[RawPeer]:
        """An authenticated peer that then does nothing by itself, with a small receive buffer."""
        raw = sockets.socket(sockets.AF_INET, sockets.SOCK_STREAM)
        raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
        raw.setblocking(False)
        host, port = self.gateway.address
        await asyncio.get_running_loop().sock_connect(raw, (host, port))
        reader, writer = await asyncio.open_connection(sock=raw, limit=1024)
        try:
            peer = RawPeer(reader, writer, self.base + "/ws")
            await peer.open(token or self.owner)
            yield peer
        finally:
            writer.transport.abort()


@asynccontextmanager
async def served(
    folder: Path, *, limits: GatewayLimits | None = None, origins: Sequence[str] = (), bystander: bool = True
) -> AsyncIterator[Served]:
    """A running gateway. A bystander is connected throughout, and must still be served at the end."""
    sessions, registry = FakeSessions(), CollectorRegistry()
    tokens = TokenRegistry(folder)
    tokens.ensure_owner()
    owner = tokens.owner_token()
    assert owner is not None
    gateway = Gateway(
        sessions,
        tokens,
        host="127.0.0.1",
        port=0,
        hosts=HOSTS,
        origins=origins,
        limits=limits or GatewayLimits(close_timeout_s=0.2, revocation_poll_s=0.05),
        metrics=GatewayMetrics(registry),
        version="1.2.3",
    )
    served = Served(gateway, sessions, tokens, folder, registry, owner, asyncio.Event())
    signal_after(gateway._census, "enter", served.sockets_changed)
    signal_after(gateway._census, "leave", served.sockets_changed)
    await gateway.start()
    try:
        if not bystander:
            yield served
            return
        async with served.client(tokens.issue("bystander", Role.MEMBER)) as other:
            quiet = sessions.add("bystander", "bystanders")
            await other.call("session/attach", sessionId="bystanders")
            yield served
            assert (await other.call("session/list"))["sessions"]
            quiet.publish(Custom(name="ash.tick", value={}))
            assert (await other.notification("session/event"))["sessionId"] == "bystanders"
    finally:
        await gateway.stop(reason="test over", resume_after_ms=0, grace_s=0)
