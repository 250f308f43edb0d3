"""The scripted proof: real server, real slices, real sockets, and two kills in mid-answer.

Run it with `make demo`. It ends with the line `demo: ok` and exit status 0, or says what failed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from ash.cli.client import Client

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 240.0
TURN_LIMIT_S = 120.0

PROMPTS = [
    (0, "greeting", "Hello there! How are you today?"),
    (1, "fact", "What is the capital of France?"),
    (2, "code", "Write a Python function that returns the n-th Fibonacci number, with a docstring."),
    (
        0,
        "word problem",
        "A train goes 60 km in one hour and 45 km in the next. How far in all? Show the steps.",
    ),
    (1, "short poem", "Write a short poem about autumn rain in four lines."),
    (2, "rewrite", "Fix the spelling: 'I recieved you're letter yesturday.'"),
    (0, "planning", "Compare two ways to organise a weekend move to another flat, and plan the steps."),
    (1, "small talk", "Nice. I had a lazy morning with coffee and the cat."),
]
LONG = "Explain in depth how a refrigerator works, part by part, and compare it with an air conditioner."

Event = dict[str, Any]

COLUMNS = ("session", "origin", "intent", "slice", "mode", "prompt", "reused", "ttft ms", "tok/s", "end")


class Failed(Exception):
    """A claim of the demo does not hold."""


def require(claim: bool, what: str) -> None:
    if not claim:
        raise Failed(what)


class Server:
    """`ash serve` as a child process on free ports with a data folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: asyncio.subprocess.Process | None = None
        self.address = ""

    async def start(self) -> None:
        environment = {
            **os.environ,
            "ASH_STORE__PATH": str(self.folder),
            "ASH_GATEWAY__PORT": "0",
            "ASH_GATEWAY__HTTP_PORT": "0",
            "ASH_LOG__LEVEL": "warning",
        }
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "ash",
            "serve",
            "--config",
            str(ROOT / "config.toml"),
            env=environment,
            stdout=asyncio.subprocess.PIPE,
        )
        stdout = self.process.stdout
        assert stdout is not None
        async with asyncio.timeout(START_LIMIT_S):
            while line := (await stdout.readline()).decode():
                if line.rstrip().endswith("(plain text)"):
                    break
        require(bool(line), "the server did not start; its messages are above")
        self.address = json.loads((self.folder / "server.json").read_text())["ws"]

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()

    def workers(self) -> list[psutil.Process]:
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "ash.slices.worker" in child.cmdline()]

    def token(self) -> str:
        return (self.folder / "owner.token").read_text().strip()


