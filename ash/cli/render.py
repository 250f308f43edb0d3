"""Events as text for people. Pure."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any


def clock_time(ts: int) -> str:
    """Local wall-clock time of `ts` milliseconds since the epoch."""
    return dt.datetime.fromtimestamp(ts / 1000, tz=dt.UTC).astimezone().strftime("%H:%M:%S")


def event_line(params: dict[str, Any]) -> str:
    """`session/event` params as one line: seq, time, run, origin, type, the rest."""
    event = dict(params["event"])
    name = event.pop("type")
    if name == "CUSTOM":
        name, event = event["name"], event["value"]
    rest = json.dumps(event, ensure_ascii=False) if event else ""
    run, origin = params["runId"] or "-", params["origin"] or "-"
    return f"{params['seq']:>6} {clock_time(params['ts'])} {run} {origin} {name} {rest}".rstrip()


def turn_line(turn: dict[str, Any]) -> str:
    """What a finished turn cost: slice, mode, tokens, time to first token, speed."""
    parts = [str(turn.get("slice", "?")), str(turn.get("intent", "?")), str(turn.get("mode", "?"))]
    if "input" in turn:
        parts.append(f"{turn['input']} prompt tokens, {turn['cached']} reused")
    if "ttftMs" in turn:
        parts.append(f"first token {turn['ttftMs']:.0f} ms")
    if "tokensPerSecond" in turn:
        parts.append(f"{turn['tokensPerSecond']} tokens/s")
    return " | ".join(parts)
