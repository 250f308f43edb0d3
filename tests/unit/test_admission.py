"""The slice pool under a memory budget: who waits, who is evicted, who is told. The engines are fakes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

import pytest

from ash.domain.errors import EngineCrashed, ModelFileError, SliceTooLarge, SliceUnavailable
from ash.domain.values import (
    Admitted,
    ChatMessage,
    Delta,
    Finished,
    GenerateRequest,
    SliceFacts,
    SliceItem,
    SliceNotice,
    SliceRates,
)
from ash.slices.dispatch import SlicePool
from ash.slices.fake import FakeEngine
from ash.slices.residency import ResidencyLimits
from ash.slices.sizes import SliceSize
from ash.slices.spec import RemoteSpec, SliceSpec

TEXT = "one two three four five six"


class FixedSizes:
    """A SizeSource that knows the sizes; what is remembered is kept for the test to see."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.remembered: dict[str, int] = {}
        self.writes = 0
        self.failure: ModelFileError | None = None

    def expected(self, spec: SliceSpec) -> SliceSize:
        if self.failure is not None:
            raise self.failure
        return SliceSize(self.sizes[spec.name], is_measured=False)

    def remember(self, spec: SliceSpec, measured_bytes: int) -> None:
        self.remembered[spec.name] = measured_bytes
        self.writes += 1


class World:
    """Slices a and b of 60 of 100 bytes each; time stands still unless a test moves it."""

    def __init__(
        self,
        specs: Iterable[SliceSpec] = (),
        *,
        sizes: dict[str, int] | None = None,
        min_resident_s: float = 0.0,
        patience_s: float = 1000.0,
    ) -> None:
        specs = list(specs) or [SliceSpec(name, "nano", "package:x", slots=2) for name in ("a", "b")]
        self.now = 0.0
        self.sizes = FixedSizes(sizes or {spec.name: 60 for spec in specs})
        self.measured: dict[str, int] = {}
        self.measurements: list[str] = []
        self.engines = {spec.name: FakeEngine(spec.name) for spec in specs}
        self.pool = SlicePool(
            self.engines,
            specs,
            limits=ResidencyLimits(100, min_resident_s, patience_s),
            sizes=self.sizes,
            measure={spec.name: self._measure(spec.name) for spec in specs},
            clock=lambda: self.now,
        )
        self.items: dict[str, list[SliceItem]] = {}
        self.tasks: list[asyncio.Task[list[SliceItem]]] = []

    def _measure(self, name: str) -> Callable[[], int]:
        def measure() -> int:
            self.measurements.append(name)
            return self.measured.get(name, 0)

        return measure

    def start(self, name: str, session: str = "s") -> asyncio.Task[list[SliceItem]]:
        """A run in the background; what it has shown so far stands in `items` under its session."""
        request = GenerateRequest("run", session, (ChatMessage("user", TEXT),))
        generation = self.pool.generate(name, request)

        shown = self.items[session] = []

        async def follow() -> list[SliceItem]:
            async for item in generation:
                shown.append(item)  # noqa: PERF401 - tests look at it meanwhile
            return shown

        self.tasks.append(asyncio.create_task(follow()))
        return self.tasks[-1]

    async def run(self, name: str, session: str = "s") -> list[SliceItem]:
        return await self.start(name, session)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the others run until `condition` holds; the suite's time limit is the limit."""
        while not condition():
            # Sizes are looked up and measured in threads, so turns of the loop alone may be too few.
            await asyncio.to_thread(lambda: None)

    def loaded(self) -> set[str]:
        return {name for name, engine in self.engines.items() if engine.loaded}


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.pool.close()


def told(items: list[SliceItem]) -> list[tuple[str, str]]:
    return [(item.slice, item.what) for item in items if isinstance(item, SliceNotice)]


def text_of(items: list[SliceItem]) -> str:
    return "".join(item.text for item in items if isinstance(item, Delta))


async def test_an_idle_slice_makes_room_and_the_run_is_told(world: World) -> None:
    assert told(await world.run("a")) == [("a", "loaded")]
    items = await world.run("b")
    assert told(items) == [("a", "evicted"), ("b", "loaded")]
    assert text_of(items) == TEXT
    assert world.loaded() == {"b"}
    assert told(await world.run("b")) == []


