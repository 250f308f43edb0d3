"""JSON-RPC frames in and out, without a socket."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ash.domain.errors import AshError, InvalidRequest, NotFound, ShuttingDown, StoreFull, TooLarge
from ash.gateway import codec, params
from ash.gateway.methods import MINIMUM_ROLE


def frame(**fields: Any) -> str:
    return json.dumps({"jsonrpc": "2.0", **fields})


def rejected(text: str | bytes) -> dict[str, Any]:
    parsed = codec.parse(text)
    assert isinstance(parsed, codec.InvalidFrame)
    assert parsed.response is not None
    answer = json.loads(parsed.response)
    assert answer["jsonrpc"] == "2.0"
    assert answer["error"]["code"] == parsed.code
    assert answer["error"]["data"]["kind"] == "invalid"
    return answer


@pytest.mark.parametrize(
    "raw_id", ['"a"', "7", "1.0", "-0", "null", '""', '"\\u00e9"', "123456789012345678901"]
)
def test_the_id_is_echoed_exactly_as_it_was_sent(raw_id: str) -> None:
    parsed = codec.parse(f'{{"jsonrpc":"2.0","id":{raw_id},"method":"session/list"}}')
    assert isinstance(parsed, codec.Request)
    assert parsed.id == raw_id.encode()
    assert f'"id":{raw_id}'.encode() in codec.encode_result(parsed.id, {})
    assert f'"id":{raw_id}'.encode() in codec.encode_error(parsed.id, NotFound("x"))


def test_a_call_without_an_id_is_a_notification_and_its_errors_are_not_answered() -> None:
    assert codec.parse(frame(method="session/list")) == codec.Notification(params.SessionList())
    unknown = codec.parse(frame(method="no/such"))
    wrong = codec.parse(frame(method="session/detach", params={"sessionId": 1}))
    assert isinstance(unknown, codec.InvalidFrame)
    assert isinstance(wrong, codec.InvalidFrame)
    assert (unknown.response, unknown.code) == (None, -32601)
    assert (wrong.response, wrong.code) == (None, -32602)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nul",
        "[1,2",
        '{"id":01}',
        '{"jsonrpc":"2.0"} x',
        '{"a":"\\ud800"}',
        b"\xff",
        '{"a":' * 100_000,
        "[" * 100_000,
        "\ud800",
    ],
)
def test_what_is_not_json_is_a_parse_error_with_a_null_id(text: str | bytes) -> None:
    answer = rejected(text)
    assert (answer["id"], answer["error"]["code"]) == (None, -32700)


@pytest.mark.parametrize(
    ("text", "answer_id"),
    [
        ("[]", None),
        ("null", None),
        ('"x"', None),
        (f"[{frame(id=1, method='session/list')}]", None),
        ('{"id":1,"method":"session/list"}', 1),
        ('{"jsonrpc":"1.0","id":1,"method":"session/list"}', 1),
        (frame(id=1), 1),
        (frame(id=1, method=2), 1),
        (frame(id=1, result={}), 1),
        (frame(id=True, method="session/list"), None),
        (frame(id=[1], method="session/list"), None),
        (frame(id={}, method="session/list"), None),
        (frame(params={}), None),
    ],
)
def test_what_is_not_a_request_object_is_invalid(text: str, answer_id: int | None) -> None:
    answer = rejected(text)
    assert (answer["id"], answer["error"]["code"]) == (answer_id, -32600)


def test_an_unknown_method_is_named_beside_the_nearest_known_one() -> None:
    answer = rejected(frame(id=3, method="session/promt"))
    assert answer["error"]["code"] == -32601
    assert "`session/promt`" in answer["error"]["message"]
    assert "`session/prompt`" in answer["error"]["message"]


def test_an_unknown_method_of_any_length_is_answered_in_short() -> None:
    assert len(rejected(frame(id=3, method="x" * 1_000_000))["error"]["message"]) < 200


@pytest.mark.parametrize(
    ("method", "arguments", "field"),
    [
        ("session/attach", {}, "sessionId"),
        ("session/attach", {"sessionId": 5}, "sessionId"),
        ("session/attach", {"sessionId": ""}, "sessionId"),
        ("session/attach", {"sessionId": "s", "afterSeq": "0"}, "afterSeq"),
        ("session/attach", {"sessionId": "s", "afterSeq": -1}, "afterSeq"),
        ("session/attach", {"sessionId": "s", "afterSeq": 1.5}, "afterSeq"),
        ("session/attach", {"sessionId": "s", "afterSeq": 2**63}, "afterSeq"),
        ("session/attach", {"sessionId": "s", "afterSeq": True}, "afterSeq"),
        ("session/list", {"limit": 0}, "limit"),
        ("session/new", {"goals": [""]}, "goals[...]"),
        ("session/prompt", {"sessionId": "s", "prompt": []}, "prompt"),
        ("session/prompt", {"sessionId": "s", "prompt": "hello"}, "prompt"),
        ("session/prompt", {"sessionId": "s", "prompt": [{"type": "text"}]}, "prompt[...].text"),
        ("session/prompt", {"sessionId": "s", "prompt": [{"type": "video"}]}, "prompt[...].type"),
        (
            "session/prompt",
            {"sessionId": "s", "prompt": [{"type": "image", "data": "", "mimeType": "text/html"}]},
            "prompt[...].mimeType",
        ),
        (
            "session/prompt",
            {"sessionId": "s", "prompt": [{"type": "text", "text": "a"}], "whenBusy": "wait"},
            "whenBusy",
        ),
        ("autonomy/set", {"sessionId": "s", "enabled": "yes"}, "enabled"),
        ("run/resume", {"sessionId": "s", "interruptId": "i", "decision": "maybe"}, "decision"),
    ],
)
def test_wrong_parameters_name_the_field(method: str, arguments: dict[str, Any], field: str) -> None:
    answer = rejected(frame(id="q", method=method, params=arguments))
    assert (answer["id"], answer["error"]["code"]) == ("q", -32602)
    shown = answer["error"]["data"]["field"]
    assert shown.replace("[0]", "[...]") == field
    assert f"params.{shown}" in answer["error"]["message"]


@pytest.mark.parametrize("bad", [[], ["s"], "s", 1, None, True])
def test_params_must_be_an_object(bad: Any) -> None:
    answer = rejected(frame(id=1, method="session/detach", params=bad))
    assert answer["error"]["code"] == -32602


def test_fields_of_a_newer_protocol_are_ignored() -> None:
    parsed = codec.parse(frame(id=1, method="session/detach", params={"sessionId": "s", "newer": 1}, meta={}))
    assert parsed == codec.Request(b"1", params.SessionDetach(session_id="s"))


def test_defaults_are_those_of_the_protocol() -> None:
    parsed = codec.parse(
        frame(
            id=1,
            method="session/prompt",
            params={"sessionId": "s", "prompt": [{"type": "text", "text": "a"}]},
        )
    )
    assert isinstance(parsed, codec.Request)
    assert isinstance(parsed.params, params.SessionPrompt)
    assert parsed.params.when_busy == "enqueue"
    attach = codec.parse(frame(id=1, method="session/attach", params={"sessionId": "s"}))
    assert attach == codec.Request(b"1", params.SessionAttach(session_id="s", after_seq=0))


@pytest.mark.parametrize(
    ("error", "code", "data"),
    [
        (NotFound("no session x"), -32003, {"kind": "not_found"}),
        (TooLarge("too long", limit=7), -32005, {"kind": "too_large", "limit": 7}),
        (ShuttingDown("later"), -32009, {"kind": "shutting_down"}),
        (StoreFull("disk"), -32010, {"kind": "storage_full"}),
        (InvalidRequest("no"), -32602, {"kind": "invalid"}),
        (AshError("oh"), -32603, {"kind": "internal"}),
    ],
)
def test_each_kind_has_its_code(error: AshError, code: int, data: dict[str, Any]) -> None:
    answer = json.loads(codec.encode_error(b'"i"', error))
    assert answer == {
        "jsonrpc": "2.0",
        "id": "i",
        "error": {"code": code, "message": str(error), "data": data},
    }


def test_a_kind_without_a_code_still_reaches_the_client() -> None:
    class Strange(AshError):
        kind = "strange"

    answer = json.loads(codec.encode_error(b"1", Strange("?")))
    assert answer["error"] == {"code": -32000, "message": "?", "data": {"kind": "strange"}}


def test_codes_are_unique_and_in_the_ranges_of_json_rpc() -> None:
    own = [code for code in codec.CODES.values() if code > -32100]
    assert len(set(own)) == len(own)
    assert all(-32099 <= code <= -32000 for code in codec.CODES.values() if code not in (-32602, -32603))


def test_notifications_and_events_have_no_id() -> None:
    heartbeat = json.loads(codec.encode_notification("server/heartbeat", {"ts": 5}))
    assert heartbeat == {"jsonrpc": "2.0", "method": "server/heartbeat", "params": {"ts": 5}}
    event = json.loads(codec.encode_event(b'{"sessionId":"s","seq":1}'))
    assert event == {"jsonrpc": "2.0", "method": "session/event", "params": {"sessionId": "s", "seq": 1}}


def test_the_id_of_a_frame_that_is_not_executed() -> None:
    assert codec.frame_id(frame(id="x", method="session/prompt", params={"a": "b" * 1000})) == b'"x"'
    assert codec.frame_id(frame(method="session/prompt")) == b"null"
    assert codec.frame_id("[[[") == b"null"


def test_every_method_has_a_minimum_role() -> None:
    methods = {each.method for each in params.ALL}
    assert set(MINIMUM_ROLE) == methods - {"initialize"}
