"""`ash chat`: a conversation in the terminal."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

from ash.cli.client import Client, ServerRefusedError
from ash.cli.render import turn_line

PROMPT = "you> "


class Turns:
    """Renders the events of one session and knows when the run that was asked for has ended."""

    def __init__(self) -> None:
        self.run_id: str | None = None
        self.ended = asyncio.Event()
        self._facts: dict[str, Any] = {}

    def show(self, params: dict[str, Any]) -> None:
        """Take one event."""
        event = params["event"]
        match event["type"]:
            case "TEXT_MESSAGE_START":
                sys.stdout.write("ash> ")
            case "TEXT_MESSAGE_CONTENT":
                sys.stdout.write(event["delta"])
            case "TEXT_MESSAGE_END":
                sys.stdout.write("\n")
            case "CUSTOM" if event["name"] == "ash.route":
                self._facts = {"slice": event["value"]["slice"], "intent": event["value"]["intent"]}
            case "CUSTOM" if event["name"] == "ash.mode" and event["value"].get("role") != "user":
                self._facts["mode"] = event["value"]["mode"]
            case "CUSTOM" if event["name"] == "ash.mode_shift":
                sys.stdout.write(f"  [shift {event['value']['from']} -> {event['value']['to']}]\n")
            case "CUSTOM" if event["name"] == "ash.slice":
                sys.stdout.write(f"  [{event['value']['slice']} {event['value']['what']}]\n")
            case "RUN_FINISHED" | "RUN_ERROR":
                self._finish(params)
        sys.stdout.flush()

    def _finish(self, params: dict[str, Any]) -> None:
        event = params["event"]
        if event["type"] == "RUN_ERROR":
            sys.stdout.write(f"  [failed: {event['message']}]\n")
        else:
            facts = {**self._facts, **(event.get("metadata") or {})}
            for usage in event.get("usage") or []:
                facts |= {"input": usage["inputTokens"], "cached": usage.get("cachedInputTokens", 0)}
            sys.stdout.write(f"  [{event['outcome']['type']}: {turn_line(facts)}]\n")
        if params["runId"] == self.run_id:
            self.ended.set()


async def chat_loop(address: str, token: str, session: str | None) -> None:
    """Talk until the end of input.

    Raises:
        AshError: the server cannot be reached, or refuses.
    """
    async with Client(address, token) as client:
        if session is None:
            session = (await client.request("session/new", title="chat"))["sessionId"]
            after = 0
        else:
            after = 0
        turns = Turns()
        await client.request("session/attach", sessionId=session, afterSeq=after)
        sys.stdout.write(f"session {session}; Ctrl-C cancels an answer, Ctrl-D leaves\n")

        async def render() -> None:
            async for params in client.events():
                turns.show(params)

        rendering = asyncio.create_task(render())
        loop = asyncio.get_running_loop()
        interrupted = asyncio.Event()
        loop.add_signal_handler(signal.SIGINT, interrupted.set)
        try:
            while not rendering.done():
                text = await asyncio.to_thread(_read_line)
                if text is None:
                    return
                if text.strip():
                    await _one_turn(client, session, turns, interrupted, text)
        finally:
            rendering.cancel()
            await asyncio.gather(rendering, return_exceptions=True)


async def _one_turn(
    client: Client, session: str, turns: Turns, interrupted: asyncio.Event, text: str
) -> None:
    turns.ended.clear()
    interrupted.clear()
    try:
        receipt = await client.request(
            "session/prompt", sessionId=session, prompt=[{"type": "text", "text": text}]
        )
    except ServerRefusedError as error:
        sys.stdout.write(f"  [refused: {error}]\n")
        return
    turns.run_id = receipt["runId"]
    ended = asyncio.create_task(turns.ended.wait())
    stop = asyncio.create_task(interrupted.wait())
    await asyncio.wait({ended, stop}, return_when=asyncio.FIRST_COMPLETED)
    if not ended.done():
        await client.request("session/cancel", sessionId=session, runId=turns.run_id)
        await ended
    stop.cancel()


def _read_line() -> str | None:
    try:
        return input(PROMPT)
    except (EOFError, KeyboardInterrupt):
        return None