async def test_a_running_generation_is_never_aborted_for_a_load(world: World) -> None:
    world.engines["a"].pause()
    running = world.start("a", "one")
    await world.until(lambda: any(isinstance(item, Admitted) for item in world.items["one"]))
    waiting = world.start("b", "two")
    await world.until(lambda: world.pool.admission.is_waiting("b"))
    assert world.loaded() == {"a"}
    world.engines["a"].resume()
    assert text_of(await running) == TEXT
    assert told(await waiting) == [("a", "evicted"), ("b", "loaded")]


async def test_requests_accumulate_while_the_other_drains(world: World) -> None:
    """A B A B A B: two loads."""
    world.engines["a"].pause()
    runs = [world.start("a", "s0")]
    await world.until(lambda: len(world.engines["a"].requests) == 1)
    for number in range(1, 6):
        runs.append(world.start("ab"[number % 2], f"s{number}"))
        await world.until(lambda: world.pool.admission.is_waiting("b"))
    world.engines["a"].resume()
    everything = [notice for run in runs for notice in told(await run)]
    assert sorted(everything) == [("a", "evicted"), ("a", "loaded"), ("b", "loaded")]


async def test_after_its_patience_a_busy_slice_lets_nobody_new_in() -> None:
    world = World(patience_s=10.0)
    world.engines["a"].pause()
    world.start("a", "first")
    await world.until(lambda: len(world.engines["a"].requests) == 1)
    world.start("b", "waits")
    await world.until(lambda: world.pool.admission.is_waiting("b"))
    world.start("a", "early")
    await world.until(lambda: len(world.engines["a"].requests) == 2)
    world.now = 10.0
    world.start("a", "late")
    await world.until(lambda: world.pool.admission.is_waiting("a"))
    world.engines["a"].resume()
    await asyncio.gather(*world.tasks)
    assert [request.session_id for request in world.engines["a"].requests] == ["first", "early", "late"]
    assert told(world.items["waits"]) == [("a", "evicted"), ("b", "loaded")]
    assert told(world.items["late"]) == [("b", "evicted"), ("a", "loaded")]
    await world.pool.close()


async def test_time_alone_ends_a_stay() -> None:
    """With the real clock: nobody comes or goes when the time of slice a is over."""
    specs = [SliceSpec(name, "nano", "package:x") for name in ("a", "b")]
    engines = {spec.name: FakeEngine(spec.name) for spec in specs}
    pool = SlicePool(
        engines, specs, limits=ResidencyLimits(100, min_resident_s=0.05), sizes=FixedSizes({"a": 60, "b": 60})
    )
    request = GenerateRequest("run", "s", (ChatMessage("user", TEXT),))
    assert text_of([item async for item in pool.generate("a", request)]) == TEXT
    assert told([item async for item in pool.generate("b", request)]) == [("a", "evicted"), ("b", "loaded")]
    await pool.close()


async def test_cancel_while_waiting_for_room(world: World) -> None:
    world.engines["a"].pause()
    running = world.start("a", "one")
    await world.until(lambda: len(world.engines["a"].requests) == 1)
    generation = world.pool.generate("b", GenerateRequest("run", "two", (ChatMessage("user", TEXT),)))
    items: list[SliceItem] = []

    async def follow() -> None:
        items.extend([item async for item in generation])

    following = asyncio.create_task(follow())
    await world.until(lambda: world.pool.admission.is_waiting("b"))
    generation.cancel()
    await following
    assert items == [Finished("cancelled", 0)]
    assert not world.pool.admission.is_waiting("b")
    world.engines["a"].resume()
    await running
    assert world.loaded() == {"a"}, "nobody wants the other any more"