class Follower:
    """A client with everything it has received, by session."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.events: dict[str, list[Event]] = {}
        self._changed = asyncio.Condition()
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for params in self.client.events():
            async with self._changed:
                self.events.setdefault(params["sessionId"], []).append(params)
                self._changed.notify_all()

    async def wait(self, session: str, holds: Callable[[Event], bool]) -> Event:
        def found() -> Event | None:
            return next((event for event in self.events.get(session, []) if holds(event)), None)

        async with asyncio.timeout(TURN_LIMIT_S), self._changed:
            await self._changed.wait_for(lambda: found() is not None)
        event = found()
        assert event is not None
        return event

    def close(self) -> None:
        self._task.cancel()


def ends(run_id: str) -> Callable[[Event], bool]:
    return lambda event: event["runId"] == run_id and event["event"]["type"] in {"RUN_FINISHED", "RUN_ERROR"}


def text_of(events: list[Event], run_id: str) -> str:
    return "".join(
        event["event"]["delta"]
        for event in events
        if event["runId"] == run_id and event["event"]["type"] == "TEXT_MESSAGE_CONTENT"
    )


async def ask(follower: Follower, session: str, text: str) -> str:
    receipt = await follower.client.request(
        "session/prompt", sessionId=session, prompt=[{"type": "text", "text": text}]
    )
    return str(receipt["runId"])


def row(events: list[Event], run_id: str, session: str) -> dict[str, Any]:
    """What one turn cost, from its events alone."""
    mine = [event for event in events if event["runId"] == run_id]
    custom = {
        event["event"]["name"]: event["event"]["value"]
        for event in mine
        if event["event"]["type"] == "CUSTOM"
    }
    terminal = mine[-1]["event"]
    usage = (terminal.get("usage") or [{}])[-1]
    times = terminal.get("metadata") or {}
    return {
        "session": session[-6:],
        "origin": mine[0]["origin"],
        "intent": custom.get("ash.route", {}).get("intent", "-"),
        "slice": usage.get("model", custom.get("ash.route", {}).get("slice", "-")),
        "mode": custom.get("ash.mode", {}).get("mode", "-"),
        "prompt": usage.get("inputTokens", 0),
        "reused": usage.get("cachedInputTokens", 0),
        "ttft ms": times.get("ttftMs", "-"),
        "tok/s": times.get("tokensPerSecond", "-"),
        "end": terminal.get("outcome", {}).get("type") or terminal.get("code"),
    }


def show(found: dict[str, Any]) -> None:
    widths = (8, 7, 18, 6, 15, 7, 7, 9, 7, 12)
    cells = zip(found.values(), widths, strict=True)
    sys.stdout.write(" ".join(str(value).ljust(width) for value, width in cells).rstrip() + "\n")
    sys.stdout.flush()


async def conversations(
    one: Follower, two: Follower, sessions: list[str], rows: list[dict[str, Any]]
) -> None:
    """Eight prompts of different kinds over three sessions of two clients."""
    for index, kind, text in PROMPTS:
        follower = two if index == 2 else one
        session = sessions[index]
        run_id = await ask(follower, session, text)
        await follower.wait(session, ends(run_id))
        events = follower.events[session]
        found = row(events, run_id, session)
        rows.append(found)
        show(found)
        require(found["end"] == "success", f"the {kind} prompt ended as {found['end']}")
        require(bool(text_of(events, run_id).strip()), f"the {kind} prompt was answered by nothing")


async def server_kill(server: Server, one: Follower, session: str) -> tuple[Client, Follower]:
    """SIGKILL the server in mid-stream; nothing that was received may be lost or changed."""
    run_id = await ask(one, session, LONG)
    await one.wait(
        session, lambda event: event["runId"] == run_id and event["event"]["type"] == "TEXT_MESSAGE_CONTENT"
    )
    await server.kill()
    before = list(one.events[session])
    one.close()
    await server.start()
    client = await Client(server.address, server.token()).__aenter__()
    again = Follower(client)
    await client.request("session/attach", sessionId=session, afterSeq=0)
    last = before[-1]["seq"]
    await again.wait(session, lambda event: event["seq"] > last and ends(run_id)(event))
    log = {event["seq"]: event for event in again.events[session]}
    require(all(log.get(event["seq"]) == event for event in before), "an event that was received changed")
    require(
        [event["seq"] for event in again.events[session]] == sorted(log), "sequence numbers do not increase"
    )
    error = next(event for event in again.events[session] if ends(run_id)(event))
    require(error["event"].get("code") == "interrupted", "the run that was cut off is not marked")
    show(row(again.events[session], run_id, session))
    resumed = await again.wait(session, lambda event: event["origin"] == "resume")
    await again.wait(session, ends(resumed["runId"]))
    show(row(again.events[session], resumed["runId"], session))
    require(bool(text_of(again.events[session], resumed["runId"]).strip()), "the resume run answered nothing")
    return client, again


async def worker_kill(server: Server, follower: Follower, session: str) -> None:
    """SIGKILL the slice workers in mid-stream; the session still answers."""
    run_id = await ask(follower, session, LONG)
    await follower.wait(
        session, lambda event: event["runId"] == run_id and event["event"]["type"] == "TEXT_MESSAGE_CONTENT"
    )
    for worker in server.workers():
        worker.send_signal(signal.SIGKILL)
    await follower.wait(session, ends(run_id))
    events = follower.events[session]
    show(row(events, run_id, session))
    require(row(events, run_id, session)["end"] == "success", "the run did not survive its worker")
    crashed = [
        event
        for event in events
        if event["event"].get("name") == "ash.slice" and event["event"]["value"]["what"] == "crashed"
    ]
    require(bool(crashed), "the log does not show the crash")


async def demo() -> None:
    with tempfile.TemporaryDirectory(prefix="ash-demo-") as name:
        server = Server(Path(name))
        rows: list[dict[str, Any]] = []
        try:
            sys.stdout.write("starting the server (the first start fits the router and mode heads)\n")
            sys.stdout.flush()
            await server.start()
            show({column: column for column in COLUMNS})
            first = await Client(server.address, server.token()).__aenter__()
            second = await Client(server.address, server.token()).__aenter__()
            one, two = Follower(first), Follower(second)
            sessions = []
            for client in (first, first, second):
                session = (await client.request("session/new", title="demo"))["sessionId"]
                await client.request("session/attach", sessionId=session, afterSeq=0)
                sessions.append(session)
            await conversations(one, two, sessions, rows)
            used = {found["slice"] for found in rows}
            require(used == {"nano", "turbo"}, f"only {', '.join(sorted(used))} answered")
            two.close()
            client, follower = await server_kill(server, one, sessions[0])
            run_id = await ask(follower, sessions[0], "Thank you! What should I clean first?")
            await follower.wait(sessions[0], ends(run_id))
            show(row(follower.events[sessions[0]], run_id, sessions[0]))
            await worker_kill(server, follower, sessions[0])
            follower.close()
            await client.__aexit__(None, None, None)
        finally:
            await server.stop()
    sys.stdout.write("demo: ok\n")


def main() -> int:
    try:
        asyncio.run(demo())
    except (Failed, TimeoutError) as error:
        sys.stdout.write(f"demo: FAILED: {error or 'a turn did not end in time'}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
