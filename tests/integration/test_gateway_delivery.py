"""Events on their way to clients: order, sharing, and clients that do not keep up."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from gateway_harness import FakeSession, FakeSubscription, RawPeer, RpcError, Served, served
from structlog.testing import capture_logs

from ash.domain.errors import NotFound, SlowConsumer, StoreError
from ash.domain.events import Custom
from ash.gateway.limits import GatewayLimits

BULK = Custom(name="ash.tick", value={"x": "y" * 50_000})


async def test_the_answer_to_attach_comes_before_the_first_event(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        session = gateway.sessions.add(session_id="s")
        session.run("run1", "hi")
        await client.send("session/attach", {"sessionId": "s", "afterSeq": 0}, 5)
        first = await client.receive()
        assert first == {
            "jsonrpc": "2.0",
            "id": 5,
            "result": {"headSeq": session.head_seq, "minSeq": 1, "state": "idle", "queue": []},
        }
        assert await client.seqs(session.head_seq) == list(range(1, session.head_seq + 1))


async def test_events_have_the_envelope_of_the_protocol(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        gateway.sessions.add(session_id="s").run("run1", "hi")
        await client.call("session/attach", sessionId="s")
        event = await client.notification("session/event")
        assert event.pop("event").items() >= {"type": "RUN_STARTED", "threadId": "s", "runId": "run1"}.items()
        assert event == {
            "sessionId": "s",
            "seq": 1,
            "ts": 1000,
            "runId": "run1",
            "origin": "user",
        }


async def test_replay_goes_over_into_live_events_without_a_gap(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        session = gateway.sessions.add(session_id="s")
        session.run("run1", "x" * 2_000)
        await client.call("session/attach", sessionId="s", afterSeq=10)
        session.run("run2", "hello")
        assert await client.seqs(session.head_seq) == list(range(11, session.head_seq + 1))


async def test_attaching_again_replaces_the_subscription(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        session = gateway.sessions.add(session_id="s")
        session.run("run1", "hello")
        head = session.head_seq
        await client.call("session/attach", sessionId="s")
        await client.seqs(head)
        await client.call("session/attach", sessionId="s", afterSeq=head - 1)
        assert gateway.sessions.subscriptions[-2].closed.is_set()
        session.publish(BULK)
        assert await client.seqs(head + 1) == [head, head + 1]


async def test_a_failed_attach_leaves_the_former_one_alone(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        session = gateway.sessions.add(session_id="s")
        await client.call("session/attach", sessionId="s")
        gateway.sessions.fault = NotFound("gone")
        with pytest.raises(RpcError, match="gone"):
            await client.call("session/attach", sessionId="s")
        session.publish(BULK)
        assert await client.seqs(1) == [1]


async def test_detach_stops_the_events_and_is_idempotent(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        session = gateway.sessions.add(session_id="s")
        await client.call("session/attach", sessionId="s")
        assert await client.call("session/detach", sessionId="s") == {}
        assert not session.subscriptions
        session.publish(BULK)
        # Nothing but the answer comes.
        await client.send("session/detach", {"sessionId": "s"}, 50)
        assert (await client.receive())["id"] == 50


async def test_one_connection_follows_several_sessions(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        for name in ("a", "b", "c"):
            gateway.sessions.add(session_id=name)
            await client.call("session/attach", sessionId=name)
        for name in ("c", "a", "b"):
            gateway.sessions.sessions[name].publish(BULK)
        got = {(await client.notification("session/event"))["sessionId"] for _ in range(3)}
        assert got == {"a", "b", "c"}


async def test_attachments_are_limited_and_detaching_makes_room(tmp_path: Path) -> None:
    async with (
        served(tmp_path, limits=GatewayLimits(max_attachments=1)) as gateway,
        gateway.client() as client,
    ):
        gateway.sessions.add(session_id="a")
        gateway.sessions.add(session_id="b")
        await client.call("session/attach", sessionId="a")
        await client.call("session/attach", sessionId="a")
        with pytest.raises(RpcError) as error:
            await client.call("session/attach", sessionId="b")
        assert error.value.data == {"kind": "too_large", "limit": 1}
        await client.call("session/detach", sessionId="a")
        await client.call("session/attach", sessionId="b")


async def test_deleting_a_session_ends_its_subscriptions_and_frees_their_place(tmp_path: Path) -> None:
    async with (
        served(tmp_path, limits=GatewayLimits(max_attachments=1)) as gateway,
        gateway.client() as watcher,
        gateway.client() as deleter,
    ):
        gateway.sessions.add(session_id="a")
        gateway.sessions.add(session_id="b").publish(BULK)
        await watcher.call("session/attach", sessionId="a")
        await deleter.call("session/delete", sessionId="a")
        await watcher.call("session/attach", sessionId="b")
        assert await watcher.seqs(1) == [1]


async def test_many_clients_on_one_session_all_see_everything(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway:
        session = gateway.sessions.add(session_id="s")
        session.run("run1", "before")
        go = asyncio.Event()
        ready = asyncio.Semaphore(0)

        async def watch() -> list[int]:
            async with gateway.client() as client:
                await client.call("session/attach", sessionId="s")
                ready.release()
                await go.wait()
                return await client.seqs(session.head_seq)

        watchers = [asyncio.create_task(watch()) for _ in range(30)]
        for _ in watchers:
            await ready.acquire()
        async with gateway.client() as writer:
            await writer.call("session/prompt", sessionId="s", prompt=[{"type": "text", "text": "now"}])
        go.set()
        everything = list(range(1, session.head_seq + 1))
        assert await asyncio.gather(*watchers) == [everything] * len(watchers)
        assert gateway.metric("ash_gateway_events_sent_total") >= 30 * len(everything)


async def test_a_client_that_leaves_frees_its_subscription_and_others_go_on(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as stays:
        session = gateway.sessions.add(session_id="s")
        await stays.call("session/attach", sessionId="s")
        async with gateway.client() as leaves:
            await leaves.call("session/attach", sessionId="s")
            leaves.connection.transport.abort()
        await gateway.sessions.subscriptions[-1].closed.wait()
        session.publish(BULK)
        assert await stays.seqs(1) == [1]


async def overflow(session: FakeSession, subscription: FakeSubscription) -> None:
    """Publish until more waits for the subscription than it may hold."""
    full = asyncio.create_task(subscription.overflowed())
    while not full.done():
        session.publish(BULK)
        # Lets the gateway send what the operating system takes.
        await asyncio.sleep(0)


async def attach(gateway: Served, peer: RawPeer, after_seq: int = 0) -> FakeSubscription:
    """Attach without reading the answer."""
    attached = len(gateway.sessions.subscriptions)
    peer.send("session/attach", {"sessionId": "s", "afterSeq": after_seq})
    return await gateway.sessions.attached(attached + 1)


async def test_a_client_that_never_reads_loses_its_socket_with_4008_and_nobody_else_does(
    tmp_path: Path,
) -> None:
    limits = GatewayLimits(max_buffered=200_000, close_timeout_s=30)
    async with served(tmp_path, limits=limits) as gateway, gateway.client() as reads:
        session = gateway.sessions.add(session_id="s")
        async with gateway.raw() as peer:
            subscription = await attach(gateway, peer)
            await overflow(session, subscription)
            # It starts to read only now: what it gets must end with the close frame.
            assert await peer.until_closed() == 4008
        await subscription.closed.wait()
        assert gateway.metric("ash_gateway_slow_consumer_closes_total") == 1
        await reads.call("session/attach", sessionId="s")
        assert await reads.seqs(session.head_seq) == list(range(1, session.head_seq + 1))


async def test_a_client_that_never_reads_again_is_dropped(tmp_path: Path) -> None:
    limits = GatewayLimits(max_buffered=200_000, close_timeout_s=0.05)
    async with served(tmp_path, limits=limits) as gateway:
        async with gateway.raw() as peer:
            session = gateway.sessions.add(session_id="s")
            subscription = await attach(gateway, peer)
            await overflow(session, subscription)
            await subscription.closed.wait()
            # The bystander is left.
            assert gateway.gateway.open_sockets == 1
        assert gateway.metric("ash_gateway_slow_consumer_closes_total") == 1


async def test_a_slow_consumer_noticed_by_the_iteration_is_closed_as_well(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        gateway.sessions.add(session_id="s")
        await client.call("session/attach", sessionId="s")
        gateway.sessions.subscriptions[-1].fail(SlowConsumer("too much waits"))
        assert await client.close_code() == 4008
        assert gateway.metric("ash_gateway_slow_consumer_closes_total") == 1


async def test_a_long_replay_is_pulled_at_the_pace_of_the_client(tmp_path: Path) -> None:
    limits = GatewayLimits(heartbeat_ms=50, close_timeout_s=0.05)
    async with served(tmp_path, limits=limits) as gateway, gateway.raw() as peer:
        session = gateway.sessions.add(session_id="s")
        session.publish(*[BULK] * 1_000)
        subscription = await attach(gateway, peer)
        # Until its silence ends it, this client gets what the operating system buffers and no more.
        await subscription.closed.wait()
        assert 0 < subscription.pulled < 500
        assert gateway.metric("ash_gateway_slow_consumer_closes_total") == 0


@pytest.mark.parametrize("error", [StoreError("the log cannot be read"), ZeroDivisionError("oh")])
async def test_a_broken_subscription_closes_the_socket_so_that_the_client_attaches_again(
    tmp_path: Path, error: Exception
) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        gateway.sessions.add(session_id="s")
        await client.call("session/attach", sessionId="s")
        with capture_logs() as logs:
            gateway.sessions.subscriptions[-1].fail(error)
            assert await client.close_code() == 1011
        assert "attach again" in (client.connection.close_reason or "")
        [entry] = [line for line in logs if line["event"] == "delivery.failed"]
        assert bool(entry.get("exc_info")) is isinstance(error, ZeroDivisionError)


async def test_events_and_answers_are_whole_frames_when_they_meet(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        session = gateway.sessions.add(session_id="s")
        await client.call("session/attach", sessionId="s")
        for number in range(1, 51):
            session.publish(Custom(name="ash.tick", value={"x": "y" * 5_000}))
            await client.send("session/list", {}, number)
        frames = [json.loads(await client.connection.recv()) for _ in range(100)]
        assert [frame["id"] for frame in frames if "id" in frame] == list(range(1, 51))
        assert [f["params"]["seq"] for f in frames if "method" in f] == list(range(1, 51))
