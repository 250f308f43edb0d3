"""Requests of an authenticated client: methods, roles, limits, and everything malformed."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from gateway_harness import RpcError, served
from structlog.testing import capture_logs

from ash.domain.errors import NotFound, SliceUnavailable, StoreFull
from ash.domain.values import Role
from ash.gateway.limits import GatewayLimits

TEXT = [{"type": "text", "text": "hello"}]

CALLS: list[tuple[str, dict[str, Any], Any]] = [
    ("session/new", {"title": "t", "persona": "p", "slice": "nano", "goals": ["g"]}, None),
    ("session/new", {}, None),
    ("session/detach", {"sessionId": "s"}, {}),
    ("session/cancel", {"sessionId": "s", "runId": "run1"}, {"cancelled": ["run1"]}),
    ("session/cancel", {"sessionId": "s"}, {"cancelled": []}),
    ("session/fork", {"sessionId": "s", "atSeq": 4}, None),
    ("session/delete", {"sessionId": "s"}, {}),
    ("goal/add", {"sessionId": "s", "text": "win"}, {"goalId": "goal1"}),
    ("goal/list", {"sessionId": "s"}, {"goals": [{"goalId": "goal1", "text": "win", "state": "open"}]}),
    ("goal/close", {"sessionId": "s", "goalId": "goal1"}, {}),
    (
        "autonomy/set",
        {"sessionId": "s", "enabled": True, "intervalS": 5},
        {"enabled": True, "intervalS": 5.0, "budget": 10},
    ),
    (
        "memory/search",
        {"sessionId": "s", "query": "cats"},
        {
            "matches": [
                {
                    "sessionId": "s",
                    "messageId": "msg1",
                    "role": "user",
                    "seq": 3,
                    "ts": 1000,
                    "snippet": "[cats]",
                    "score": -1.5,
                }
            ]
        },
    ),
    (
        "run/resume",
        {"sessionId": "s", "interruptId": "i", "decision": "deny", "payload": [1]},
        {"runId": "run9"},
    ),
]


@pytest.mark.parametrize(("method", "params", "result"), CALLS)
async def test_methods_reach_the_sessions(tmp_path: Path, method: str, params: Any, result: Any) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        gateway.sessions.add(session_id="s")
        answer = await client.call(method, **params)
        if result is None:
            assert answer == {"sessionId": answer["sessionId"]}
            assert answer["sessionId"] in gateway.sessions.sessions
        else:
            assert answer == result


async def test_session_new_passes_every_parameter(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        await client.call("session/new", title="t", persona="p", slice="nano", goals=["a", "b"])
        assert gateway.sessions.calls[-1] == (
            "new",
            "owner",
            {"title": "t", "persona": "p", "slice_name": "nano", "goals": ["a", "b"]},
        )


async def test_run_resume_tells_approve_from_deny(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        for decision, approve in (("approve", True), ("deny", False)):
            await client.call("run/resume", sessionId="s", interruptId="i", decision=decision)
            assert gateway.sessions.calls[-1][2]["approve"] is approve


async def test_session_list_has_the_wire_form_and_a_cursor(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        gateway.sessions.add(session_id="s")
        answer = await client.call("session/list", limit=1)
        assert answer["nextCursor"] == "next"
        [row] = answer["sessions"]
        assert set(row) == {"sessionId", "title", "headSeq", "state", "mode", "updatedAt"}
        assert (await client.call("session/list"))["nextCursor"] is None


async def test_a_prompt_joins_its_texts_and_keeps_its_images(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        gateway.sessions.add(session_id="s")
        image = {"data": "aGk=", "mimeType": "image/png"}
        answer = await client.call(
            "session/prompt",
            sessionId="s",
            prompt=[{"type": "text", "text": "a"}, {"type": "image", **image}, {"type": "text", "text": "b"}],
            idempotencyKey="k",
            whenBusy="interrupt",
        )
        assert set(answer) == {"runId", "messageId", "disposition"}
        assert gateway.sessions.calls[-1][2] == {
            "text": "a\nb",
            "images": [image],
            "idempotency_key": "k",
            "when_busy": "interrupt",
        }


@pytest.mark.parametrize(
    "prompt",
    [
        [{"type": "text", "text": " \n"}],
        [{"type": "image", "data": "not base64!", "mimeType": "image/png"}],
        [{"type": "image", "data": "\u00fc", "mimeType": "image/png"}],
    ],
)
async def test_an_empty_prompt_or_a_broken_image_is_invalid(tmp_path: Path, prompt: Any) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        gateway.sessions.add(session_id="s")
        with pytest.raises(RpcError) as error:
            await client.call("session/prompt", sessionId="s", prompt=prompt)
        assert error.value.code == -32602
        assert "prompt" not in {name for name, _, _ in gateway.sessions.calls}


WRITING = [
    ("session/new", {}),
    ("session/prompt", {"sessionId": "s", "prompt": TEXT}),
    ("session/cancel", {"sessionId": "s"}),
    ("session/fork", {"sessionId": "s"}),
    ("session/delete", {"sessionId": "s"}),
    ("goal/add", {"sessionId": "s", "text": "g"}),
    ("goal/close", {"sessionId": "s", "goalId": "g"}),
    ("autonomy/set", {"sessionId": "s", "enabled": True}),
    ("run/resume", {"sessionId": "s", "interruptId": "i", "decision": "approve"}),
]


async def test_an_observer_reads_and_writes_nothing(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client(gateway.token(Role.OBSERVER)) as client:
        gateway.sessions.add(session_id="s")
        for method, params in WRITING:
            with pytest.raises(RpcError) as error:
                await client.call(method, **params)
            assert (error.value.code, error.value.kind) == (-32002, "forbidden")
        assert all(principal == "bystander" for _, principal, _ in gateway.sessions.calls)
        await client.call("session/list")
        await client.call("session/attach", sessionId="s")
        await client.call("goal/list", sessionId="s")
        await client.call("memory/search", sessionId="s", query="x")


async def test_errors_of_the_sessions_keep_kind_and_details(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        for fault, code, kind in [
            (NotFound("no session s"), -32003, "not_found"),
            (SliceUnavailable("no slice x"), -32008, "slice_unavailable"),
            (StoreFull("the disk is full"), -32010, "storage_full"),
        ]:
            gateway.sessions.fault = fault
            with pytest.raises(RpcError, match=str(fault)) as error:
                await client.call("session/list")
            assert (error.value.code, error.value.kind) == (code, kind)


async def test_a_defect_is_logged_with_its_traceback_and_the_connection_lives(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        gateway.sessions.fault = ZeroDivisionError("secret detail")
        with capture_logs() as logs, pytest.raises(RpcError) as error:
            await client.call("session/list")
        assert (error.value.code, error.value.kind) == (-32603, "internal")
        assert "secret detail" not in str(error.value)
        [entry] = [line for line in logs if line["log_level"] == "error"]
        assert entry["exc_info"]
        assert entry["method"] == "session/list"
        assert await client.call("session/list")
        assert gateway.metric("ash_gateway_requests_total", method="session/list", outcome="internal") == 1


@pytest.mark.parametrize(
    ("frame", "code", "answer_id"),
    [
        ("{", -32700, None),
        ("", -32700, None),
        ('{"a":' * 50_000, -32700, None),
        ("[]", -32600, None),
        ('{"id":1}', -32600, 1),
        (b"binary", -32600, None),
        ('{"jsonrpc":"2.0","id":"x","method":"session/promt"}', -32601, "x"),
        ('{"jsonrpc":"2.0","id":"x","method":"session/attach","params":{"sessionId":1}}', -32602, "x"),
        ('{"jsonrpc":"2.0","id":"x","method":"initialize","params":{"protocolVersion":1}}', -32600, "x"),
    ],
)
async def test_malformed_frames_are_answered_without_a_traceback(
    tmp_path: Path, frame: str | bytes, code: int, answer_id: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        with capture_logs() as logs:
            await client.connection.send(frame)
            answer = await client.receive()
            assert (answer["id"], answer["error"]["code"]) == (answer_id, code)
            assert await client.call("session/list")
        assert not [
            line for line in logs if line.get("exc_info") or line["log_level"] in ("error", "critical")
        ]
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]


async def test_a_prompt_of_10_mb_is_refused_under_its_id_and_the_connection_lives(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        with pytest.raises(RpcError) as error:
            await client.call(
                "session/prompt", sessionId="s", prompt=[{"type": "text", "text": "x" * 10_000_000}]
            )
        assert (error.value.code, error.value.data) == (-32005, {"kind": "too_large", "limit": 1 << 20})
        assert await client.call("session/list")


async def test_a_frame_over_the_hard_limit_closes_its_own_connection_only(tmp_path: Path) -> None:
    async with (
        served(tmp_path, limits=GatewayLimits(hard_payload=200_000)) as gateway,
        gateway.client() as client,
    ):
        await client.send("session/list", {"cursor": "x" * 300_000}, 1)
        assert await client.close_code() == 1009


async def test_the_payload_limit_counts_bytes(tmp_path: Path) -> None:
    async with (
        served(tmp_path, limits=GatewayLimits(max_payload=1000)) as gateway,
        gateway.client() as client,
    ):
        text = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "\u00fc" * 600}, ensure_ascii=False)
        await client.connection.send(text)
        assert (await client.receive())["error"]["data"] == {"kind": "too_large", "limit": 1000}


async def test_invalid_utf8_closes_its_own_connection_only(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        await client.connection.send(b"\xff\xfe", text=True)
        assert await client.close_code() == 1007


async def test_notifications_are_executed_and_not_answered(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.client() as client:
        for method, params in [("session/new", {"title": "quiet"}), ("no/such", {}), ("session/detach", {})]:
            await client.connection.send(json.dumps({"jsonrpc": "2.0", "method": method, "params": params}))
        # The answer to this one is the first frame that comes back.
        await client.send("session/list", {}, 99)
        assert (await client.receive())["id"] == 99
        assert ("new", "owner") in {(name, who) for name, who, _ in gateway.sessions.calls}


async def test_requests_of_one_connection_are_executed_in_order_and_do_not_hold_up_others(
    tmp_path: Path,
) -> None:
    async with served(tmp_path) as gateway, gateway.client() as slow, gateway.client() as quick:
        gateway.sessions.entered.clear()
        gateway.sessions.gate = asyncio.Event()
        for request_id in range(1, 11):
            await slow.send("session/new", {"title": str(request_id)}, request_id)
        await gateway.sessions.entered.wait()
        gate, gateway.sessions.gate = gateway.sessions.gate, None
        assert await quick.call("session/list")
        gate.set()
        assert [(await slow.receive())["id"] for _ in range(10)] == list(range(1, 11))
        titles = [arguments["title"] for name, _, arguments in gateway.sessions.calls if name == "new"]
        assert titles == [str(number) for number in range(1, 11)]