async def test_a_load_that_nobody_waits_for_any_more(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on; the slice may go at once; and nobody is told of that load later."""
    loading, may_load, opened = asyncio.Event(), asyncio.Event(), world.engines["a"].open

    async def slow() -> None:
        loading.set()
        await may_load.wait()
        await opened()

    monkeypatch.setattr(world.engines["a"], "open", slow)
    generation = world.pool.generate("a", GenerateRequest("run", "one", (ChatMessage("user", TEXT),)))

    async def follow() -> list[SliceItem]:
        return [item async for item in generation]

    following = asyncio.create_task(follow())
    await loading.wait()
    generation.cancel()
    assert await following == [Finished("cancelled", 0)]
    may_load.set()
    assert told(await world.run("b")) == [("a", "evicted"), ("b", "loaded")]
    assert told(await world.run("a")) == [("b", "evicted"), ("a", "loaded")]


async def test_a_consumer_that_is_cancelled_while_waiting_leaves_nothing(world: World) -> None:
    world.engines["a"].pause()
    running = world.start("a", "one")
    await world.until(lambda: len(world.engines["a"].requests) == 1)
    waiting = world.start("b", "two")
    await world.until(lambda: world.pool.admission.is_waiting("b"))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not world.pool.admission.is_waiting("b")
    world.engines["a"].resume()
    await running
    assert told(await world.run("b")) == [("a", "evicted"), ("b", "loaded")]


async def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    world = World(sizes={"a": 60, "b": 130_000_000})
    await world.run("a")
    with pytest.raises(SliceTooLarge, match=r"slice b needs 130 MB .* 0 MB of the budget") as caught:
        await world.run("b")
    assert caught.value.details() == {"neededBytes": 130_000_000, "availableBytes": 100}
    assert world.loaded() == {"a"}, "nothing is evicted for it"
    await world.pool.close()


async def test_what_does_not_fit_falls_back() -> None:
    specs = [SliceSpec("big", "turbo", "package:x", fallback="a"), SliceSpec("a", "nano", "package:y")]
    world = World(specs, sizes={"big": 200, "a": 60})
    items = await world.run("big")
    assert told(items) == [("big", "fell back"), ("a", "loaded")]
    assert text_of(items) == TEXT
    await world.pool.close()


async def test_a_pinned_slice_stays() -> None:
    specs = [SliceSpec("kept", "nano", "package:x", pinned=True), SliceSpec("b", "nano", "package:y")]
    world = World(specs)
    await world.run("kept")
    with pytest.raises(SliceTooLarge) as caught:
        await world.run("b")
    assert (caught.value.needed_bytes, caught.value.available_bytes) == (60, 40)
    assert world.loaded() == {"kept"}
    await world.pool.close()


async def test_remote_slices_take_no_room() -> None:
    remote = SliceSpec("r", "turbo", "openai:x", remote=RemoteSpec("http://127.0.0.1:1/v1"))
    world = World([SliceSpec("a", "nano", "package:x"), remote], sizes={"a": 100})
    await world.run("a")
    items = await world.run("r")
    assert told(items) == [("r", "loaded")]
    assert world.loaded() == {"a", "r"}
    await world.pool.close()


async def test_a_load_that_fails_is_reported_to_all_who_wait(world: World) -> None:
    world.engines["a"].refusal = SliceUnavailable("no memory")
    runs = [world.start("a", f"s{number}") for number in range(3)]
    for run in runs:
        with pytest.raises(SliceUnavailable, match="no memory"):
            await run
    world.engines["a"].refusal = None
    assert text_of(await world.run("a")) == TEXT


async def test_an_engine_that_fails_by_accident_takes_its_runs_along_by_name(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken() -> None:
        raise RuntimeError("a fault of the engine")

    monkeypatch.setattr(world.engines["a"], "open", broken)
    with pytest.raises(SliceUnavailable, match="slice a cannot be loaded: RuntimeError: a fault"):
        await world.run("a")
    monkeypatch.undo()
    await world.run("a")
    monkeypatch.setattr(world.engines["a"], "close", broken)
    with pytest.raises(SliceUnavailable, match="slice a cannot be evicted: RuntimeError: a fault"):
        await world.run("b")
    monkeypatch.undo()
    assert told(await world.run("b")) == [("a", "evicted"), ("b", "loaded")]


async def test_a_model_file_that_is_missing(world: World) -> None:
    world.sizes.failure = ModelFileError("there is no model file")
    with pytest.raises(ModelFileError, match="there is no model file"):
        await world.run("a")
    world.sizes.failure = None
    assert text_of(await world.run("a")) == TEXT


async def test_a_crash_gives_the_memory_back_and_the_run_comes_again(world: World) -> None:
    world.engines["a"].pause()
    crashed = world.start("a", "one")
    await world.until(lambda: len(world.engines["a"].requests) == 1)
    waiting = world.start("b", "two")
    await world.until(lambda: world.pool.admission.is_waiting("b"))
    world.engines["a"].crash()
    world.engines["a"].resume()
    items = await crashed
    assert told(items)[:2] == [("a", "loaded"), ("a", "crashed")]
    assert text_of(items) == text_of(await waiting) == TEXT


async def test_a_crashed_slice_takes_no_room(world: World) -> None:
    await world.run("a")
    world.engines["a"].crash()
    assert told(await world.run("b")) == [("b", "loaded")]


async def test_closing_turns_away_who_waits(world: World) -> None:
    world.engines["a"].pause()
    running = world.start("a", "one")
    await world.until(lambda: len(world.engines["a"].requests) == 1)
    waiting = world.start("b", "two")
    await world.until(lambda: world.pool.admission.is_waiting("b"))
    await world.pool.close()
    with pytest.raises(SliceUnavailable, match="stopping"):
        await waiting
    with pytest.raises(EngineCrashed, match="closed"):
        await running
    assert world.loaded() == set()


async def test_closing_while_a_size_is_looked_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    looking = asyncio.Event()

    async def never(*_args: object) -> None:
        looking.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("ash.slices.measurement.asyncio.to_thread", never)
    run = world.start("a")
    await looking.wait()
    await world.pool.close()
    with pytest.raises(SliceUnavailable, match="stopping"):
        await run


async def test_measured_sizes_replace_the_estimate_and_are_remembered(world: World) -> None:
    def sizes() -> list[int | None]:
        return [facts.rates.bytes if facts.rates else None for facts in world.pool.facts()]

    assert sizes() == [None, None]
    world.measured = {"a": 30, "b": 35}
    await world.run("a")
    await world.until(lambda: world.sizes.remembered == {"a": 30})
    assert told(await world.run("b")) == [("b", "loaded")], "both fit, which the estimates did not say"
    await world.until(lambda: world.sizes.remembered == {"a": 30, "b": 35})
    assert sizes() == [30, 35]
    world.now = 5.0
    world.measured["a"] = 90
    await world.run("a")
    await world.until(lambda: world.loaded() == {"a"})
    assert world.sizes.remembered == {"a": 90, "b": 35}


async def test_a_slice_is_measured_now_and_then_and_after_each_load(world: World) -> None:
    world.measured = {"a": 50, "b": 60}
    for now, measurements in ((0.0, 1), (4.9, 1), (5.0, 2), (9.9, 2), (10.0, 3)):
        world.now = now
        await world.run("a")
        await world.pool.admission.measured()
        assert world.measurements == ["a"] * measurements
    assert world.sizes.writes == 1, "nothing has changed"
    await world.run("b")
    await world.run("a")
    await world.pool.admission.measured()
    assert world.measurements.count("a") == 4


async def test_rates_are_measured(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Timed:
        """A generation that says it took two seconds of prefill and one of decoding."""

        def cancel(self) -> None:
            pass

        async def __aiter__(self) -> AsyncIterator[Admitted | Finished]:
            yield Admitted(100, 40)
            yield Finished("stop", 21, prefill_s=2.0, decode_s=1.0)

    opened = world.engines["a"].open

    async def slow() -> None:
        world.now += 3.0
        await opened()

    monkeypatch.setattr(world.engines["a"], "open", slow)
    monkeypatch.setattr(world.engines["a"], "generate", lambda _request: Timed())
    await world.run("a")
    facts = world.pool.facts()[0]
    rates = SliceRates(load_s=3.0, prefill_tokens_s=30.0, decode_tokens_s=20.0, bytes=60)
    assert facts == SliceFacts("a", "nano", 2048, vision=False, resident=True, rates=rates)
