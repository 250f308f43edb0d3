"""Exports: what they hold, that they come back, and that a fault leaves nothing half done."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash.domain.errors import StudyError
from ash.domain.events import Record, RunError, RunStarted, StateSnapshot
from ash.session.session import Session
from ash.study.dialogue import dialogue, json_lines, read_back, sidecar, sidecar_of
from ash.study.files import replacing
from ash.study.importing import imported
from ash.study.markdown import markdown
from ash.study.measures import session_measures
from ash.study.tables import TURN_COLUMNS, csv_text, turn_rows, write_parquet
from ash.study.transcript import view
from tests.study_logs import START, LogBuilder, shifting_session


def exported(*logs: list[Record]) -> tuple[list[str], list[str]]:
    """The lines of both files of a jsonl export."""
    views = [view(log[0].session_id, log) for log in logs]
    messages = json_lines(dialogue(each) for each in views)
    events = json_lines(line for log in logs for line in sidecar(log))
    return messages.rstrip("\n").split("\n"), events.rstrip("\n").split("\n")


def came_back(messages: list[str], events: list[str]) -> dict[str, list[Record]]:
    return read_back(messages, events, source="talk.jsonl", events_source="talk.events.jsonl")


def test_messages_have_the_form_that_chat_models_are_trained_on() -> None:
    log = LogBuilder()
    log.turn("What is 2+2?", "4", "analytic")
    log.tool("c1", "search", '{"q": 1}', "found")
    messages, _ = exported(log.records)
    assert json.loads(messages[0]) == {
        "session_id": "ses_1",
        "title": "A talk",
        "messages": [
            {"id": "persona:ses_1", "role": "system", "content": "You are Ash."},
            {"id": "msg_1u", "role": "user", "content": "What is 2+2?"},
            {"id": "msg_1a", "role": "assistant", "content": "4"},
            {
                "id": "call:c1",
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "search", "arguments": '{"q": 1}'}}
                ],
            },
            {"id": "result:c1", "role": "tool", "tool_call_id": "c1", "content": "found"},
        ],
    }


def test_the_sidecar_names_messages_and_holds_none_of_their_text() -> None:
    log = LogBuilder()
    log.turn("a secret question", ["a secret ", "answer"], "analytic")
    _, events = exported(log.records)
    assert "secret" not in "".join(events)
    lengths = [
        (row["messageId"], row["event"]["length"])
        for row in map(json.loads, events)
        if row["event"]["type"] == "TEXT_MESSAGE_CONTENT"
    ]
    assert lengths == [("msg_1a", 9), ("msg_1a", 6)]


@given(
    st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1), max_size=4)
)
def test_what_was_exported_comes_back_event_by_event(answers: list[list[str]]) -> None:
    log, tools = LogBuilder("ses_1"), LogBuilder("ses_2")
    for answer in answers:
        log.turn("".join(answer)[::-1], answer, "creative")
    log.skip(3)
    log.turn("last", "one", "analytic")
    tools.tool("c1", "search", "not json", "\u2028found\x85")
    assert came_back(*exported(log.records, tools.records)) == {"ses_1": log.records, "ses_2": tools.records}


def test_an_imported_session_gives_the_same_measures() -> None:
    log = shifting_session()
    log.skip(5)
    log.turn("Could you write a blues song?", "My baby left me, my baby left me", "creative", genre="blues")
    before = session_measures(view("ses_1", log.records))
    drafts = imported(came_back(*exported(log.records))["ses_1"], "ses_9")
    records = [
        Record("ses_9", seq, timed.ts, timed.draft.run_id, timed.draft.origin, timed.draft.event)
        for seq, timed in enumerate(drafts, start=1)
    ]
    again = view("ses_9", records)
    assert session_measures(again) == pytest.approx(before, nan_ok=True)
    assert [message.message_id for message in again.messages] == [
        message.message_id for message in view("ses_1", log.records).messages
    ]
    (shift,) = again.shifts
    (onset,) = [answer for answer in again.answers if answer.seq == shift.value.onset_seq]
    assert onset.message_id == "msg_4a"


def test_an_imported_session_is_marked_and_has_nothing_left_to_do() -> None:
    log = LogBuilder()
    log.turn("Hi", "Hello", "conversational")
    log.add(RunStarted("ses_1", "run_x", metadata={"messageId": "m"}), "run_x")
    drafts = imported(log.records, "ses_9")
    opening = drafts[0].draft.event
    assert isinstance(opening, StateSnapshot)
    assert opening.snapshot["readOnly"] is True
    assert opening.snapshot["title"] == "A talk"
    assert isinstance(drafts[-1].draft.event, RunError)
    session = Session("ses_9")
    for seq, timed in enumerate(drafts, start=1):
        draft = timed.draft
        session.apply(Record("ses_9", seq, timed.ts, draft.run_id, draft.origin, draft.event))
    assert session.state == "idle"


def test_a_log_without_its_beginning_gets_one() -> None:
    log = LogBuilder()
    log.turn("Hi", "Hello", "conversational")
    first = imported(log.records[1:], "ses_9")[0].draft.event
    assert isinstance(first, StateSnapshot)
    assert first.snapshot["readOnly"] is True


@pytest.mark.parametrize(
    ("messages", "events", "problem"),
    [
        (["{"], [], "talk.jsonl:1: not JSON"),
        (["[]"], [], "talk.jsonl:1: not a JSON object"),
        (['{"messages": []}'], [], "talk.jsonl:1: no session_id"),
        (['{"session_id": "s", "messages": [{}]}'], [], "talk.jsonl:1: a message has no id"),
        (
            ['{"session_id": "s", "messages": []}'],
            ['{"sessionId": "t"}'],
            "events.jsonl:1: session t is not in",
        ),
        (
            ['{"session_id": "s", "messages": []}'],
            ['{"sessionId": "s"}'],
            "events.jsonl:1: there is no event",
        ),
        (
            ['{"session_id": "s", "messages": []}'],
            ['{"sessionId": "s", "seq": 1, "ts": 1, "event": {"type": "NOTHING"}}'],
            "events.jsonl:1: not an event of Ash",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(messages: list[str], events: list[str], problem: str) -> None:
    with pytest.raises(StudyError, match=problem):
        came_back(messages, events)


def test_texts_that_do_not_fit_their_events_are_refused() -> None:
    log = LogBuilder()
    log.turn("Hi", "Hello there", "conversational")
    messages, events = exported(log.records)
    with pytest.raises(StudyError, match="do not belong together"):
        came_back([messages[0].replace("Hello there", "Hello")], events)


def test_nothing_cannot_be_imported() -> None:
    with pytest.raises(StudyError, match="no events"):
        imported([], "ses_9")


def test_a_log_whose_runs_lack_their_start_is_refused() -> None:
    log = LogBuilder()
    log.turn("Hi", "Hello", "conversational")
    left = [record for record in log.records if not isinstance(record.event, RunStarted)]
    with pytest.raises(StudyError, match="not a log that Ash can hold"):
        imported(left, "ses_9")


def test_csv_has_one_row_a_turn_with_text_that_needs_quotes() -> None:
    log = shifting_session()
    log.turn('She said "no",\nthen left', "Well, yes", "conversational")
    text = csv_text(turn_rows(view("ses_1", log.records)), TURN_COLUMNS)
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == 7
    assert rows[6]["input"] == 'She said "no",\nthen left'
    assert rows[5]["shift_to"] == "creative"
    assert rows[5]["shift_onset_message"] == "msg_4a"
    assert rows[0]["shift_to"] == ""


def test_parquet_has_typed_columns() -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `study` is not installed")
    target = io.BytesIO()
    rows = turn_rows(view("ses_1", shifting_session().records))
    write_parquet(rows, TURN_COLUMNS, target)  # type: ignore[arg-type]  # pyarrow takes either
    table = parquet.read_table(io.BytesIO(target.getvalue()))
    assert table.num_rows == 6
    assert str(table.schema.field("ttft_ms").type) == "double"
    assert str(table.schema.field("output_tokens").type) == "int64"
    assert table.column("answer_ids").to_pylist()[0] == "msg_1a"


def test_markdown_cites_messages_and_shows_the_shift() -> None:
    text = markdown(view("ses_1", shifting_session().records))
    assert "`msg_4a`, nano, creative country" in text
    assert "**Shift** analytic -> creative country, since `msg_4a`; trigger: self_directed" in text


@pytest.mark.parametrize("records", [[], LogBuilder().records])
def test_a_session_without_turns_can_be_exported(records: list[Record]) -> None:
    session = view("ses_1", records)
    assert turn_rows(session) == []
    assert "no messages" in markdown(session)
    assert dialogue(session)["session_id"] == "ses_1"


# -- files -------------------------------------------------------------------------------------------------


def test_the_sidecar_stands_beside_its_messages() -> None:
    assert sidecar_of(Path("a/talk.jsonl")) == Path("a/talk.events.jsonl")


def test_a_file_that_exists_is_overwritten_with_force_only(tmp_path: Path) -> None:
    target = tmp_path / "talk.csv"
    target.write_text("old")
    with pytest.raises(StudyError, match="--force"), replacing([target], force=False) as (file,):
        file.write_text("new")
    assert target.read_text() == "old"
    with replacing([target], force=True) as (file,):
        file.write_text("new")
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "talk.csv"

    def overtaken() -> None:
        with replacing([target], force=False) as (file,):
            file.write_text("new")
            target.write_text("someone else's")

    with pytest.raises(StudyError, match="exists"):
        overtaken()
    assert target.read_text() == "someone else's"


def test_a_full_disk_in_the_middle_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    messages, events = tmp_path / "talk.jsonl", tmp_path / "talk.events.jsonl"
    messages.write_text("old")

    def half_written() -> None:
        with replacing([messages, events], force=True) as (first, second):
            first.write_text("new")
            second.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StudyError, match="nothing is left"):
        half_written()
    assert messages.read_text() == "old"
    assert list(tmp_path.iterdir()) == [messages]


def test_a_disk_that_is_full_when_flushed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(StudyError, match="No space left"),
        replacing([tmp_path / "x.csv"], force=False) as (file,),
    ):
        file.write_text("new")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_and_a_folder_as_target_are_named(tmp_path: Path) -> None:
    with (
        pytest.raises(StudyError, match="there is no folder"),
        replacing([tmp_path / "a" / "b"], force=False),
    ):
        pass
    with pytest.raises(StudyError, match="is a folder"), replacing([tmp_path], force=True):
        pass


def test_times_are_those_of_the_log() -> None:
    row = turn_rows(view("ses_1", shifting_session().records))[0]
    assert START == 1_800_000_000_000
    assert row["started"] == "2027-01-15T08:00:02.000+00:00"
