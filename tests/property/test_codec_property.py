"""The codec against any input: it never raises, and what was encoded comes back."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ash.gateway import codec, params

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
methods = st.sampled_from([each.method for each in params.ALL])

# Frames that look like requests but go wrong anywhere: these reach further than plain text does.
almost_requests = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | values,
        "id": values,
        "method": methods | values,
        "params": values
        | st.dictionaries(
            st.sampled_from(
                ["sessionId", "afterSeq", "prompt", "token", "protocolVersion", "limit", "enabled"]
            ),
            values,
        ),
    },
)

identifiers = st.text(min_size=1, max_size=30)
seqs = st.integers(min_value=0, max_value=2**63 - 1)
parts = st.builds(params.TextPart, text=st.text(max_size=50)) | st.builds(
    params.ImagePart, data=st.text(max_size=20), mime_type=st.just("image/png")
)
requests = st.one_of(
    st.builds(
        params.Initialize,
        protocol_version=st.integers(min_value=-(2**63), max_value=2**63 - 1),
        client=st.none() | st.builds(params.ClientInfo, name=st.text(), version=st.text()),
        token=st.none() | st.text(),
    ),
    st.builds(params.SessionAttach, session_id=identifiers, after_seq=seqs),
    st.builds(
        params.SessionPrompt,
        session_id=identifiers,
        prompt=st.lists(parts, min_size=1, max_size=4),
        idempotency_key=st.none() | identifiers,
        when_busy=st.sampled_from(["enqueue", "interrupt", "reject", "steer"]),
    ),
    st.builds(params.SessionFork, session_id=identifiers, at_seq=st.none() | seqs),
    st.builds(
        params.AutonomySet,
        session_id=identifiers,
        enabled=st.booleans(),
        interval_s=st.none() | st.floats(min_value=0.001, max_value=1e9),
        budget=st.none() | st.integers(min_value=0, max_value=10**9),
    ),
    st.builds(params.MemorySearch, session_id=identifiers, query=st.text(), limit=st.integers(1, 500)),
)
ids = st.none() | st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)


def check_answer(parsed: codec.Parsed) -> None:
    if isinstance(parsed, codec.InvalidFrame) and parsed.response is not None:
        answer = json.loads(parsed.response)
        assert answer["error"]["code"] == parsed.code
        assert parsed.code in {-32700, -32600, -32601, -32602}
        assert set(answer) == {"jsonrpc", "id", "error"}


@given(st.text() | st.binary())
def test_parse_never_raises(frame: str | bytes) -> None:
    check_answer(codec.parse(frame))
    json.loads(codec.frame_id(frame))


@given(almost_requests)
def test_parse_never_raises_on_near_requests(fields: dict[str, Any]) -> None:
    parsed = codec.parse(json.dumps(fields))
    check_answer(parsed)
    if isinstance(parsed, codec.InvalidFrame) and "id" not in fields and parsed.response is not None:
        assert json.loads(parsed.response)["id"] is None


@given(ids, requests)
def test_what_was_encoded_comes_back(request_id: Any, call: params.Params) -> None:
    parsed = codec.parse(codec.encode_request(request_id, call))
    assert isinstance(parsed, codec.Request)
    assert parsed.params == call
    assert json.loads(parsed.id) == request_id


@given(requests)
def test_notifications_come_back_without_an_id(call: params.Params) -> None:
    assert codec.parse(codec.encode_notification(call.method, call)) == codec.Notification(call)


@given(ids, values)
def test_results_are_json_with_the_id(request_id: Any, result: Any) -> None:
    answer = json.loads(codec.encode_result(json.dumps(request_id).encode(), result))
    assert answer["id"] == request_id
    assert "error" not in answer
