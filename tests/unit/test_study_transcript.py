"""Logs become sessions that a study can read, whatever is missing in them."""

from __future__ import annotations

from ash.domain.events import (
    Custom,
    InputValue,
    RunStarted,
    StateDelta,
    StepStarted,
    TextMessageContent,
    TextMessageStart,
)
from ash.study.episodes import episodes
from ash.study.transcript import view
from tests.study_logs import LogBuilder, shifting_session


def test_a_turn_holds_its_input_its_answer_its_route_and_its_cost() -> None:
    log = LogBuilder()
    log.turn("What is a trie?", ["A tree ", "of prefixes."], "analytic", key="k1")
    session = view("ses_1", log.records)
    (turn,) = session.turns
    assert (turn.inputs, turn.answers, turn.outcome, turn.origin) == (
        ("msg_1u",),
        ("msg_1a",),
        "success",
        "user",
    )
    assert turn.route is not None
    assert turn.route.slice == "nano"
    assert turn.usage is not None
    assert turn.usage.output_tokens == 10
    (asked, said) = session.messages
    assert (asked.text, asked.principal, asked.key, asked.role) == ("What is a trie?", "ada", "k1", "user")
    assert (said.text, said.role, said.complete) == ("A tree of prefixes.", "assistant", True)
    assert said.reading is not None
    assert said.reading.mode == "analytic"
    assert (session.title, session.owner, session.persona) == ("A talk", "ada", "You are Ash.")
    assert session.gaps == 0


def test_no_records_are_an_empty_session() -> None:
    session = view("ses_1", [])
    assert (session.messages, session.turns, session.shifts) == ((), (), ())
    assert episodes(session) == ()


def test_a_session_of_tool_calls_only() -> None:
    log = LogBuilder()
    log.tool("c1", "search", '{"q": "x"}', "found")
    log.tool("c2", "send", "{}", None)
    session = view("ses_1", log.records)
    assert session.messages == ()
    assert [(tool.name, tool.arguments, tool.result) for tool in session.tools] == [
        ("search", '{"q": "x"}', "found"),
        ("send", "{}", None),
    ]
    (turn,) = session.turns
    assert (turn.tools, turn.outcome) == (("c1", "c2"), "open")


def test_missing_events_are_counted_and_what_is_left_is_shown() -> None:
    log = LogBuilder()
    log.turn("Hello", ["one ", "two ", "three"], "conversational")
    left = [
        record
        for record in log.records
        if not isinstance(record.event, RunStarted | TextMessageStart | StepStarted)
    ]
    session = view("ses_1", left)
    assert session.gaps == len(log.records) - len(left)
    assert [message.text for message in session.messages] == ["Hello", "one two three"]
    assert session.turns[0].answers == ("msg_1a",)


def test_a_message_that_was_never_ended_is_incomplete() -> None:
    log = LogBuilder()
    log.add(TextMessageStart("m", "assistant"), "run_1")
    log.add(TextMessageContent("m", "half"), "run_1")
    (message,) = view("ses_1", log.records).messages
    assert (message.text, message.complete) == ("half", False)


def test_an_event_of_another_shape_is_counted_and_the_rest_is_read() -> None:
    log = LogBuilder()
    strange = log.add(Custom(InputValue.event_name, {"messageId": 7}))
    log.turn("Hello", "Hi", "conversational")
    session = view("ses_1", log.records)
    assert session.unreadable == (strange.seq,)
    assert len(session.messages) == 2


def test_a_change_of_persona_is_a_notice_and_the_persona_from_then_on() -> None:
    log = LogBuilder()
    log.add(StateDelta([{"op": "replace", "path": "/persona", "value": "You are a bard."}]))
    session = view("ses_1", log.records)
    assert session.persona == "You are a bard."
    assert [(notice.name, notice.value) for notice in session.notices] == [
        ("persona", {"to": "You are a bard."})
    ]


def test_episodes_go_from_onset_to_onset() -> None:
    session = view("ses_1", shifting_session().records)
    found = [
        (episode.mode, episode.genre, [answer.message_id for answer in episode.answers])
        for episode in episodes(session)
    ]
    assert found == [
        ("analytic", None, ["msg_1a", "msg_2a", "msg_3a"]),
        ("creative", "country", ["msg_4a", "msg_5a", "msg_6a"]),
    ]


def test_a_session_without_a_shift_is_one_episode_in_the_mode_it_ended_in() -> None:
    log = LogBuilder()
    log.turn("Hi", "Hello", "conversational")
    log.turn("So?", "A proof", "analytic")
    (episode,) = episodes(view("ses_1", log.records))
    assert (episode.mode, len(episode.answers)) == ("analytic", 2)
