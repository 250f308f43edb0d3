"""The session service over the shipped fakes: turns, busy sessions, subscribers, restarts, faults."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence

import pytest

from ash.domain.errors import Busy, EncoderUnavailable, Forbidden, NotFound, SlowConsumer, StoreFull
from ash.domain.events import Custom, Draft, Record, RunError, RunFinished, event_type
from ash.domain.values import ModeEstimate, Principal, Role, Route, Situation
from ash.encoders.fake import HashEncoder
from ash.modes.filter import ModeFilter
from ash.session.fanout import Subscription
from ash.session.service import SessionLimits, Sessions
from ash.session.turn import TurnPorts
from ash.slices.dispatch import SlicePool
from ash.slices.fake import FakeEngine
from ash.slices.spec import SliceSpec
from ash.store.memory import MemoryEventStore

OWNER = Principal("owner", Role.OWNER, "t0")
MEMBER = Principal("mia", Role.MEMBER, "t1")
OBSERVER = Principal("olga", Role.OBSERVER, "t2")


class FixedRouter:
    def decide(self, vector: Sequence[float] | None, text: str, situation: Situation) -> Route:
        return Route("nano", "smalltalk", {"smalltalk": 1.0}, (), switched=False, reason="fixed")


class FixedObserver:
    def observe(self, vector: Sequence[float], text: str) -> ModeEstimate:
        return ModeEstimate({"analytic": 0.1, "creative": 0.1, "conversational": 0.8}, None)

    def pull(self, vector: Sequence[float], text: str) -> dict[str, float]:
        return {"analytic": 0.0, "creative": 0.0, "conversational": 0.0}


class DownEncoder(HashEncoder):
    async def encode(self, texts: Sequence[str]) -> list[list[float]]:
        raise EncoderUnavailable("down")


class FullStore(MemoryEventStore):
    """A store whose disk can be full."""

    full = False

    async def append(self, session_id: str, drafts: Sequence[Draft]) -> list[Record]:
        if self.full:
            raise StoreFull("the disk is full")
        return await super().append(session_id, drafts)


class World:
    """A service with its fakes; `restart` keeps the store and forgets everything else."""

    def __init__(self, encoder: HashEncoder | None = None) -> None:
        self.store = FullStore(clock=itertools.count(1).__next__)
        self.numbers = itertools.count(1)
        self.encoder = encoder or HashEncoder()
        self.start()

    def start(self) -> None:
        self.engine = FakeEngine("nano")
        pool = SlicePool({"nano": self.engine}, [SliceSpec("nano", "nano", "path:none")])
        ports = TurnPorts(
            encoder=self.encoder,
            router=FixedRouter(),
            observer=FixedObserver(),
            slices=pool,
            monotonic=time.monotonic,
            new_id=lambda prefix: f"{prefix}{next(self.numbers)}",
            default_persona=None,
            coalesce_s=0.0,
        )
        self.service = Sessions(self.store, ports, ModeFilter, SessionLimits(queue_length=3))

    async def new(self, principal: Principal = OWNER) -> str:
        return await self.service.new_session(principal, title="", persona=None, slice_name=None, goals=())

    async def prompt(
        self,
        session: str,
        text: str = "hello there my friend",
        when_busy: str = "enqueue",
        key: str | None = None,
    ) -> tuple[str, str]:
        receipt = await self.service.prompt(
            OWNER, session, text=text, images=(), idempotency_key=key, when_busy=when_busy
        )
        return receipt.run_id, receipt.disposition

    async def follow(self, session: str, after: int = 0) -> Subscription:
        return await self.service.attach(OWNER, session, after_seq=after, max_buffered=1 << 20)

    async def until(self, session: str, run_id: str, kind: str, after: int = 0) -> list[Record]:
        """Records from `after` up to the first event of `kind` in the run."""
        found = []
        subscription = await self.follow(session, after)
        async for published in subscription:
            found.append(published.record)
            if published.record.run_id == run_id and event_type(published.record.event) == kind:
                subscription.close()
        return found


@pytest.fixture
async def world() -> World:
    built = World()
    await built.store.open()
    await built.encoder.open()
    return built


def kinds(records: Sequence[Record], run_id: str) -> list[str]:
    names = []
    for record in records:
        if record.run_id == run_id:
            event = record.event
            names.append(event.name if isinstance(event, Custom) else event_type(event))
    return names


async def test_a_turn_is_a_sentence_of_events(world: World) -> None:
    session = await world.new()
    run_id, disposition = await world.prompt(session)
    records = await world.until(session, run_id, "RUN_FINISHED")
    assert disposition == "started"
    names = [name for name in kinds(records, run_id) if name != "TEXT_MESSAGE_CONTENT"]
    observe = ["STEP_STARTED", "ash.mode", "STEP_FINISHED"]
    route = ["STEP_STARTED", "ash.route", "STEP_FINISHED"]
    generate = ["STEP_STARTED", "TEXT_MESSAGE_START", "TEXT_MESSAGE_END", "STEP_FINISHED"]
    assert names == ["RUN_STARTED", "ash.input", *observe, *route, *generate, *observe, "RUN_FINISHED"]


async def test_the_same_key_starts_nothing(world: World) -> None:
    session = await world.new()
    first = await world.prompt(session, key="k")
    await world.until(session, first[0], "RUN_FINISHED")
    assert await world.prompt(session, key="k") == first
    assert len(await world.store.runs(session)) == 1


async def test_a_busy_session_queues_rejects_and_cancels(world: World) -> None:
    session = await world.new()
    await world.engine.open()
    world.engine.pause()
    active, _ = await world.prompt(session)
    queued, disposition = await world.prompt(session)
    assert disposition == "queued"
    with pytest.raises(Busy):
        await world.prompt(session, when_busy="reject")
    assert await world.service.cancel(OWNER, session, None) == [queued, active]
    records = await world.until(session, active, "RUN_FINISHED")
    last = records[-1].event
    assert isinstance(last, RunFinished)
    assert type(last.outcome).__name__ == "Cancelled"
    assert kinds(await world.store.read(session), queued) == []


async def test_an_interrupt_ends_the_active_run_and_goes_first(world: World) -> None:
    session = await world.new()
    await world.engine.open()
    world.engine.pause()
    active, _ = await world.prompt(session)
    waiting, _ = await world.prompt(session)
    urgent, _ = await world.prompt(session, when_busy="interrupt")
    await world.until(session, active, "RUN_FINISHED")
    world.engine.resume()
    records = await world.until(session, waiting, "RUN_FINISHED")
    started = [r.run_id for r in records if event_type(r.event) == "RUN_STARTED"]
    assert started == [active, urgent, waiting]


async def test_a_steered_input_is_answered_in_the_same_run(world: World) -> None:
    session = await world.new()
    await world.engine.open()
    world.engine.pause()
    active, _ = await world.prompt(session, "first question")
    assert (await world.prompt(session, "second thought", when_busy="steer"))[0] == active
    world.engine.resume()
    records = await world.until(session, active, "RUN_FINISHED")
    assert len(await world.store.runs(session)) == 1
    assert kinds(records, active).count("ash.input") == 2
    answers = [m.text for m in await world.store.messages(session) if m.role == "assistant"]
    assert "second thought" in answers[-1]


async def test_every_subscriber_sees_every_event_once_from_any_cursor(world: World) -> None:
    session = await world.new()
    run_id, _ = await world.prompt(session)
    whole, *others = await asyncio.gather(
        *(world.until(session, run_id, "RUN_FINISHED", after) for after in (0, 2, 7))
    )
    assert [record.seq for record in whole] == sorted({record.seq for record in whole})
    for after, records in zip((2, 7), others, strict=True):
        assert records == [record for record in whole if record.seq > after]


async def test_a_slow_consumer_is_told_and_the_run_goes_on(world: World) -> None:
    session = await world.new()
    subscription = await world.service.attach(OWNER, session, after_seq=0, max_buffered=10)
    events = aiter(subscription)
    await anext(events)
    pending = asyncio.ensure_future(anext(events))
    run_id, _ = await world.prompt(session)
    await world.until(session, run_id, "RUN_FINISHED")
    with pytest.raises(SlowConsumer):
        await pending
    await subscription.overflowed()


async def test_roles_and_owners(world: World) -> None:
    session = await world.new()
    with pytest.raises(Forbidden):
        await world.service.cancel(MEMBER, session, None)
    with pytest.raises(Forbidden):
        await world.service.delete(OBSERVER, session)
    mine = await world.new(MEMBER)
    rows, _ = await world.service.list_sessions(MEMBER, limit=10, cursor=None)
    assert [row.session_id for row in rows] == [mine]


async def test_a_deleted_session_is_gone_for_everyone(world: World) -> None:
    session = await world.new()
    await world.engine.open()
    world.engine.pause()
    await world.prompt(session)
    subscription = await world.follow(session)
    reading = asyncio.ensure_future(_drain(subscription))
    await world.service.delete(OWNER, session)
    await reading
    with pytest.raises(NotFound):
        await world.prompt(session)
    assert await world.store.head(session) is None


async def _drain(subscription: Subscription) -> None:
    async for _ in subscription:
        pass


async def test_a_restart_ends_the_open_run_and_answers_its_input_again(world: World) -> None:
    session = await world.new()
    await world.engine.open()
    world.engine.pause()
    cut_off, _ = await world.prompt(session, "what was cut off")
    queued, _ = await world.prompt(session, "what waited")
    await world.until(session, cut_off, "STEP_STARTED")
    await world.service.stop()
    world.start()
    await world.service.recover()
    records = await world.until(session, queued, "RUN_FINISHED")
    error = next(r.event for r in records if r.run_id == cut_off and isinstance(r.event, RunError))
    assert error.code == "interrupted"
    origins = [r.origin for r in records if event_type(r.event) == "RUN_STARTED"]
    assert origins == ["user", "resume", "user"]
    answers = [m.text for m in await world.store.messages(session) if m.role == "assistant"]
    assert answers == ["what was cut off", "what waited"]
    await world.service.stop()
    world.start()
    assert await world.service.recover() == 0


async def test_a_crashed_engine_is_tried_again_and_the_log_says_so(world: World) -> None:
    session = await world.new()
    world.engine.crash_after = 2
    run_id, _ = await world.prompt(session, "one two three four five")
    records = await world.until(session, run_id, "RUN_FINISHED")
    notices = [r for r in records if isinstance(r.event, Custom) and r.event.name == "ash.slice"]
    assert "crashed" in [r.event.value["what"] for r in notices if isinstance(r.event, Custom)]
    assert all(r.run_id is None for r in notices)
    answers = [m.text for m in await world.store.messages(session) if m.role == "assistant"]
    assert answers == ["one two three four five"]


async def test_a_full_disk_loses_nothing_and_the_run_ends_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ash.session.agent.STORE_RETRY_S", (0.0,))
    session = await world.new()
    await world.engine.open()
    world.engine.pause()
    run_id, _ = await world.prompt(session)
    await world.until(session, run_id, "STEP_STARTED")
    world.store.full = True
    world.engine.resume()
    with pytest.raises(StoreFull):
        await world.prompt(session)
    world.store.full = False
    records = await world.until(session, run_id, "RUN_ERROR")
    terminals = [r for r in records if isinstance(r.event, RunError | RunFinished)]
    assert len(terminals) == 1
    again, _ = await world.prompt(session)
    await world.until(session, again, "RUN_FINISHED")


async def test_without_an_encoder_the_session_still_answers() -> None:
    world = World(DownEncoder())
    await world.store.open()
    session = await world.new()
    run_id, _ = await world.prompt(session)
    records = await world.until(session, run_id, "RUN_FINISHED")
    modes = [r.event.value for r in records if isinstance(r.event, Custom) and r.event.name == "ash.mode"]
    assert [value["observed"] for value in modes] == [False]
