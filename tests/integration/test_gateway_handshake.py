"""Who gets in: hosts, origins, tokens and the first frame."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from gateway_harness import V1, Client, RpcError, Served, served
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from ash.domain.values import Role
from ash.gateway.limits import GatewayLimits


def initialize(token: str | None, **changes: Any) -> dict[str, Any]:
    params: dict[str, Any] = {"protocolVersion": 1, "client": {"name": "t", "version": "1"}}
    if token is not None:
        params["token"] = token
    return {**params, **changes}


async def refused(gateway: Served, frame: str | bytes, **options: Any) -> tuple[dict[str, Any], int | None]:
    """The answer to a first frame, and the close code behind it."""
    async with gateway.socket(**options) as connection:
        await connection.send(frame)
        client = Client(connection)
        return await client.receive(), await client.close_code()


def call(method: str, params: Any, request_id: Any = 7) -> str:
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "method": method, "params": params})


async def test_initialize_tells_server_principal_and_policy(tmp_path: Path) -> None:
    limits = GatewayLimits(max_payload=1000, max_buffered=2000, heartbeat_ms=3000)
    async with served(tmp_path, limits=limits) as gateway, gateway.client() as client:
        assert client.connection.subprotocol == "ash.v1"
        assert client.welcome == {
            "protocolVersion": 1,
            "server": {"name": "ash", "version": "1.2.3"},
            "principal": {"name": "owner", "role": "owner"},
            "policy": {"maxPayload": 1000, "maxBuffered": 2000, "heartbeatMs": 3000},
        }


async def test_the_token_may_come_in_the_authorization_header(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway:
        token = gateway.token(Role.OBSERVER, "eve")
        headers = {"Authorization": f"Bearer {token}"}
        async with gateway.socket(additional_headers=headers) as connection:
            welcome = await Client(connection).call("initialize", **initialize(None))
            assert welcome["principal"] == {"name": "eve", "role": "observer"}


async def test_a_token_issued_by_another_process_is_good_at_once(tmp_path: Path) -> None:
    limits = GatewayLimits(revocation_poll_s=3600)
    async with served(tmp_path, limits=limits) as gateway:
        token = type(gateway.tokens)(tmp_path).issue("late", Role.MEMBER)
        async with gateway.client(token) as client:
            assert client.welcome["principal"]["name"] == "late"


@pytest.mark.parametrize("token", [None, "", "ash_wrong", "\u00fc\u0000", "x" * 10_000])
async def test_a_bad_token_is_told_and_closed(tmp_path: Path, token: str | None) -> None:
    async with served(tmp_path) as gateway:
        answer, code = await refused(gateway, call("initialize", initialize(token)))
        assert answer["id"] == 7
        assert (answer["error"]["code"], answer["error"]["data"]["kind"]) == (-32001, "unauthenticated")
        assert code == 4401


async def test_a_revoked_token_does_not_get_in(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway:
        token = gateway.token(Role.MEMBER, "gone")
        gateway.tokens.revoke("gone")
        answer, code = await refused(gateway, call("initialize", initialize(token)))
        assert (answer["error"]["data"]["kind"], code) == ("unauthenticated", 4401)


async def test_many_bad_tokens_are_rate_limited_and_good_ones_still_work(tmp_path: Path) -> None:
    limits = GatewayLimits(failed_authentications=3)
    async with served(tmp_path, limits=limits) as gateway:
        kinds = []
        for _ in range(5):
            answer, code = await refused(gateway, call("initialize", initialize("wrong")))
            assert code == 4401
            kinds.append(answer["error"]["data"]["kind"])
        assert kinds == ["unauthenticated"] * 3 + ["rate_limited"] * 2
        async with gateway.client() as client:
            assert await client.call("session/list")


async def test_another_protocol_version_is_told_the_supported_ones(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway:
        answer, code = await refused(
            gateway, call("initialize", initialize(gateway.owner, protocolVersion=2))
        )
        assert answer["error"]["code"] == -32602
        assert answer["error"]["data"]["supported"] == [1]
        assert code == 4401


@pytest.mark.parametrize(
    ("frame", "error_code", "answer_id"),
    [
        ("{", -32700, None),
        ("[]", -32600, None),
        (call("session/list", {}), -32001, 7),
        (call("no/such", {}), -32601, 7),
        (call("initialize", {"protocolVersion": "1"}), -32602, 7),
        (
            json.dumps({"jsonrpc": "2.0", "method": "initialize", "params": {"protocolVersion": 1}}),
            -32001,
            None,
        ),
        (json.dumps({"jsonrpc": "2.0", "method": "no/such"}), -32001, None),
        (b"\x00\x01", -32600, None),
    ],
)
async def test_anything_else_first_is_told_and_closed(
    tmp_path: Path, frame: str | bytes, error_code: int, answer_id: int | None
) -> None:
    async with served(tmp_path) as gateway:
        answer, code = await refused(gateway, frame)
        assert (answer["id"], answer["error"]["code"], code) == (answer_id, error_code, 4401)


async def test_a_first_frame_of_100_kb_is_too_large(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway:
        answer, code = await refused(gateway, call("initialize", initialize("x" * 100_000)))
        assert answer["id"] == 7
        assert answer["error"]["data"] == {"kind": "too_large", "limit": 65536}
        assert code == 4401


async def test_a_first_frame_at_the_limit_counts_bytes_not_characters(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway:
        # Two bytes each: under the limit in characters, over it in bytes.
        text = json.dumps({"jsonrpc": "2.0", "id": 7, "method": "x" + "\u00fc" * 40_000}, ensure_ascii=False)
        answer, _ = await refused(gateway, text)
        assert answer["error"]["data"]["kind"] == "too_large"


async def test_a_first_frame_over_the_hard_limit_is_not_read(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, gateway.socket() as connection:
        # The close may come while the frame is still being sent.
        with suppress(ConnectionClosed):
            await connection.send(call("initialize", initialize("x" * 1_000_000)))
        assert await Client(connection).close_code() == 1009


async def test_a_client_that_says_nothing_is_closed(tmp_path: Path) -> None:
    async with (
        served(tmp_path, bystander=False, limits=GatewayLimits(first_frame_timeout_s=0.05)) as gateway,
        gateway.socket() as connection,
    ):
        client = Client(connection)
        assert (await client.receive())["error"]["data"]["kind"] == "unauthenticated"
        assert await client.close_code() == 4401


@pytest.mark.parametrize("protocols", [None, ["ash.v2"], ["graphql-ws", "mqtt"]])
async def test_ws_without_the_subprotocol_is_refused(tmp_path: Path, protocols: Any) -> None:
    async with served(tmp_path) as gateway:
        with pytest.raises(InvalidStatus) as refusal:
            async with gateway.socket(subprotocols=protocols):
                pass
        assert refusal.value.response.status_code == 400
        assert b"ash.v1" in refusal.value.response.body


@pytest.mark.parametrize("path", ["/", "/ws/", "/WS", "/admin", "//ws", "/[", "/%77s"])
async def test_other_paths_are_not_found(tmp_path: Path, path: str) -> None:
    async with served(tmp_path) as gateway:
        assert await http_status(gateway, [f"GET {path} HTTP/1.1", "Host: localhost", *UPGRADE]) == 404


@pytest.mark.parametrize(
    "path", ["/ws?token=x", "/ws?a=1&token=", "/chat?session=s&access_token=x", "/ws?Token=x"]
)
async def test_a_token_in_the_url_is_refused_and_not_logged(
    tmp_path: Path, path: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    async with served(tmp_path) as gateway:
        secret = path.replace("=x", f"={gateway.owner}")
        assert await http_status(gateway, [f"GET {secret} HTTP/1.1", "Host: localhost", *UPGRADE]) == 400
        server_log = [r.getMessage() for r in caplog.records if r.name.startswith("ash")]
        assert not any(gateway.owner in line for line in server_log)
        assert gateway.owner not in capsys.readouterr().out


UPGRADE = [
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Protocol: ash.v1",
]


async def http_status(gateway: Served, lines: list[str]) -> int:
    """The status that a hand-written request is answered with."""
    reader, writer = await asyncio.open_connection(*gateway.gateway.address)
    try:
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        return int((await reader.readline()).split()[1])
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    "host",
    [
        ["Host: evil.example"],
        ["Host: evil.example:8765"],
        ["Host: localhost.evil.example"],
        ["Host: 127.0.0.1.evil.example"],
        ["Host: [::2]:80"],
        ["Host:"],
        [],
        ["Host: localhost", "Host: evil.example"],
    ],
)
@pytest.mark.parametrize("path", ["/ws", "/chat"])
async def test_an_unknown_host_is_forbidden(tmp_path: Path, host: list[str], path: str) -> None:
    async with served(tmp_path) as gateway:
        assert await http_status(gateway, [f"GET {path} HTTP/1.1", *host, *UPGRADE]) == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8765", "[::1]:80", "[::1]"])
async def test_loopback_names_are_known_with_any_port(tmp_path: Path, host: str) -> None:
    async with served(tmp_path) as gateway:
        assert await http_status(gateway, ["GET /ws HTTP/1.1", f"Host: {host}", *UPGRADE]) == 101


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://app.example.evil.example", ""])
async def test_a_foreign_origin_is_told_and_closed(tmp_path: Path, origin: str) -> None:
    async with (
        served(tmp_path, origins=["http://app.example"]) as gateway,
        gateway.socket(origin=origin, additional_headers={}) as connection,
    ):
        client = Client(connection)
        answer = await client.receive()
        assert (answer["id"], answer["error"]["code"]) == (None, -32002)
        assert answer["error"]["data"]["kind"] == "forbidden"
        assert await client.close_code() == 4403


async def test_a_known_origin_still_needs_a_token(tmp_path: Path) -> None:
    async with served(tmp_path, origins=["http://app.example"]) as gateway:
        async with gateway.client(origin="http://APP.example") as client:
            assert await client.call("session/list")
        answer, code = await refused(
            gateway, call("initialize", initialize("no")), origin="http://app.example"
        )
        assert (answer["error"]["data"]["kind"], code) == ("unauthenticated", 4401)


async def test_strangers_are_limited_and_clients_are_not(tmp_path: Path) -> None:
    async with served(tmp_path, limits=GatewayLimits(max_unauthenticated=1)) as gateway:
        async with gateway.client() as client, gateway.socket():
            with pytest.raises(InvalidStatus) as refusal:
                async with gateway.client():
                    pass
            assert refusal.value.response.status_code == 503
            assert await client.call("session/list")
        async with gateway.client() as client:
            assert await client.call("session/list")


async def test_connections_are_limited(tmp_path: Path) -> None:
    # The bystander is one of the two.
    async with served(tmp_path, limits=GatewayLimits(max_connections=2)) as gateway, gateway.client():
        with pytest.raises(InvalidStatus) as refusal:
            async with gateway.client():
                pass
        assert refusal.value.response.status_code == 503


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /ws HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\r\n" * 50,
        b"",
    ],
)
async def test_what_is_no_handshake_leaves_no_traceback(
    tmp_path: Path, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(tmp_path) as gateway:
        reader, writer = await asyncio.open_connection(*gateway.gateway.address)
        writer.write(garbage)
        writer.write_eof()
        await reader.read()
        writer.close()
        await writer.wait_closed()
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]


async def test_the_client_library_sees_the_refusal_without_an_upgrade(tmp_path: Path) -> None:
    async with served(tmp_path) as gateway:
        assert await http_status(gateway, ["GET /ws HTTP/1.1", "Host: localhost"]) == 426
        with pytest.raises(RpcError) as error:
            async with connect(gateway.base + "/ws", subprotocols=[V1]) as connection:
                await Client(connection).call("initialize", protocolVersion=1)
        assert error.value.kind == "unauthenticated"
