"""A client of `ash.v1` for the command line: one connection, requests, and a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.typing import Subprotocol

from ash import __version__
from ash.app import SERVER_FILE
from ash.config import Settings
from ash.domain.errors import AshError
from ash.gateway.tokens import TokenRegistry


class ServerRefusedError(AshError):
    """The server answered a request with an error."""


def server_address(settings: Settings) -> str:
    """The WebSocket address of the server that uses the data folder.

    Raises:
        AshError: none has run there yet.
    """
    path = settings.data_folder / SERVER_FILE
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["ws"])
    except FileNotFoundError as error:
        raise AshError(
            f"no server has run with the data folder {settings.data_folder}; start one: ash serve"
        ) from error


def local_token(folder: Path) -> str:
    """The owner's token.

    Raises:
        AshError: there is none.
    """
    token = TokenRegistry(folder).owner_token()
    if token is None:
        raise AshError(f"there is no owner token in {folder}; start the server once: ash serve")
    return token


class Client:
    """An initialised connection; use it as an async context manager."""

    def __init__(self, address: str, token: str) -> None:
        self._address = address
        self._token = token
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._socket: ClientConnection | None = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            self._socket = await connect(self._address, subprotocols=[Subprotocol("ash.v1")], max_size=None)
        except (OSError, WebSocketException) as error:
            raise AshError(f"no server answers at {self._address} ({error}); start one: ash serve") from error
        self._reader = asyncio.create_task(self._read(self._socket))
        client = {"name": "ash-cli", "version": __version__}
        await self.request("initialize", protocolVersion=1, client=client, token=self._token)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._socket is not None:
            await self._socket.close()
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader

    async def _read(self, socket: ClientConnection) -> None:
        try:
            async for frame in socket:
                message = json.loads(frame)
                if "id" in message and message["id"] in self._waiting:
                    self._waiting.pop(message["id"]).set_result(message)
                elif message.get("method") == "session/event":
                    self._events.put_nowait(message["params"])
        except ConnectionClosed:
            pass
        finally:
            for future in self._waiting.values():
                future.set_exception(AshError("the server closed the connection"))
            self._events.put_nowait(None)

    async def request(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method.

        Raises:
            ServerRefusedError: the server's error, in its words.
        """
        assert self._socket is not None
        number = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        given = {key: value for key, value in params.items() if value is not None}
        try:
            await self._socket.send(
                json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": given})
            )
        except ConnectionClosed as error:
            raise AshError("the server closed the connection") from error
        message = await future
        if "error" in message:
            raise ServerRefusedError(str(message["error"]["message"]))
        result: dict[str, Any] = message["result"]
        return result

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Params of `session/event`, until the connection closes."""
        while (params := await self._events.get()) is not None:
            yield params
