"""What is sent to an endpoint, and what its refusals mean."""

from __future__ import annotations

import json
from math import ceil
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash.domain.errors import FormatError, PromptTooLong, SliceUnavailable
from ash.domain.values import Admitted, ChatMessage, Finished, GenerateRequest, Sampling
from ash.session.account import Account
from ash.slices.remote.dialect import LLAMACPP, OPENAI, VLLM, Dialect, detect
from ash.slices.remote.failure import AttemptFailed, ContextExceeded, Retry, printable
from ash.slices.remote.protocol import ModelList, request_body
from ash.slices.remote.refusal import failure_of, read_refusal
from ash.slices.remote.sizing import PromptSizer

USER = ChatMessage("user", "Hello")


def body_of(dialect: Dialect, messages: tuple[ChatMessage, ...] = (USER,), **fields: Any) -> dict[str, Any]:
    sent = request_body(
        "m", messages, fields.pop("sampling", Sampling()), dialect, max_tokens=9, **{"stop": (), **fields}
    )
    decoded: dict[str, Any] = json.loads(sent)
    return decoded


def test_a_continuation_is_the_beginning_of_the_last_message() -> None:
    for dialect in (LLAMACPP, VLLM):
        body = body_of(dialect, continuation="Once")
        assert body["messages"][-1] == {"role": "assistant", "content": "Once"}
        assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
        assert "continue_final_message" not in body_of(dialect)
    assert "continue_final_message" not in body_of(OPENAI, continuation="Once")


def test_stop_strings_and_seed_as_far_as_they_are_taken() -> None:
    stop = ("a", "", "b", "c", "d", "e")
    assert body_of(OPENAI, stop=stop)["stop"] == ["a", "b", "c", "d"]
    assert body_of(LLAMACPP, stop=stop)["stop"] == ["a", "b", "c", "d", "e"]
    assert "stop" not in body_of(OPENAI, stop=("",))
    assert "seed" not in body_of(OPENAI)
    assert body_of(OPENAI, sampling=Sampling(seed=0))["seed"] == 0


@given(st.text(st.characters(), max_size=20), st.text(st.characters(), max_size=20))
def test_any_text_becomes_a_body(text: str, continuation: str) -> None:
    body = body_of(VLLM, (ChatMessage("user", text),), continuation=continuation, stop=(text,))
    assert body["messages"][0]["content"] == text.encode("utf-8", "replace").decode()


def test_the_dialect_follows_from_the_owner() -> None:
    assert detect([None, "someone", "vllm"]) is VLLM
    assert detect(["llamacpp"]) is LLAMACPP
    assert detect([]) is detect(["library"]) is OPENAI


def test_the_model_that_answers() -> None:
    models = ModelList([])
    assert models.find("m") is None
    found = read_models([{"id": "a", "max_model_len": 7}, {"id": "m", "meta": {"n_ctx": 5}}])
    contexts = {name: model.context for name in ("a", "m", "x") if (model := found.find(name)) is not None}
    assert contexts == {"a": 7, "m": 5}
    only = read_models([{"id": "a", "meta": None}])
    assert only.find("x") is not None


def read_models(data: list[dict[str, Any]]) -> ModelList:
    return msgspec.json.decode(json.dumps({"object": "list", "data": data}), type=ModelList)


def meaning(
    status: int, body: Any, *, formatted: bool = False, **fields: Any
) -> AttemptFailed | ContextExceeded:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return failure_of(
        read_refusal(status, text, **fields),
        where="slice s",
        model="m",
        key_variable="K",
        formatted=formatted,
    )


@pytest.mark.parametrize(
    ("body", "prompt_tokens", "context"),
    [
        (
            {
                "error": {
                    "type": "exceed_context_size_error",
                    "message": "x",
                    "n_prompt_tokens": 9,
                    "n_ctx": 8,
                }
            },
            9,
            8,
        ),
        ({"error": {"code": "context_length_exceeded", "message": "x"}}, None, None),
        (
            {
                "object": "error",
                "message": "This model's maximum context length is 4096 tokens. However, you requested "
                "5000 tokens (4900 in the messages, 100 in the completion).",
            },
            4900,
            4096,
        ),
        (
            {
                "error": {
                    "message": "maximum context length is 80 tokens and your request has 75 input tokens"
                }
            },
            75,
            80,
        ),
        ({"error": "the prompt does not fit the context window"}, None, None),
    ],
)
def test_a_prompt_that_is_too_long(body: Any, prompt_tokens: int | None, context: int | None) -> None:
    for status in (400, 0):
        found = meaning(status, body)
        assert isinstance(found, ContextExceeded)
        assert (found.prompt_tokens, found.context) == (prompt_tokens, context)


@pytest.mark.parametrize(
    ("status", "retry", "down"),
    [
        (400, Retry.NEVER, False),
        (401, Retry.NEVER, False),
        (404, Retry.NEVER, False),
        (429, Retry.ALLOWED, False),
        (500, Retry.ONCE, True),
        (501, Retry.NEVER, True),
        (502, Retry.ALLOWED, True),
        (503, Retry.ALLOWED, True),
        (504, Retry.ALLOWED, True),
    ],
)
def test_what_each_status_means(status: int, retry: Retry, down: bool) -> None:
    found = meaning(status, {"error": {"message": "why"}})
    assert isinstance(found, AttemptFailed)
    assert isinstance(found.error, SliceUnavailable)
    assert (found.retry, found.endpoint_down) == (retry, down)
    assert f"HTTP {status}" in str(found)


