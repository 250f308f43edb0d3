"""`ash serve` as a child process, and conversations with it over its WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from ash.cli.client import Client, ServerRefusedError
from ash.domain.errors import AshError
from benchmarks.harness.conversation import Answer, Piece, SystemFailedError

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 600.0
"""The first start fits the heads, a minute on a quiet machine; later ones take seconds."""
WORKER_MODULE = "ash.slices.worker"
TERMINAL = frozenset({"RUN_FINISHED", "RUN_ERROR"})

Event = dict[str, Any]
"""The params of one `session/event` notification."""


@dataclass(frozen=True, slots=True)
class Received:
    """An event and when it arrived, in seconds of `time.perf_counter`."""

    at: float
    event: Event

    @property
    def body(self) -> Event:
        """The AG-UI event inside the envelope."""
        body: Event = self.event["event"]
        return body


class AshServer:
    """`ash serve` on free ports with the configuration of this tree.

    Args:
        folder: its data folder, which outlives a kill and a second start.
        overrides: settings as environment variables, such as `ASH_SLICES__NANO__SLOTS`.
    """

    def __init__(self, folder: Path, overrides: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.overrides = dict(overrides or {})
        self.process: asyncio.subprocess.Process | None = None
        self.ws = ""
        self.http = ""
        self._drain: asyncio.Task[bytes] | None = None

    @property
    def name(self) -> str:
        """For tables."""
        return "Ash"

    @property
    def pid(self) -> int:
        """Process id of the server itself."""
        assert self.process is not None, "start() comes first"
        return self.process.pid

    @property
    def token(self) -> str:
        """The owner's token."""
        return (self.folder / "owner.token").read_text().strip()

    async def start(self) -> None:
        """Start it, or start it again after its end, and wait until it listens.

        Raises:
            SystemFailedError: it ended before, or did not listen in time.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "ASH_GATEWAY__PORT": "0",
            "ASH_GATEWAY__HTTP_PORT": "0",
            "ASH_LOG__LEVEL": "warning",
            **self.overrides,
            "ASH_STORE__PATH": str(self.folder),
        }
        command = [sys.executable, "-m", "ash", "serve", "--config", str(ROOT / "config.toml")]
        with (self.folder / "stderr.txt").open("ab") as errors:
            self.process = await asyncio.create_subprocess_exec(
                *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=errors
            )
        stdout = self.process.stdout
        assert stdout is not None, "it was asked for"
        try:
            async with asyncio.timeout(START_LIMIT_S):
                while line := (await stdout.readline()).decode():
                    if line.rstrip().endswith("(plain text)"):
                        break
        except TimeoutError:
            line = ""
        if not line:
            if self.process.returncode is None:
                self.process.kill()
            await self.process.wait()
            raise SystemFailedError(f"ash serve did not start; its messages:\n{self.messages()}")
        # Nothing of interest follows, but a full pipe would stop the server.
        self._drain = asyncio.create_task(stdout.read())
        facts = json.loads((self.folder / "server.json").read_text())
        self.ws, self.http = facts["ws"], facts["http"]

    async def kill(self) -> None:
        """SIGKILL the server alone, as a crash would; its children notice by themselves."""
        assert self.process is not None, "start() comes first"
        self.process.kill()
        await self._ended()

    async def stop(self) -> None:
        """Tell it to stop and wait for its end; harmless when it has ended."""
        if self.process is None:
            return
        if self.process.returncode is None:
            self.process.terminate()
        await self._ended()

    async def _ended(self) -> None:
        assert self.process is not None, "start() comes first"
        await self.process.wait()
        if self._drain is not None:
            await self._drain

    def messages(self) -> str:
        """The end of what it wrote to its error stream."""
        return "\n".join((self.folder / "stderr.txt").read_text(errors="replace").splitlines()[-20:])

    def process_ids(self) -> list[int]:
        """The root of its process tree."""
        return [] if self.process is None or self.process.returncode is not None else [self.process.pid]

    def workers(self) -> list[psutil.Process]:
        """The worker processes of its slices that run now, also those that still load."""
        found = []
        for child in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if WORKER_MODULE in child.cmdline():
                    found.append(child)
        return found

    async def metrics(self) -> str:
        """The text of `/metrics`."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.http}/metrics") as response:
            response.raise_for_status()
            return await response.text()

    async def converse(self, count: int) -> Sequence[AshConversation]:
        """As many new sessions on the slice nano, each with a connection of its own."""
        return [await AshConversation.begin(self, slice="nano") for _ in range(count)]


