"""Heartbeats, vanished peers, revoked tokens, and the end of the server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from gateway_harness import HOSTS, Client, RpcError, served, signal_after
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs
from websockets.exceptions import InvalidStatus

from ash.domain.errors import AshError
from ash.domain.values import Role
from ash.gateway.limits import GatewayLimits
from ash.gateway.metrics import GatewayMetrics
from ash.gateway.tokens import TokenRegistry
from ash.gateway.ws import Gateway

QUICK = GatewayLimits(heartbeat_ms=50, close_timeout_s=0.05, revocation_poll_s=0.05)


async def test_the_server_beats_and_a_client_that_answers_pings_stays(tmp_path: Path) -> None:
    async with served(tmp_path, limits=QUICK) as gateway, gateway.client() as client:
        # More beats than a silent client would live to see.
        for _ in range(5):
            assert (await client.notification("server/heartbeat"))["ts"] > 1_600_000_000_000
        assert await client.call("session/list")


async def test_a_half_open_socket_is_told_4000_and_freed(tmp_path: Path) -> None:
    async with served(tmp_path, limits=QUICK) as gateway, gateway.raw() as peer:
        gateway.sessions.add(session_id="s")
        peer.send("session/attach", {"sessionId": "s"})
        assert await peer.until_closed() == 4000
        await peer.until_dropped()
        assert gateway.gateway.open_sockets == 1
        await gateway.sessions.subscriptions[-1].closed.wait()


async def test_a_peer_that_neither_reads_nor_answers_is_freed(tmp_path: Path) -> None:
    async with served(tmp_path, limits=QUICK) as gateway, gateway.raw() as peer:
        session = gateway.sessions.add(session_id="s")
        session.run("run1", "x" * 20_000)
        peer.send("session/attach", {"sessionId": "s"})
        subscription = await gateway.sessions.attached(2)
        await subscription.closed.wait()
        assert gateway.gateway.open_sockets == 1


async def test_a_long_request_is_not_taken_for_silence(tmp_path: Path) -> None:
    async with served(tmp_path, limits=QUICK) as gateway, gateway.client() as client:
        gateway.sessions.entered.clear()
        gateway.sessions.gate = asyncio.Event()
        # More frames than wait in front of the one in work: the server stops reading, pongs too.
        for number in range(1, 31):
            await client.send("session/list", {}, number)
        await gateway.sessions.entered.wait()
        gate, gateway.sessions.gate = gateway.sessions.gate, None
        async with gateway.client() as other:
            for _ in range(5):
                await other.notification("server/heartbeat")
        gate.set()
        answers = []
        while len(answers) < 30:
            frame = await client.receive()
            answers += [frame["id"]] if "id" in frame else []
        assert answers == list(range(1, 31))


async def test_revoking_a_token_closes_its_sockets_and_no_others(tmp_path: Path) -> None:
    limits = GatewayLimits(close_timeout_s=0.2, revocation_poll_s=0.05)
    async with served(tmp_path, limits=limits) as gateway:
        token = gateway.token(Role.MEMBER, "mallory")
        async with gateway.client(token) as one, gateway.client(token) as two, gateway.client() as other:
            # As the command line does: another registry on the same folder.
            TokenRegistry(tmp_path).revoke("mallory")
            for client in (one, two):
                answer = await client.receive()
                assert (answer["id"], answer["error"]["data"]["kind"]) == (None, "unauthenticated")
                assert await client.close_code() == 4401
            assert await other.call("session/list")


async def test_a_revoked_client_that_does_not_read_is_dropped_and_does_nothing_more(tmp_path: Path) -> None:
    limits = GatewayLimits(close_timeout_s=0.05, revocation_poll_s=0.05)
    async with served(tmp_path, limits=limits) as gateway:
        token = gateway.token(Role.MEMBER, "mallory")
        async with gateway.raw(token) as peer:
            gateway.sessions.add(session_id="s").run("run1", "x" * 20_000)
            gateway.sessions.entered.clear()
            gate = gateway.sessions.gate = asyncio.Event()
            peer.send("session/attach", {"sessionId": "s"})
            for _ in range(5):
                peer.send("session/new", {})
            await gateway.sessions.entered.wait()
            gateway.sessions.gate = None
            TokenRegistry(tmp_path).revoke("mallory")
            await gateway.sockets(1)
            gate.set()
            subscription = await gateway.sessions.attached(2)
            await subscription.closed.wait()
            assert "new" not in {name for name, _, _ in gateway.sessions.calls}


async def test_what_a_client_sends_after_its_token_was_revoked_is_not_executed(tmp_path: Path) -> None:
    limits = GatewayLimits(close_timeout_s=0.2, revocation_poll_s=0.01)
    async with served(tmp_path, limits=limits) as gateway:
        looked = asyncio.Event()
        signal_after(gateway.tokens, "refresh", looked)
        # This client does not answer the close frame, so its socket stays open for a while.
        async with gateway.raw(gateway.token(Role.MEMBER, "mallory")) as peer:
            [revoked] = TokenRegistry(tmp_path).revoke("mallory")
            while gateway.tokens.is_active(revoked.id):
                looked.clear()
                await looked.wait()
            peer.send("session/new", {})
            await peer.until_dropped()
        assert "new" not in {name for name, _, _ in gateway.sessions.calls}


async def test_a_broken_token_file_neither_opens_nor_locks_a_running_server(tmp_path: Path) -> None:
    limits = GatewayLimits(close_timeout_s=0.2, revocation_poll_s=0.01)
    async with served(tmp_path, limits=limits) as gateway, gateway.client() as client:
        file = tmp_path / "tokens.json"
        good = file.read_bytes()
        looked = asyncio.Event()
        signal_after(gateway.tokens, "refresh", looked)
        with capture_logs() as logs:
            file.write_text("{ not json")
            for _ in range(3):
                looked.clear()
                await looked.wait()
            assert await client.call("session/list")
            async with gateway.client() as another:
                assert await another.call("session/list")
        assert len([line for line in logs if line["event"] == "tokens.unreadable"]) == 1
        file.write_bytes(good)


async def test_shutdown_is_announced_and_clients_may_finish(tmp_path: Path) -> None:
    async with served(tmp_path, bystander=False) as gateway, gateway.client() as client:
        gateway.sessions.add(session_id="s")
        gateway.sessions.refusing = True
        base = gateway.base
        stop = asyncio.create_task(gateway.gateway.stop(reason="update", resume_after_ms=1500, grace_s=30))
        assert await client.notification("server/shutdown") == {"reason": "update", "resumeAfterMs": 1500}
        with pytest.raises(RpcError) as error:
            await client.call("session/prompt", sessionId="s", prompt=[{"type": "text", "text": "x"}])
        assert (error.value.code, error.value.kind) == (-32009, "shutting_down")
        assert await client.call("session/list")
        with pytest.raises((OSError, InvalidStatus)):
            await asyncio.open_connection(*base.removeprefix("ws://").split(":"))
        # The grace time is long: the stop ends because the last client leaves.
        await client.connection.close()
        await stop


async def test_after_the_grace_time_clients_are_closed_with_1001(tmp_path: Path) -> None:
    async with (
        served(tmp_path, bystander=False) as gateway,
        gateway.client() as client,
        gateway.raw(),
        gateway.socket() as stranger,
    ):
        await gateway.gateway.stop(reason="update", resume_after_ms=0, grace_s=0.01)
        assert await client.close_code() == 1001
        assert await Client(stranger).close_code() == 1001
        assert gateway.gateway.open_sockets == 0


async def test_sockets_without_a_handshake_do_not_hold_up_the_end(tmp_path: Path) -> None:
    async with served(tmp_path, bystander=False, limits=GatewayLimits(first_frame_timeout_s=250)) as gateway:
        reader, writer = await asyncio.open_connection(*gateway.gateway.address)
        await gateway.sockets(1)
        await gateway.gateway.stop(reason="update", resume_after_ms=0, grace_s=0.01)
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        assert gateway.gateway.open_sockets == 0


async def test_a_request_that_never_ends_does_not_hold_up_the_end(tmp_path: Path) -> None:
    limits = GatewayLimits(close_timeout_s=0.05)
    async with served(tmp_path, bystander=False, limits=limits) as gateway, gateway.client() as client:
        gateway.sessions.entered.clear()
        gateway.sessions.gate = asyncio.Event()
        await client.send("session/list", {}, 1)
        await gateway.sessions.entered.wait()
        with capture_logs() as logs:
            await gateway.gateway.stop(reason="update", resume_after_ms=0, grace_s=0.01)
        assert "gateway.request_abandoned" in {line["event"] for line in logs}


async def test_stopping_twice_or_unstarted_does_nothing(tmp_path: Path) -> None:
    async with served(tmp_path, bystander=False) as gateway:
        for _ in range(2):
            await gateway.gateway.stop(reason="x", resume_after_ms=0, grace_s=0)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (None, ("gateway.port", "ASH_GATEWAY__PORT", "in use")),
        (("192.0.2.1", 80), ("gateway.host", "192.0.2.1:80")),
    ],
)
async def test_an_address_that_cannot_be_listened_on_names_the_setting(
    tmp_path: Path, address: Any, words: tuple[str, ...]
) -> None:
    async with served(tmp_path) as gateway:
        host, port = address or gateway.gateway.address
        second = Gateway(
            gateway.sessions,
            gateway.tokens,
            host=host,
            port=port,
            hosts=HOSTS,
            origins=(),
            limits=GatewayLimits(),
            metrics=GatewayMetrics(CollectorRegistry()),
            version="0",
        )
        with pytest.raises(AshError) as error:
            await second.start()
        assert all(word in str(error.value) for word in words)


async def test_connections_are_counted(tmp_path: Path) -> None:
    async with served(tmp_path, bystander=False) as gateway:
        async with gateway.client(), gateway.client():
            assert gateway.metric("ash_gateway_connections", path="/ws") == 2
        await gateway.gateway.stop(reason="x", resume_after_ms=0, grace_s=0)
        assert gateway.metric("ash_gateway_connections", path="/ws") == 0
