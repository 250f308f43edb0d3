"""Plain chat: what a person with a WebSocket command line tool sees."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from gateway_harness import Served, served
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from ash.domain.errors import StoreFull
from ash.domain.events import (
    Cancelled,
    Event,
    Interrupted,
    Origin,
    Record,
    RunError,
    RunFinished,
    RunStarted,
    Success,
    TextMessageContent,
    TextMessageEnd,
    TextMessageStart,
)
from ash.domain.values import Role
from ash.gateway.chat import AnswerAssembler
from ash.gateway.limits import GatewayLimits
from ash.gateway.tokens import TokenRegistry


@asynccontextmanager
async def chat(gateway: Served, query: str = "", token: str | None = None) -> AsyncIterator[ClientConnection]:
    headers = {"Authorization": f"Bearer {token or gateway.owner}"}
    async with gateway.socket(f"/chat{query}", additional_headers=headers) as connection:
        yield connection


async def closed(connection: ClientConnection) -> int | None:
    with pytest.raises(ConnectionClosed):
        await connection.recv()
    return connection.close_code


async def test_a_message_is_answered_by_one_text_frame(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway:
        gateway.sessions.add(session_id="s")
        async with chat(gateway, "?session=s") as connection:
            for text in ("hello", "again \u00fc"):
                await connection.send(text)
                assert await connection.recv() == f"echo {text}"
            assert gateway.sessions.calls[-1][2]["when_busy"] == "enqueue"


async def test_without_a_session_a_new_one_is_made(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, chat(gateway) as connection:
        await connection.send("hello")
        assert await connection.recv() == "echo hello"
        assert "new" in {name for name, _, _ in gateway.sessions.calls}


async def test_what_was_said_before_is_not_said_again(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway:
        gateway.sessions.add(session_id="s").run("run1", "old")
        async with chat(gateway, "?session=s") as connection:
            await connection.send("new")
            assert await connection.recv() == "echo new"


async def test_an_answer_that_is_under_way_is_shown_whole(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway:
        session = gateway.sessions.add(session_id="s")
        session.run("run0", "old")
        session.state = "running"
        session.publish(
            RunStarted(thread_id="s", run_id="run1"),
            TextMessageStart(message_id="m", role="assistant"),
            TextMessageContent(message_id="m", delta="first half, "),
            run_id="run1",
        )
        async with chat(gateway, "?session=s") as connection:
            await connection.send("attached?")
            assert await connection.recv() == "echo attached?"
            session.publish(
                TextMessageContent(message_id="m", delta="second half"),
                TextMessageEnd(message_id="m"),
                RunFinished(thread_id="s", run_id="run1", outcome=Success()),
                run_id="run1",
            )
            assert await connection.recv() == "first half, second half"


async def test_answers_to_other_people_are_shown(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway:
        gateway.sessions.add(session_id="s")
        async with chat(gateway, "?session=s") as one, chat(gateway, "?session=s") as two:
            # Each attaches twice, to find the head and then to follow from there; the bystander once.
            await gateway.sessions.attached(5)
            await one.send("hi")
            assert [await one.recv(), await two.recv()] == ["echo hi", "echo hi"]
            await two.send("ho")
            assert [await one.recv(), await two.recv()] == ["echo ho", "echo ho"]


async def test_binary_frames_are_an_error(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, chat(gateway) as connection:
        await connection.send(b"binary")
        assert await connection.recv() == "error: text frames only"
        await connection.send("hello")
        assert await connection.recv() == "echo hello"


async def test_errors_are_text_and_the_chat_goes_on(tmp_path: Path) -> None:
    limits = GatewayLimits(max_payload=100)
    async with served(tmp_path, limits=limits) as gateway, chat(gateway) as connection:
        await connection.send("first")
        assert await connection.recv() == "echo first"
        gateway.sessions.fault = StoreFull("the disk is full")
        await connection.send("x")
        assert await connection.recv() == "error: the disk is full"
        gateway.sessions.fault = ZeroDivisionError("secret")
        await connection.send("x")
        answer = await connection.recv()
        assert isinstance(answer, str)
        assert answer.startswith("error: ")
        assert "secret" not in answer
        await connection.send("\u00fc" * 60)
        assert await connection.recv() == "error: the message has more than 100 bytes"
        await connection.send("  \n")
        await connection.send("hello")
        assert await connection.recv() == "echo hello"


async def test_an_unknown_session_is_told_and_closed(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, chat(gateway, "?session=nope") as connection:
        assert await connection.recv() == "error: no session nope"
        assert await closed(connection) == 1008
        assert connection.close_reason == "no session nope"


async def test_an_observer_reads_and_does_not_write(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway:
        token = gateway.token(Role.OBSERVER)
        session = gateway.sessions.add(session_id="s")
        async with chat(gateway, "?session=s", token) as connection:
            await connection.send("hello")
            assert str(await connection.recv()).startswith("error: session/prompt needs the role member")
            session.run("run1", "seen")
            assert await connection.recv() == "seen"
        async with chat(gateway, "", token) as connection:
            assert str(await connection.recv()).startswith("error: session/new needs the role member")
            assert await closed(connection) == 1008


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic abc", "Bearer"])
async def test_chat_without_a_good_token_is_refused(tmp_path: Path, header: str | None) -> None:
    async with served(tmp_path) as gateway:
        headers = {"Authorization": header} if header else {}
        with pytest.raises(InvalidStatus) as refusal:
            async with gateway.socket("/chat", additional_headers=headers):
                pass
        assert refusal.value.response.status_code == 401
        assert refusal.value.response.headers["WWW-Authenticate"] == "Bearer"


async def test_many_bad_tokens_are_rate_limited(tmp_path: Path) -> None:
    async with served(tmp_path, limits=GatewayLimits(failed_authentications=1)) as gateway:
        statuses = []
        for _ in range(2):
            with pytest.raises(InvalidStatus) as refusal:
                async with chat(gateway, "", "wrong"):
                    pass
            statuses.append(refusal.value.response.status_code)
        assert statuses == [401, 429]


async def test_a_foreign_origin_is_refused_even_with_a_token(tmp_path: Path) -> None:
    async with served(tmp_path, origins=["http://app.example"]) as gateway:
        headers = {"Authorization": f"Bearer {gateway.owner}"}
        with pytest.raises(InvalidStatus) as refusal:
            async with gateway.socket("/chat", additional_headers=headers, origin="http://evil.example"):
                pass
        assert refusal.value.response.status_code == 403
        async with gateway.socket(
            "/chat", additional_headers=headers, origin="http://app.example"
        ) as connection:
            await connection.send("x")
            assert await connection.recv() == "echo x"


async def test_a_deleted_session_ends_the_chat(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway:
        gateway.sessions.add(session_id="s")
        async with chat(gateway, "?session=s") as connection, gateway.client() as client:
            await connection.send("x")
            await connection.recv()
            await client.call("session/delete", sessionId="s")
            assert await closed(connection) == 1000


async def test_a_revoked_token_ends_the_chat(tmp_path: Path) -> None:
    limits = GatewayLimits(close_timeout_s=0.2, revocation_poll_s=0.05)
    async with (
        served(tmp_path, limits=limits) as gateway,
        chat(gateway, "", gateway.token(Role.MEMBER, "mallory")) as connection,
    ):
        TokenRegistry(tmp_path).revoke("mallory")
        assert str(await connection.recv()).startswith("error: the token was revoked")
        assert await closed(connection) == 4401


async def test_a_slow_reader_and_a_broken_log_have_their_close_codes(tmp_path: Path) -> None:
    async with served(tmp_path, limits=GatewayLimits(max_buffered=10_000)) as gateway:
        session = gateway.sessions.add(session_id="s")
        for act, code in (
            (lambda: session.run("run1", "x" * 5_000), 4008),
            (lambda: gateway.sessions.subscriptions[-1].fail(StoreFull("gone")), 1011),
        ):
            async with chat(gateway, "?session=s") as connection:
                await connection.send("here?")
                await connection.recv()
                act()
                assert await closed(connection) == code


async def test_a_silent_chat_is_freed(tmp_path: Path) -> None:
    limits = GatewayLimits(heartbeat_ms=50, close_timeout_s=0.05)
    async with served(tmp_path, limits=limits) as gateway, chat(gateway) as connection:
        # The client stops answering pings: its transport no longer reads.
        connection.transport.pause_reading()
        await gateway.sockets(1)
        connection.transport.resume_reading()
        assert await closed(connection) == 4000


async def test_shutdown_closes_the_chat_with_1001(tmp_path: Path) -> None:
    async with served(tmp_path, bystander=False) as gateway, chat(gateway) as connection:
        await connection.send("x")
        await connection.recv()
        await gateway.gateway.stop(reason="update", resume_after_ms=0, grace_s=0.01)
        assert await closed(connection) == 1001


def shown(*events: Event, run_id: str | None = "r") -> list[str]:
    assembler = AnswerAssembler()
    texts = [
        assembler.feed(Record("s", seq, 0, run_id, Origin.USER, event)) for seq, event in enumerate(events)
    ]
    return [text for text in texts if text is not None]


def message(message_id: str, text: str, role: Any = "assistant", *, end: bool = True) -> list[Event]:
    events: list[Event] = [
        TextMessageStart(message_id=message_id, role=role),
        TextMessageContent(message_id=message_id, delta=text),
    ]
    return [*events, TextMessageEnd(message_id=message_id)] if end else events


def finished(outcome: Any) -> Event:
    return RunFinished(thread_id="s", run_id="r", outcome=outcome)


@pytest.mark.parametrize(
    ("events", "texts"),
    [
        ([*message("a", "one"), *message("b", "two"), finished(Success())], ["one\n\ntwo"]),
        ([*message("a", "mine", "user"), *message("b", "yours"), finished(Success())], ["yours"]),
        (
            [*message("a", "part", end=False), RunError(message="it broke", code="crash")],
            ["error: it broke (crash)"],
        ),
        ([*message("a", "part"), finished(Cancelled())], ["part"]),
        ([finished(Cancelled())], ["error: the run was cancelled"]),
        ([finished(Success())], [""]),
        (
            [finished(Interrupted(interrupts=[]))],
            ["error: the run waits for a decision; give it with run/resume of ash.v1"],
        ),
    ],
)
def test_how_a_run_is_told(events: list[Event], texts: list[str]) -> None:
    assert shown(*events) == texts
