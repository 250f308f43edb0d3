"""What must hold in a session's log whatever happened to the workers; pure functions over events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.harness.server import TERMINAL, Event

RESTART_CHARACTERS = 24
"""A message that goes on behind a crash with so many of its own first characters was begun again."""

BROKEN_OFF = frozenset({"crashed", "fell back"})


def text_by_message(log: Iterable[Event]) -> dict[str, str]:
    """The text of every message: its deltas put together."""
    texts: dict[str, str] = {}
    for event in log:
        body = event["event"]
        if body["type"] == "TEXT_MESSAGE_CONTENT":
            texts[body["messageId"]] = texts.get(body["messageId"], "") + body["delta"]
    return texts


def violations(log: Sequence[Event], asked: Iterable[str], live: Mapping[str, str]) -> list[str]:
    """Everything that is wrong with the log of one session, in words.

    Args:
        log: all its events, as a client that attaches with afterSeq 0 receives them.
        asked: the run ids that the session's inputs were promised.
        live: the text of every message as it was streamed.
    """
    found = []
    numbers = [event["seq"] for event in log]
    if any(later <= earlier for earlier, later in pairwise(numbers)):
        found.append("seq does not strictly increase")
    for run_id in asked:
        found += _run_violations(run_id, [event["event"] for event in log if event["runId"] == run_id])
    stored = text_by_message(log)
    found += [
        f"message {message}: {len(text)} characters were streamed, {len(stored.get(message, ''))} are stored"
        for message, text in live.items()
        if stored.get(message) != text
    ]
    found += [f"message {message} was begun again behind a crash" for message in _begun_again(log)]
    return found


def _run_violations(run_id: str, bodies: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    kinds = [body["type"] for body in bodies]
    count = Counter(kinds)
    terminals = sum(count[kind] for kind in TERMINAL)
    if count["RUN_STARTED"] != 1:
        found.append(f"run {run_id} was started {count['RUN_STARTED']} times")
    if terminals != 1:
        found.append(f"run {run_id} has {terminals} terminal events")
    elif kinds[-1] not in TERMINAL:
        found.append(f"run {run_id} goes on behind its terminal event")
    for opening, closing in (
        ("TEXT_MESSAGE_START", "TEXT_MESSAGE_END"),
        ("STEP_STARTED", "STEP_FINISHED"),
    ):
        if count[opening] != count[closing]:
            found.append(f"run {run_id}: {count[opening]} {opening}, {count[closing]} {closing}")
    opened = [body["messageId"] for body in bodies if body["type"] == "TEXT_MESSAGE_START"]
    if len(set(opened)) != len(opened):
        found.append(f"run {run_id} opened a message twice")
    return found


def _begun_again(log: Sequence[Event]) -> set[str]:
    """Messages whose text starts over where their worker crashed."""
    found = set()
    before: dict[str, str] = {}
    cut: dict[str, int] = {}
    for event in log:
        body = event["event"]
        if body["type"] == "TEXT_MESSAGE_CONTENT":
            before[body["messageId"]] = before.get(body["messageId"], "") + body["delta"]
        elif body.get("name") == "ash.slice" and body["value"]["what"] in BROKEN_OFF:
            cut.update({message: len(text) for message, text in before.items()})
        elif body["type"] == "TEXT_MESSAGE_END":
            message = body["messageId"]
            text, at = before.pop(message, ""), cut.pop(message, 0)
            opening = text.lstrip()[:RESTART_CHARACTERS]
            if at >= RESTART_CHARACTERS and text[at:].lstrip().startswith(opening):
                found.add(message)
    return found
