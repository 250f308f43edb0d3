"""What a user can do wrong, and the plain ways in, against a real server with real slices."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from typing import Any

import pytest
from websockets.asyncio.client import connect

from ash.cli.client import Client
from tests.e2e.conftest import ROOT, RunningServer
from tests.e2e.demo import Follower, ask, ends

pytestmark = [pytest.mark.slices, pytest.mark.slow, pytest.mark.timeout(600)]


async def new_session(client: Client, **params: Any) -> str:
    session = str((await client.request("session/new", **params))["sessionId"])
    await client.request("session/attach", sessionId=session, afterSeq=0)
    return session


def run(server: RunningServer, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ash", *arguments, "--config", str(ROOT / "config.toml")],
        env={**server.environment, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


async def test_plain_chat_answers(server: RunningServer) -> None:
    headers = {"Authorization": f"Bearer {server.token}"}
    async with connect(server.chat, additional_headers=headers) as socket:
        await socket.send("Hello! What is the capital of France?")
        answer = await socket.recv()
    assert isinstance(answer, str)
    assert answer.strip()
    assert not answer.startswith("error:")


async def test_a_prompt_longer_than_the_context_fails_by_name_and_the_session_goes_on(
    server: RunningServer,
) -> None:
    async with Client(server.ws, server.token) as client:
        follower = Follower(client)
        session = await new_session(client, slice="nano")
        run_id = await ask(follower, session, "lighthouse keeper " * 4000)
        failed = (await follower.wait(session, ends(run_id)))["event"]
        assert (failed["type"], failed["code"]) == ("RUN_ERROR", "too_large")
        assert "2048" in failed["message"] or failed["metadata"]["limit"] > 0
        run_id = await ask(follower, session, "Say hello.")
        assert (await follower.wait(session, ends(run_id)))["event"]["type"] in {"RUN_FINISHED", "RUN_ERROR"}
        follower.close()


async def test_a_ten_megabyte_prompt_is_refused_and_the_connection_lives(server: RunningServer) -> None:
    async with connect(server.ws, subprotocols=["ash.v1"], max_size=None) as socket:  # type: ignore[list-item]
        hello = {"protocolVersion": 1, "client": {"name": "test", "version": "0"}, "token": server.token}
        await socket.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}))
        assert "result" in json.loads(await socket.recv())
        params = {"sessionId": "x", "prompt": [{"type": "text", "text": "a" * 10_000_000}]}
        await socket.send(
            json.dumps({"jsonrpc": "2.0", "id": 2, "method": "session/prompt", "params": params})
        )
        refused = json.loads(await socket.recv())
        assert refused["error"]["data"]["kind"] == "too_large"
        await socket.send(json.dumps({"jsonrpc": "2.0", "id": 3, "method": "session/list", "params": {}}))
        assert "result" in json.loads(await socket.recv())


async def test_cancel_ends_the_answer_and_not_the_session(server: RunningServer) -> None:
    async with Client(server.ws, server.token) as client:
        follower = Follower(client)
        session = await new_session(client, slice="turbo")
        run_id = await ask(follower, session, "Tell me everything about the history of bread, at length.")
        await follower.wait(session, lambda event: event["event"]["type"] == "TEXT_MESSAGE_CONTENT")
        cancelled = await client.request("session/cancel", sessionId=session)
        assert cancelled == {"cancelled": [run_id]}
        ended = (await follower.wait(session, ends(run_id)))["event"]
        assert ended["outcome"] == {"type": "cancelled"}
        follower.close()


async def test_a_second_server_on_the_same_data_folder_is_refused(server: RunningServer) -> None:
    result = await asyncio.to_thread(run, server, "serve")
    assert result.returncode == 1
    assert str(server.process.pid) in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_named(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("second")
    port = server.ws.rsplit(":", 1)[1].removesuffix("/ws")
    result = run(server, "serve", ASH_STORE__PATH=str(folder), ASH_GATEWAY__PORT=port)
    assert result.returncode == 1
    assert port in result.stderr
    assert "gateway.port" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_log_can_be_read_beside_a_running_server(server: RunningServer) -> None:
    listed = run(server, "sessions")
    assert listed.returncode == 0, listed.stderr
    unknown = run(server, "log", "ses_none")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "no session ses_none" in unknown.stderr


def test_health_readiness_and_metrics(server: RunningServer) -> None:
    for path, expected in (("/healthz", b""), ("/readyz", b"ready"), ("/metrics", b"ash_gateway_requests")):
        with urllib.request.urlopen(server.http + path) as answer:
            assert answer.status == 200
            assert expected in answer.read()
