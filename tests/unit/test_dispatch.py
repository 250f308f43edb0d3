"""The slice pool: one retry on a fresh worker, then the fallback, and the text goes on where it stopped."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from ash.domain.errors import (
    EngineCrashed,
    ModelFileError,
    PromptTooLong,
    SliceUnavailable,
    TemplateError,
)
from ash.domain.values import (
    Admitted,
    ChatMessage,
    Delta,
    Finished,
    GenerateRequest,
    SliceFacts,
    SliceItem,
    SliceNotice,
)
from ash.slices.dispatch import SlicePool
from ash.slices.fake import FakeEngine, FakeGeneration
from ash.slices.spec import SliceSpec

TEXT = "one two three four five six"


def request(text: str = TEXT, *, session: str = "s") -> GenerateRequest:
    return GenerateRequest("run", session, (ChatMessage("user", text),))


class World:
    def __init__(self) -> None:
        self.nano = FakeEngine("nano")
        self.turbo = FakeEngine("turbo")
        self.pool = SlicePool(
            {"nano": self.nano, "turbo": self.turbo},
            [
                SliceSpec("nano", "nano", "package:x", context=2048),
                SliceSpec("turbo", "turbo", "package:y", context=4096, fallback="nano"),
            ],
        )

    async def run(self, name: str = "turbo") -> list[SliceItem]:
        return [item async for item in self.pool.generate(name, request())]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.pool.close()


def text_of(items: list[SliceItem]) -> str:
    return "".join(item.text for item in items if isinstance(item, Delta))


def notices(items: list[SliceItem]) -> list[tuple[str, str, str | None]]:
    return [(item.slice, item.what, item.to) for item in items if isinstance(item, SliceNotice)]


async def test_the_first_use_loads(world: World) -> None:
    assert [fact.resident for fact in world.pool.facts()] == [False, False]
    items = await world.run()
    assert notices(items) == [("turbo", "loaded", None)]
    assert isinstance(items[1], Admitted)
    assert (text_of(items), items[-1]) == (TEXT, Finished("stop", 6))
    nano, turbo = world.pool.facts()
    assert nano == SliceFacts("nano", "nano", 2048, vision=False, resident=False)
    assert (turbo.resident, turbo.context) == (True, 4096)
    assert turbo.rates is not None
    assert turbo.rates.load_s is not None
    assert notices(await world.run()) == []


async def test_one_of_several_reports_the_load(world: World) -> None:
    runs = await asyncio.gather(world.run(), world.run(), world.run())
    assert sum(len(notices(items)) for items in runs) == 1


async def test_a_crash_is_retried_once_and_the_text_goes_on(world: World) -> None:
    world.turbo.crash_after = 2
    items = await world.run()
    assert notices(items) == [
        ("turbo", "loaded", None),
        ("turbo", "crashed", None),
        ("turbo", "loaded", None),
    ]
    assert text_of(items) == TEXT
    assert sum(isinstance(item, Finished) for item in items) == 1
    assert [each.continuation for each in world.turbo.requests] == ["", "one two"]
    crashed = next(item for item in items if isinstance(item, SliceNotice) and item.what == "crashed")
    assert "SIGKILL" in crashed.reason


async def test_a_second_crash_falls_back(world: World) -> None:
    world.turbo.crash_after = 2
    items = []
    async for item in world.pool.generate("turbo", request()):
        items.append(item)
        if isinstance(item, SliceNotice) and item.what == "crashed":
            world.turbo.crash_after = 1
    assert [entry for entry in notices(items) if entry[1] != "loaded"] == [
        ("turbo", "crashed", None),
        ("turbo", "fell back", "nano"),
    ]
    assert text_of(items) == TEXT
    assert world.nano.requests[0].continuation == "one two three"


@pytest.mark.parametrize("error", [SliceUnavailable("no memory"), ModelFileError("cut off")])
async def test_a_slice_that_cannot_be_loaded_falls_back_at_once(
    world: World, error: SliceUnavailable | ModelFileError
) -> None:
    world.turbo.refusal = error
    items = await world.run()
    assert notices(items) == [("turbo", "fell back", "nano"), ("nano", "loaded", None)]
    assert text_of(items) == TEXT


async def test_a_fallback_that_fails_too_raises_its_error(world: World) -> None:
    world.turbo.refusal = ModelFileError("cut off")
    world.nano.crash_after = 1
    with pytest.raises(EngineCrashed, match="nano"):
        await world.run()


async def test_without_a_fallback_the_error_is_raised(world: World) -> None:
    world.nano.refusal = SliceUnavailable("no memory")
    with pytest.raises(SliceUnavailable, match="no memory"):
        await world.run("nano")


@pytest.mark.parametrize("error", [PromptTooLong("too long", limit=5), TemplateError("bad")])
async def test_what_a_retry_cannot_change_is_raised(
    world: World, error: PromptTooLong | TemplateError
) -> None:
    await world.turbo.open()
    world.turbo.refusal = error
    with pytest.raises(type(error)):
        await world.run()
    assert world.nano.requests == []


async def test_an_unknown_slice(world: World) -> None:
    with pytest.raises(SliceUnavailable, match="no slice 'other'; the catalogue has nano, turbo"):
        await world.run("other")


async def test_cancel_before_the_start_loads_nothing(world: World) -> None:
    generation = world.pool.generate("turbo", request())
    generation.cancel()
    assert [item async for item in generation] == [Finished("cancelled", 0)]
    assert not world.turbo.loaded


async def test_cancel_during_the_answer(world: World) -> None:
    generation = world.pool.generate("turbo", request())
    items = []
    async for item in generation:
        items.append(item)
        if isinstance(item, Delta):
            generation.cancel()
    assert items[-1] == Finished("cancelled", 1)


async def test_cancel_during_a_load(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    loading = asyncio.Event()

    async def never() -> None:
        loading.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(world.turbo, "open", never)
    generation = world.pool.generate("turbo", request())

    async def collect() -> list[SliceItem]:
        return [item async for item in generation]

    items = asyncio.create_task(collect())
    await loading.wait()
    generation.cancel()
    assert await items == [Finished("cancelled", 0)]


async def test_cancel_between_a_crash_and_the_retry(world: World) -> None:
    world.turbo.crash_after = 1
    generation = world.pool.generate("turbo", request())
    items = []
    async for item in generation:
        items.append(item)
        if isinstance(item, SliceNotice) and item.what == "crashed":
            generation.cancel()
    assert items[-1] == Finished("cancelled", 0)


async def test_a_closed_pool_retries_nothing(world: World) -> None:
    running = aiter(world.pool.generate("turbo", request()))
    while not isinstance(await anext(running), Delta):
        pass
    await world.pool.close()
    with pytest.raises(EngineCrashed, match="closed"):
        await anext(running)
    assert not world.turbo.loaded
    with pytest.raises(SliceUnavailable, match="stopping"):
        await world.run()


async def test_a_consumer_that_leaves_ends_the_generation(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: list[FakeGeneration] = []

    def cancel(generation: FakeGeneration) -> None:
        cancelled.append(generation)

    monkeypatch.setattr(FakeGeneration, "cancel", cancel)
    running = aiter(world.pool.generate("turbo", request(session="left")))
    while not isinstance(await anext(running), Delta):
        pass
    assert cancelled == []
    await running.aclose()  # type: ignore[attr-defined] # the pool's iterators are generators
    assert len(cancelled) == 1
    again = [item async for item in world.pool.generate("turbo", request(session="left"))]
    assert text_of(again) == TEXT
