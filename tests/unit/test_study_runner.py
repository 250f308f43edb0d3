"""Sessions of a study over the wire, and the record that lets a study go on."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ash.domain.errors import StudyError
from ash.study.plan import Plan, schedule
from ash.study.progress import (
    FinishedSession,
    Provenance,
    StudyRecord,
    begin_or_resume,
    load_record,
    save_record,
)
from ash.study.runner import Driver

PLAN = Plan(
    name="trial", seeds=(1, 2), turns=3, openings=("Explain tries.",), conditions=("autonomous", "no_memory")
)
PROVENANCE = Provenance({"ash": "0"}, {"modes": {}}, {"nano": "abc"}, "encoder", {"cores": 2})


class ScriptedWire:
    """A server that answers every prompt at once; `fail_at` is the number of the prompt that goes wrong."""

    def __init__(self, fail_at: int | None = None, failure: str = "error") -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._numbers = itertools.count(1)
        self._fail_at = fail_at
        self._failure = failure

    async def request(self, method: str, **params: Any) -> dict[str, Any]:
        self.calls.append((method, params))
        match method:
            case "session/new" | "session/fork":
                return {"sessionId": f"ses_{next(self._numbers)}"}
            case "session/prompt":
                prompts = sum(name == "session/prompt" for name, _ in self.calls)
                run_id = f"run_{prompts}"
                if prompts == self._fail_at and self._failure == "close":
                    self._events.put_nowait(None)
                    await asyncio.sleep(0)  # lets others run, as a real socket does; no time passes
                    return {"runId": run_id}
                event: dict[str, Any] = {"type": "RUN_FINISHED", "outcome": {"type": "success"}}
                if prompts == self._fail_at:
                    event = {"type": "RUN_ERROR", "message": "the worker died", "code": "slice_crashed"}
                    if self._failure == "cancelled":
                        event = {"type": "RUN_FINISHED", "outcome": {"type": "cancelled"}}
                # The end comes before the receipt, as it may on a real connection.
                self._events.put_nowait({"runId": run_id, "seq": 10 * prompts, "event": event})
                await asyncio.sleep(0)  # lets others run, as a real socket does; no time passes
                return {"runId": run_id}
        return {}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        while (params := await self._events.get()) is not None:
            yield params


async def driven(wire: ScriptedWire, condition: str) -> tuple[FinishedSession, int]:
    turns = itertools.count(1)
    last = 0

    def on_turn() -> None:
        nonlocal last
        last = next(turns)

    finished = await Driver(wire, PLAN, condition, 1, lambda: 7).run(on_turn)
    return finished, last


async def test_a_session_says_what_its_schedule_says_with_keys_that_name_it() -> None:
    wire = ScriptedWire()
    finished, turns = await driven(wire, "autonomous")
    assert turns == 4
    prompts = [params for method, params in wire.calls if method == "session/prompt"]
    assert [params["prompt"][0]["text"] for params in prompts] == [
        step.text for step in schedule(PLAN, "autonomous", 1)
    ]
    assert [params["idempotencyKey"] for params in prompts] == [
        "study/trial/autonomous/1/0/opening",
        "study/trial/autonomous/1/1/go_on",
        "study/trial/autonomous/1/2/go_on",
        "study/trial/autonomous/1/3/go_on",
    ]
    assert {params["sessionId"] for params in prompts} == {"ses_1"}
    assert finished == FinishedSession("autonomous", 1, "ses_1", 7, 7)


async def test_without_memory_every_turn_is_a_copy_of_the_opening() -> None:
    wire = ScriptedWire()
    finished, _ = await driven(wire, "no_memory")
    forks = [params for method, params in wire.calls if method == "session/fork"]
    assert forks == [{"sessionId": "ses_1", "atSeq": 10}] * 3
    assert finished.continuations == ("ses_2", "ses_3", "ses_4")
    assert finished.fork_seq == 10
    left = [params["sessionId"] for method, params in wire.calls if method == "session/detach"]
    assert left == ["ses_2", "ses_3", "ses_4"]


@pytest.mark.parametrize(
    ("failure", "problem"),
    [
        ("error", "turn 2 of the session autonomous with seed 1 failed: the worker died"),
        ("cancelled", "turn 2 of the session autonomous with seed 1 was cancelled"),
        ("close", "the server closed the connection"),
    ],
)
async def test_a_turn_that_goes_wrong_ends_the_session_and_says_where(failure: str, problem: str) -> None:
    with pytest.raises(StudyError, match=problem):
        await driven(ScriptedWire(fail_at=3, failure=failure), "autonomous")


# -- the record --------------------------------------------------------------------------------------------


def test_a_study_goes_on_where_it_was_left(tmp_path: Path) -> None:
    record = begin_or_resume(PLAN, PROVENANCE, tmp_path)
    assert record.missing() == [("autonomous", 1), ("no_memory", 1), ("autonomous", 2), ("no_memory", 2)]
    done = FinishedSession("no_memory", 1, "ses_1", 1, 2, ("ses_2",), 10)
    save_record(record.with_session(done), tmp_path)
    again = begin_or_resume(PLAN, PROVENANCE, tmp_path)
    assert again.missing() == [("autonomous", 1), ("autonomous", 2), ("no_memory", 2)]
    assert again.finished == (done,)


def test_another_plan_or_other_weights_do_not_go_on_with_it(tmp_path: Path) -> None:
    record = StudyRecord(PLAN, PLAN.digest, PROVENANCE, (FinishedSession("autonomous", 1, "s", 1, 2),))
    save_record(record, tmp_path)
    with pytest.raises(StudyError, match="another plan"):
        begin_or_resume(Plan(name="other", seeds=(1,), turns=1, openings=("x",)), PROVENANCE, tmp_path)
    changed = Provenance({"ash": "0"}, {"modes": {}}, {"nano": "def"}, "encoder", {"cores": 2})
    with pytest.raises(StudyError, match="the weights are not those"):
        begin_or_resume(PLAN, changed, tmp_path)


def test_a_record_that_cannot_be_read_is_not_overwritten(tmp_path: Path) -> None:
    assert load_record(tmp_path) is None
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(StudyError, match="move it away"):
        begin_or_resume(PLAN, PROVENANCE, tmp_path)
    assert (tmp_path / "study.json").read_text() == "{"