class AshConversation:
    """One session and one connection that is attached to it.

    Attributes:
        session_id: its id.
        log: every event that was received, with its time of arrival.
    """

    def __init__(self, client: Client, session_id: str) -> None:
        self.session_id = session_id
        self.log: list[Received] = []
        self._client = client
        self._arrived = asyncio.Condition()
        self._closed = False
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def begin(cls, server: AshServer, **params: Any) -> AshConversation:
        """A new session; `params` are those of `session/new`."""
        client = await Client(server.ws, server.token).__aenter__()
        session_id = str((await client.request("session/new", **params))["sessionId"])
        return await cls._attached(client, session_id, after_seq=0)

    @classmethod
    async def resume(cls, server: AshServer, session_id: str, after_seq: int = 0) -> AshConversation:
        """An existing session, with its events behind `after_seq`."""
        client = await Client(server.ws, server.token).__aenter__()
        return await cls._attached(client, session_id, after_seq=after_seq)

    @classmethod
    async def _attached(cls, client: Client, session_id: str, *, after_seq: int) -> AshConversation:
        conversation = cls(client, session_id)
        await client.request("session/attach", sessionId=session_id, afterSeq=after_seq)
        return conversation

    async def _read(self) -> None:
        # A task of its own, so that an event's time is that of its arrival and not of its use.
        async for event in self._client.events():
            self.log.append(Received(time.perf_counter(), event))
            async with self._arrived:
                self._arrived.notify_all()
        self._closed = True
        async with self._arrived:
            self._arrived.notify_all()

    async def prompt(self, text: str) -> str:
        """Commit an input; returns the id of the run that will answer it.

        Raises:
            AshError: the server refuses it, or the connection is closed.
        """
        receipt = await self._client.request(
            "session/prompt", sessionId=self.session_id, prompt=[{"type": "text", "text": text}]
        )
        return str(receipt["runId"])

    async def request(self, method: str, **params: Any) -> dict[str, Any]:
        """Call any method on this connection; see `Client.request`."""
        return await self._client.request(method, **params)

    async def follow(self, first: int = 0) -> AsyncGenerator[Received, None]:
        """What was and will be received, from the `first` entry of `log` on, until the connection closes."""
        while await self._has(first):
            yield self.log[first]
            first += 1

    async def _has(self, index: int) -> bool:
        """Wait for entry `index` of the log; false when the connection closes before."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.log) > index or self._closed)
        return len(self.log) > index

    async def ask(self, text: str) -> Answer:
        """Ask and wait for the whole answer; what goes wrong is in `Answer.failure`."""
        first, asked_at = len(self.log), time.perf_counter()
        try:
            run_id = await self.prompt(text)
        except (AshError, ServerRefusedError) as error:
            return Answer(asked_at, (), "", 0, failure=str(error))
        events = []
        async with contextlib.aclosing(self.follow(first)) as received:
            async for entry in received:
                if entry.event["runId"] == run_id:
                    events.append(entry)
                    if entry.body["type"] in TERMINAL:
                        break
        return answer_of(events, asked_at)

    async def close(self) -> None:
        """Close the connection; the session stays."""
        await self._client.__aexit__(None, None, None)
        await self._reader


def answer_of(events: Sequence[Received], asked_at: float) -> Answer:
    """What the events of one run say, the last of which should be its terminal one."""
    deltas = [entry for entry in events if entry.body["type"] == "TEXT_MESSAGE_CONTENT"]
    terminal: Event = events[-1].body if events else {"type": "none"}
    usage = (terminal.get("usage") or [{}])[-1]
    failure = None
    if terminal["type"] == "RUN_ERROR":
        failure = f"{terminal['code']}: {terminal['message']}"
    elif terminal["type"] != "RUN_FINISHED":
        failure = "the connection closed before the run ended"
    elif terminal["outcome"]["type"] != "success":
        failure = f"the run ended as {terminal['outcome']['type']}"
    return Answer(
        asked_at,
        tuple(Piece(entry.at, len(entry.body["delta"])) for entry in deltas),
        "".join(entry.body["delta"] for entry in deltas),
        int(usage.get("outputTokens", 0)),
        prompt_tokens=usage.get("inputTokens"),
        cached_tokens=usage.get("cachedInputTokens", 0),
        failure=failure,
    )
