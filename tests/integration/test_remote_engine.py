"""RemoteEngine at an endpoint with faults on purpose: each has its error, and the next run works."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiohttp import web
from structlog.testing import capture_logs

from ash.domain.errors import EngineCrashed, FormatError, PromptTooLong, SliceUnavailable
from ash.domain.values import (
    Admitted,
    ChatMessage,
    Delta,
    EngineItem,
    Finished,
    GenerateRequest,
    OutputFormat,
    Sampling,
    SliceNotice,
)
from ash.slices.dispatch import SlicePool
from ash.slices.fake import FakeEngine
from ash.slices.remote.engine import RemoteEngine
from ash.slices.spec import RemoteSpec, SliceSpec
from tests.integration.openai_faults import (
    compressed,
    endless_answer,
    endless_line,
    pinging,
    silent,
    status,
    stream,
    unanswered,
)
from tests.integration.openai_stand_in import Fault, StandIn, piece, serving

SHORT = Sampling(temperature=0.0, max_tokens=5)
SCHEMA = OutputFormat("json_schema", '{"type": "object"}')
KEY = "sk-very-secret"


@asynccontextmanager
async def remote(
    stand_in: StandIn | None = None, *, environment: dict[str, str] | None = None, **settings: Any
) -> AsyncIterator[tuple[StandIn, RemoteEngine]]:
    """An engine at a stand-in, not opened yet."""
    async with serving(stand_in or StandIn()) as endpoint:
        engine = RemoteEngine(endpoint.spec(**settings), environment=environment or {})
        try:
            yield endpoint, engine
        finally:
            await engine.close()


def ask(
    text: str = "Tell me about ships", *, session: str = "s", sampling: Sampling = SHORT, **fields: Any
) -> GenerateRequest:
    messages = (ChatMessage("system", "You are brief."), ChatMessage("user", text))
    return GenerateRequest("run", session, messages, sampling, **fields)


async def collect(engine: RemoteEngine, request: GenerateRequest | None = None) -> list[EngineItem]:
    return [item async for item in engine.generate(request or ask())]


def text_of(items: list[Any]) -> str:
    return "".join(item.text for item in items if isinstance(item, Delta))


ONE, TWO = piece("one"), piece(" two")

# Which of the two waits has to end it; the other is longer than any test.
IMPATIENT: dict[str, dict[str, Any]] = {
    "nothing": {"first_token_timeout_s": 0.5},
    "silence": {"first_token_timeout_s": 0.5},
    "pings": {"first_token_timeout_s": 0.5},
    "progress, then silence": {"first_token_timeout_s": 0.5, "idle_timeout_s": 999.0},
    "half, then silence": {"idle_timeout_s": 0.5, "first_token_timeout_s": 999.0},
}

FAULTS: dict[str, tuple[Fault, type[Exception], str]] = {
    "500 for ever": (status(500), SliceUnavailable, r"failed \(HTTP 500\): no luck"),
    "503 for ever": (status(503, "<html>busy</html>"), SliceUnavailable, r"HTTP 503\): <html>busy"),
    "a long Retry-After": (status(429, **{"Retry-After": "3600"}), SliceUnavailable, "too many requests"),
    "an unknown model": (
        status(404, '{"error": {"message": "model `story` does not exist"}}'),
        SliceUnavailable,
        r"does not know the model 'story'.*does not exist",
    ),
    "no key": (status(401), SliceUnavailable, "api_key_env"),
    "a bad request": (status(400, '{"detail": [{"msg": "field"}]}'), SliceUnavailable, r"refused.*field"),
    "a redirect": (
        status(307, Location="http://elsewhere.example/v1"),
        SliceUnavailable,
        r"redirects to http://elsewhere\.example/v1",
    ),
    "HTML": (status(200, "<html>Welcome</html>"), SliceUnavailable, r"text/html.*Welcome.*write the base"),
    "no stream": (status(200, '{"choices": []}'), SliceUnavailable, "application/json in place of"),
    "an error as success": (status(200, '{"error": "out of memory"}'), SliceUnavailable, "out of memory"),
    "an error in the stream": (stream({"error": {"message": "lost"}}), SliceUnavailable, "lost"),
    "nothing": (silent, SliceUnavailable, r"begin to answer within first_token_timeout_s = 0\.5"),
    "silence": (stream(then="silence"), SliceUnavailable, r"produced nothing within first_token_timeout_s"),
    "progress, then silence": (
        stream({"prompt_progress": {"total": 9}}, then="silence"),
        EngineCrashed,
        "produced nothing within first_token_timeout_s",
    ),
    "compressed": (compressed, EngineCrashed, "in the middle"),
    "pings": (pinging, SliceUnavailable, "produced nothing within"),
    "no connection": (unanswered, SliceUnavailable, "cannot be reached: Server disconnected"),
    "garbage": (stream("data: {]\n\n"), SliceUnavailable, "no chat completion chunk"),
    "wrong types": (stream({"choices": 7}), SliceUnavailable, "no chat completion chunk"),
    "binary": (stream(bytes(range(256)) * 9), EngineCrashed, "in the middle"),
    "an empty stream": (stream(), EngineCrashed, "in the middle"),
    "an endless line": (endless_line, SliceUnavailable, "a line of more than"),
    "half a stream": (stream(ONE, TWO), EngineCrashed, "in the middle"),
    "half, then reset": (stream(ONE, TWO, then="reset"), EngineCrashed, "stands"),
    "half, then silence": (stream(ONE, then="silence"), EngineCrashed, r"silent for idle_timeout_s = 0\.5"),
    "half, then garbage": (stream(ONE, "data: <html>\n\n"), EngineCrashed, "no chat completion chunk"),
    "half, then an error": (stream(ONE, {"error": "lost"}), EngineCrashed, "lost"),
    "an endless answer": (endless_answer, EngineCrashed, "max_tokens"),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_has_its_error_and_the_next_run_works(name: str) -> None:
    fault, error, message = FAULTS[name]
    async with remote(breaker_failures=99, retries=1, **IMPATIENT.get(name, {})) as (endpoint, engine):
        endpoint.faults = [fault, fault]
        with pytest.raises(error, match=r"(?s)^slice remote: .*" + message) as caught:
            await collect(engine)
        assert endpoint.url in str(caught.value)
        endpoint.faults.clear()
        assert isinstance((await collect(engine))[-1], Finished)
        assert engine.loaded


async def test_what_was_streamed_before_a_crash_stands() -> None:
    async with remote() as (endpoint, engine):
        endpoint.faults = [stream(ONE, TWO)]
        items = aiter(engine.generate(ask()))
        assert isinstance(await anext(items), Admitted)
        assert [await anext(items), await anext(items)] == [Delta("one"), Delta(" two")]
        with pytest.raises(EngineCrashed):
            await anext(items)
        assert len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ([status(500)], 2),
        ([status(503), status(502)], 3),
        ([status(429, **{"Retry-After": "0"})], 2),
        ([unanswered, unanswered], 3),
    ],
)
async def test_what_passes_is_tried_again(faults: list[Fault], requests: int) -> None:
    async with remote() as (endpoint, engine):
        endpoint.faults = list(faults)
        assert isinstance((await collect(engine))[-1], Finished)
        assert len(endpoint.bodies) == requests


@pytest.mark.parametrize(("code", "requests"), [(500, 2), (503, 3), (400, 1), (404, 1), (401, 1)])
async def test_how_often_is_tried(code: int, requests: int) -> None:
    async with remote() as (endpoint, engine):
        endpoint.faults = [status(code)] * 9
        with pytest.raises(SliceUnavailable):
            await collect(engine)
        assert len(endpoint.bodies) == requests


@pytest.mark.parametrize(
    ("parts", "text", "reason"),
    [
        (["data: [DONE]\n\n"], "", "stop"),
        ([ONE, "data: [DONE]\n\n"], "one", "stop"),
        ([ONE, {"choices": [{"finish_reason": "length"}]}], "one", "length"),
        ([{"choices": [{"delta": {"content": "one"}, "finish_reason": "content_filter"}]}], "one", "stop"),
        ([{"choices": [{"delta": {"reasoning_content": "hm"}}]}, ONE, "data: [DONE]\n\n"], "one", "stop"),
        (["\r\n: hello\r\nevent: x\r\n", ONE, "retry: 3\n\ndata:[DONE]\n\n"], "one", "stop"),
    ],
)
async def test_unusual_streams_are_whole_answers(parts: list[Any], text: str, reason: str) -> None:
    async with remote() as (endpoint, engine):
        endpoint.faults = [stream(*parts)]
        items = await collect(engine)
        assert text_of(items) == text
        assert isinstance(items[0], Admitted)
        assert isinstance(items[-1], Finished)
        assert items[-1].reason == reason


async def test_cancelling_closes_the_connection() -> None:
    async with remote() as (endpoint, engine):
        generation = engine.generate(ask())
        items = aiter(generation)
        await anext(items)
        await anext(items)
        endpoint.paused.clear()
        generation.cancel()
        last = [item async for item in items][-1]
        assert isinstance(last, Finished)
        assert last.reason == "cancelled"
        endpoint.paused.set()
        await endpoint.ended.wait()
        assert endpoint.aborted == 1


async def test_cancelling_ends_the_wait_before_a_retry() -> None:
    async with remote(backoff_s=1e6, idle_timeout_s=5.0) as (endpoint, engine):
        refused = asyncio.Event()

        async def fault(request: web.Request) -> web.StreamResponse:
            refused.set()
            return await status(503)(request)

        endpoint.faults = [fault] * 9
        generation = engine.generate(ask())
        items = asyncio.create_task(_all(generation))
        await refused.wait()
        generation.cancel()
        assert await items == [Finished("cancelled", 0)]


async def _all(generation: Any) -> list[EngineItem]:
    return [item async for item in generation]


async def test_a_consumer_that_is_cancelled_closes_the_connection() -> None:
    async with remote() as (endpoint, engine):
        endpoint.paused.clear()
        admitted = asyncio.Event()

        async def consume() -> None:
            async for _ in engine.generate(ask()):
                admitted.set()

        consumer = asyncio.create_task(consume())
        await admitted.wait()
        consumer.cancel()
        await asyncio.wait({consumer})
        endpoint.paused.set()
        await endpoint.ended.wait()
        assert endpoint.aborted == 1
        assert await collect(engine)


async def test_no_more_run_at_a_time_than_allowed_and_a_busy_session_keeps_nobody_waiting() -> None:
    async with remote(concurrency=2) as (endpoint, engine):
        finished: list[str] = []

        async def run(session: str) -> None:
            await collect(engine, ask(session=session))
            finished.append(session)

        await asyncio.gather(*(run(session) for session in ("busy", "busy", "busy", "busy", "b", "c", "d")))
        assert endpoint.most_running == 2
        # Each of the others had its turn before the third of the busy session.
        assert {"b", "c", "d"} & set(finished[:4])
        assert finished.index("d") < len(finished) - 1
        assert finished[-1] == "busy"


async def test_the_breaker_leaves_a_failing_endpoint_alone_and_tries_it_again() -> None:
    now = [0.0]
    async with serving(StandIn()) as endpoint:
        spec = endpoint.spec(retries=0, breaker_failures=2, breaker_reset_s=30.0)
        engine = RemoteEngine(spec, environment={}, monotonic=lambda: now[0])
        await engine.open()
        endpoint.faults = [status(503)] * 2
        for _ in range(2):
            with pytest.raises(SliceUnavailable, match="HTTP 503"):
                await collect(engine)
        assert not engine.loaded
        with pytest.raises(
            SliceUnavailable, match=r"failed 2 times in a row and is left alone for another 30 s"
        ):
            await collect(engine)
        with pytest.raises(SliceUnavailable, match="left alone"):
            await engine.open()
        assert len(endpoint.bodies) == 2
        now[0] = 30.0
        assert engine.loaded
        # While the trial runs, nobody else is let through.
        asked = asyncio.Event()

        async def hold(request: web.Request) -> web.StreamResponse:
            asked.set()
            return await silent(request)

        endpoint.faults = [hold]
        trial = engine.generate(ask(session="trial"))
        trying = asyncio.create_task(_all(trial))
        await asked.wait()
        with pytest.raises(SliceUnavailable, match="until the one request that tries it is answered"):
            await collect(engine)
        trial.cancel()
        await trying
        # Once it is answered they are, also while it goes on.
        endpoint.paused.clear()
        answered, other = aiter(engine.generate(ask(session="trial"))), aiter(engine.generate(ask()))
        assert isinstance(await anext(answered), Admitted)
        assert isinstance(await anext(other), Admitted)
        endpoint.paused.set()
        assert [item async for item in other]
        assert [item async for item in answered]
        assert await collect(engine)
        await engine.close()


async def test_a_connection_is_used_again_unless_its_answer_was_left() -> None:
    async with remote() as (endpoint, engine):
        for _ in range(3):
            await collect(engine)
        assert len(endpoint.clients) == 1
        items = aiter(engine.generate(ask()))
        await anext(items)
        await items.aclose()  # type: ignore[attr-defined] # the iterator is a generator
        await collect(engine)
        assert len(endpoint.clients) == 2


async def test_answers_that_break_off_count_for_the_breaker() -> None:
    async with remote(breaker_failures=3) as (endpoint, engine):
        endpoint.faults = [stream(ONE), stream(ONE, then="reset"), stream(ONE, "data: x\n\n")]
        for _ in range(3):
            assert engine.loaded or not endpoint.bodies
            with pytest.raises(EngineCrashed):
                await collect(engine)
        assert not engine.loaded


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (status(200, "<html>"), "no list of models"),
        (status(200, '{"data": 3}'), "no list of models"),
        (status(404), r"HTTP 404.*/chat/completions"),
        (status(401), "api_key_env"),
        (status(308, Location="/models"), "redirects to /models"),
        (status(400, '{"error": "maximum context length"}'), "does not list its models"),
        (status(503), "HTTP 503"),
        (unanswered, "cannot be reached"),
    ],
)
async def test_an_endpoint_that_is_not_right_is_found_when_it_is_opened(fault: Fault, message: str) -> None:
    async with remote(breaker_failures=99) as (endpoint, engine):
        endpoint.models_fault = fault
        with pytest.raises(SliceUnavailable, match=message):
            await engine.open()
        assert not engine.loaded
        with pytest.raises(SliceUnavailable):
            await collect(engine)
        endpoint.models_fault = None
        await engine.open()
        assert engine.loaded
        assert await collect(engine)


async def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        spec = SliceSpec("far", "nano", "openai:x", remote=RemoteSpec(url, retries=0))
        engine = RemoteEngine(spec, environment={})
        with pytest.raises(
            SliceUnavailable,
            match=r"slice far: .* cannot be reached: Connection refused; start it, or correct",
        ):
            await engine.open()
        await engine.close()


async def test_tls_where_there_is_none() -> None:
    async with serving(StandIn()) as endpoint:
        url = endpoint.url.replace("http:", "https:")
        spec = SliceSpec("far", "nano", "openai:x", remote=RemoteSpec(url, retries=0))
        engine = RemoteEngine(spec, environment={})
        with pytest.raises(SliceUnavailable, match=r"certificate|reached"):
            await engine.open()
        await engine.close()


async def test_the_key_is_sent_and_shown_nowhere() -> None:
    echoing = status(401, '{"error": {"message": "bad key ' + KEY + '"}}')
    with capture_logs() as logs:
        async with remote(environment={"SOME_KEY": f" {KEY}\n"}, api_key_env="SOME_KEY") as (
            endpoint,
            engine,
        ):
            await collect(engine)
            assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"
            endpoint.faults = [echoing]
            with pytest.raises(
                SliceUnavailable, match=r"environment variable SOME_KEY .*bad key \*\*\*"
            ) as caught:
                await collect(engine)
            endpoint.faults = [status(302, Location=f"http://elsewhere/{KEY}")]
            with pytest.raises(SliceUnavailable, match=r"http://elsewhere/\*\*\*"):
                await collect(engine)
            endpoint.faults = [stream({"error": f"denied {KEY}"})] * 2
            with pytest.raises(SliceUnavailable, match=r"denied \*\*\*"):
                await collect(engine)
            assert KEY not in repr(engine) + repr(vars(engine)["_spec"]) + repr(caught.value)
    assert KEY not in repr(logs)


@pytest.mark.parametrize(
    ("environment", "message"),
    [({}, "SOME_KEY, which is not set"), ({"SOME_KEY": "a\nb"}, "characters that no key has")],
)
async def test_a_key_that_is_missing_or_broken(environment: dict[str, str], message: str) -> None:
    async with remote(environment=environment, api_key_env="SOME_KEY") as (endpoint, engine):
        with pytest.raises(SliceUnavailable, match=message):
            await engine.open()
        assert not endpoint.bodies


@pytest.mark.parametrize(
    ("owned_by", "fields"),
    [
        ("llamacpp", {"return_progress", "top_k", "min_p", "repeat_penalty"}),
        ("vllm", {"top_k", "min_p", "repetition_penalty"}),
        ("library", set()),
    ],
)
async def test_each_endpoint_gets_the_fields_that_it_takes(owned_by: str, fields: set[str]) -> None:
    async with remote(StandIn(owned_by=owned_by)) as (endpoint, engine):
        items = await collect(engine, ask(sampling=msgspec.structs.replace(SHORT, seed=3, stop=("x", ""))))
        body = endpoint.bodies[0]
        always = {"model", "messages", "stream", "stream_options", "max_tokens", "temperature", "top_p"}
        assert set(body) == always | {"seed", "stop"} | fields
        assert body["stop"] == ["x"]
        # Whether it counts first or last, the run's account gets the endpoint's numbers.
        admitted, finished = items[0], items[-1]
        assert isinstance(admitted, Admitted)
        assert isinstance(finished, Finished)
        assert finished.prompt_tokens == 11
        assert (admitted.prompt_tokens == 11) == (owned_by != "library")
        assert finished.output_tokens == 5
        assert finished.reused_tokens == 0


@pytest.mark.parametrize("owned_by", ["llamacpp", "vllm", "library"])
async def test_a_prompt_is_cut_to_what_the_endpoint_takes(owned_by: str) -> None:
    async with remote(StandIn(owned_by=owned_by, context=100)) as (endpoint, engine):
        # Words of one letter: more tokens to the byte than any estimate expects.
        history = [ChatMessage("user", "a " * 20), ChatMessage("assistant", "b " * 20)] * 4
        request = msgspec.structs.replace(ask(), messages=(*history, ChatMessage("user", "Go on")))
        items = await collect(engine, request)
        admitted = items[0]
        assert isinstance(admitted, Admitted)
        assert admitted.dropped_messages >= 4
        assert endpoint.bodies[-1]["messages"][-1]["content"] == "Go on"
        assert len(endpoint.bodies) <= 4
        with pytest.raises(PromptTooLong) as caught:
            await collect(engine, ask("a " * 200))
        assert 0 < caught.value.limit < 100
        assert await collect(engine)


async def test_the_room_for_the_answer_is_cut_where_the_endpoint_insists() -> None:
    async with remote(StandIn(owned_by="vllm", context=100)) as (endpoint, engine):
        items = await collect(engine, ask(sampling=Sampling(max_tokens=5000)))
        finished = items[-1]
        assert isinstance(finished, Finished)
        assert (finished.reason, finished.prompt_tokens, finished.output_tokens) == ("length", 11, 89)
        assert [body["max_tokens"] for body in endpoint.bodies] == [100, 89]


async def test_an_endpoint_that_refuses_every_length() -> None:
    async with remote() as (endpoint, engine):
        endpoint.faults = [status(400, '{"error": {"code": "context_length_exceeded"}}')] * 20
        with pytest.raises((PromptTooLong, SliceUnavailable)):
            await collect(engine)
        assert len(endpoint.bodies) <= 6


async def test_formats() -> None:
    async with remote() as (endpoint, engine):
        assert await collect(engine, ask(format=SCHEMA))
        assert endpoint.bodies[0]["response_format"]["json_schema"]["schema"] == {"type": "object"}
        for syntax in ("lark", "regex"):
            with pytest.raises(FormatError, match=f"cannot constrain an answer to a {syntax} format"):
                await collect(engine, ask(format=OutputFormat(syntax, "a")))
        for definition in ("{", "[1]", "\ud800"):
            with pytest.raises(FormatError, match="cannot be read"):
                await collect(engine, ask(format=OutputFormat("json_schema", definition)))
        endpoint.faults = [status(400, '{"error": {"message": "JSON schema error: unrecognized type"}}')]
        with pytest.raises(FormatError, match="unrecognized type"):
            await collect(engine, ask(format=SCHEMA))
        with pytest.raises(SliceUnavailable, match="cannot go on with an answer that has an output format"):
            await collect(engine, ask(format=SCHEMA, continuation="{"))
        assert len(endpoint.bodies) == 2


async def test_a_continuation_that_the_endpoint_repeats_is_shown_once() -> None:
    async with remote(StandIn(owned_by="someone")) as (endpoint, engine):
        endpoint.faults = [stream(piece("Once up"), piece("on a time"), "data: [DONE]\n\n")]
        items = await collect(engine, ask(continuation="Once upon"))
        assert text_of(items) == " a time"
        assert endpoint.bodies[0]["messages"][-1] == {"role": "assistant", "content": "Once upon"}


async def test_the_pool_goes_on_behind_half_an_answer() -> None:
    whole = "a ship that sails for ever"
    async with remote(StandIn(lambda _: whole)) as (endpoint, engine):
        endpoint.faults = [stream(piece("a ship"), piece(" that"))]
        pool = SlicePool({"remote": engine}, [endpoint.spec()])
        items = [item async for item in pool.generate("remote", ask(sampling=Sampling()))]
        assert text_of(items) == whole
        assert "crashed" in [item.what for item in items if isinstance(item, SliceNotice)]
        await pool.close()


async def test_the_pool_falls_back_from_an_endpoint_that_is_down() -> None:
    async with remote(retries=0) as (endpoint, engine):
        endpoint.models_fault = status(503)
        spec = msgspec.structs.replace(endpoint.spec(), fallback="local")
        pool = SlicePool(
            {"remote": engine, "local": FakeEngine("local")}, [spec, SliceSpec("local", "nano", "package:x")]
        )
        items = [item async for item in pool.generate("remote", ask("Hello"))]
        assert text_of(items) == "Hello"
        assert "fell back" in [item.what for item in items if isinstance(item, SliceNotice)]
        await pool.close()


async def test_closing_while_it_is_opened() -> None:
    async with remote() as (endpoint, engine):
        asked = asyncio.Event()
        go_on = asyncio.Event()

        async def slow(request: web.Request) -> web.StreamResponse:
            asked.set()
            await go_on.wait()
            endpoint.models_fault = None
            return await endpoint.models(request)

        endpoint.models_fault = slow
        opening = asyncio.create_task(engine.open())
        await asked.wait()
        await engine.close()
        go_on.set()
        with pytest.raises(SliceUnavailable, match="closed while it was opened"):
            await opening
        assert not engine.loaded