def test_an_error_in_a_stream_names_its_own_status() -> None:
    found = meaning(0, {"code": 429, "message": "slow down"})
    assert isinstance(found, AttemptFailed)
    assert found.retry is Retry.ALLOWED
    assert "HTTP 500" in str(meaning(0, {"code": "x"}))


def test_a_format_that_is_refused() -> None:
    body = {"error": {"message": "Invalid schema"}}
    found = meaning(400, body, formatted=True)
    assert isinstance(found, AttemptFailed)
    assert isinstance(found.error, FormatError)
    assert isinstance(meaning(400, body), AttemptFailed)
    assert not isinstance(meaning(400, body).error, FormatError)  # type: ignore[union-attr] # asserted


@given(
    st.sampled_from([0, 200, 302, 400, 401, 404, 418, 500, 599]),
    st.one_of(
        st.binary(max_size=80),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=9)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(
                    st.sampled_from(["error", "message", "code", "type", "detail", "n_ctx"]),
                    inner,
                    max_size=4,
                ),
            ),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
    ),
)
def test_any_body_is_read_and_shows_no_secret(status: int, body: bytes) -> None:
    found = meaning(status, body + b"s3cret", secret="s3cret", location="s3cret")
    assert "s3cret" not in str(found)
    assert isinstance(meaning(status, body), AttemptFailed | ContextExceeded)


def test_a_secret_is_not_shown_in_part_where_the_text_is_cut() -> None:
    found = meaning(400, {"error": "x" * 290 + " abcdefghij" * 3}, secret="abcdefghij")
    assert "abc" not in str(found)


@given(st.text())
def test_foreign_text_is_one_short_line(text: str) -> None:
    line = printable(text * 50)
    assert len(line) <= 300
    assert line.isprintable()


def conversation(pairs: int, text: str = "why " * 20) -> GenerateRequest:
    history = [ChatMessage("system", "S")]
    for _ in range(pairs):
        history += [ChatMessage("user", text), ChatMessage("assistant", text)]
    return GenerateRequest("r", "s", (*history, ChatMessage("user", "And now?")))


def test_an_estimate_does_not_refuse_the_last_message() -> None:
    request = GenerateRequest("r", "s", (ChatMessage("user", "x" * 3000),))
    assert PromptSizer(512).plan(request, max_tokens=100).messages == request.messages
    with pytest.raises(PromptTooLong):
        PromptSizer(40).plan(request, max_tokens=100)


def test_nothing_is_dropped_while_all_fits() -> None:
    request = conversation(3)
    plan = PromptSizer(2048).plan(request, max_tokens=100)
    assert (plan.messages, plan.dropped, plan.max_tokens) == (request.messages, 0, 100)


@given(st.integers(0, 40), st.floats(0.02, 2.0), st.integers(64, 4096), st.integers(1, 5000), st.booleans())
def test_plans_come_to_an_end_whatever_the_endpoint_counts(
    pairs: int, rate: float, context: int, max_tokens: int, tells: bool
) -> None:
    request = conversation(pairs)
    sizer = PromptSizer(context)
    plan = sizer.plan(request, max_tokens=max_tokens)
    for _ in range(5):
        tokens = ceil(rate * plan.weight)
        assert plan.messages[-1] == request.messages[-1]
        assert plan.messages[0].role == "system"
        assert 1 <= plan.max_tokens <= context
        if tokens + plan.max_tokens <= context:
            break
        refused = ContextExceeded("no", prompt_tokens=tokens if tells else None)
        before = plan
        try:
            plan = sizer.replan(request, plan, refused, max_tokens=max_tokens)
        except PromptTooLong:
            assert sum(message.role == "user" for message in before.messages) == 1
            break
        assert len(plan.messages) < len(before.messages) or plan.max_tokens < before.max_tokens
    else:
        assert not tells


def test_estimates_follow_what_the_endpoint_counts() -> None:
    sizer = PromptSizer(4096)
    request = conversation(5)
    for _ in range(30):
        plan = sizer.plan(request, max_tokens=10)
        sizer.learn(plan, 300)
    assert abs(sizer.plan(request, max_tokens=10).tokens - 300) <= 3
    sizer.learn(plan, 0)
    assert abs(sizer.plan(request, max_tokens=10).tokens - 300) <= 3


def test_counts_at_the_end_replace_those_at_the_beginning() -> None:
    account = Account(0.0)
    account.admitted(Admitted(50, 10))
    account.finished(Finished("stop", 3, prompt_tokens=60, reused_tokens=None), "far")
    account.admitted(Admitted(50, 10))
    account.finished(Finished("stop", 3), "near")
    usage = account.usage
    assert usage is not None
    assert [(u.input_tokens, u.cached_input_tokens, u.total_tokens) for u in usage] == [
        (60, 0, 63),
        (50, 10, 53),
    ]
