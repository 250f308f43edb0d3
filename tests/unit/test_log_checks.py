"""The checks of a log after crashes find each fault that they are for, and nothing in a sound log."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.log_checks import text_by_message, violations

OPENING = "Once upon a time there lived a miller by the river, "


def log(*bodies: dict[str, Any]) -> list[dict[str, Any]]:
    """The bodies as events of one run, numbered from 1; those that say `free` belong to none."""
    return [
        {"seq": number, "runId": None if body.get("free") else "run", "event": body}
        for number, body in enumerate(bodies, 1)
    ]


def delta(text: str) -> dict[str, Any]:
    return {"type": "TEXT_MESSAGE_CONTENT", "messageId": "msg", "delta": text}


STARTED = {"type": "RUN_STARTED"}
OPENED = {"type": "TEXT_MESSAGE_START", "messageId": "msg"}
ENDED = {"type": "TEXT_MESSAGE_END", "messageId": "msg"}
FINISHED = {"type": "RUN_FINISHED"}
CRASHED = {"type": "CUSTOM", "name": "ash.slice", "value": {"what": "crashed"}, "free": True}


def found(events: list[dict[str, Any]], live: dict[str, str] | None = None) -> list[str]:
    return violations(events, ["run"], text_by_message(events) if live is None else live)


def test_a_sound_log_with_a_crash_in_mid_message_has_nothing_wrong() -> None:
    sound = log(STARTED, OPENED, delta(OPENING), CRASHED, delta("who had a cat."), ENDED, FINISHED)
    assert found(sound) == []


def test_a_repeated_seq_is_found() -> None:
    events = log(STARTED, FINISHED)
    events[1]["seq"] = 1
    assert found(events) == ["seq does not strictly increase"]


def test_a_run_without_an_end_or_with_two_is_found() -> None:
    assert found(log(STARTED)) == ["run run has 0 terminal events"]
    assert found(log(STARTED, FINISHED, FINISHED)) == ["run run has 2 terminal events"]


def test_a_run_that_was_never_started_is_found() -> None:
    assert "run run was started 0 times" in found([])


def test_an_event_behind_the_end_is_found() -> None:
    events = log(STARTED, FINISHED, OPENED, ENDED)
    assert found(events) == ["run run goes on behind its terminal event"]


def test_a_message_that_is_not_closed_or_opened_twice_is_found() -> None:
    assert found(log(STARTED, OPENED, FINISHED)) == ["run run: 1 TEXT_MESSAGE_START, 0 TEXT_MESSAGE_END"]
    twice = log(STARTED, OPENED, ENDED, OPENED, ENDED, FINISHED)
    assert found(twice) == ["run run opened a message twice"]


def test_text_that_was_streamed_and_is_stored_differently_is_found() -> None:
    events = log(STARTED, OPENED, delta("abc"), ENDED, FINISHED)
    assert found(events, {"msg": "abcabc"}) == ["message msg: 6 characters were streamed, 3 are stored"]


def test_a_message_that_starts_over_behind_a_crash_is_found() -> None:
    events = log(STARTED, OPENED, delta(OPENING), CRASHED, delta(OPENING), ENDED, FINISHED)
    assert found(events) == ["message msg was begun again behind a crash"]
