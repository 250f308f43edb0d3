"""Redaction by rule: what goes, what stays, and that one value has one name."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash.study.measures import session_measures
from ash.study.redaction import Redactor
from ash.study.transcript import view
from tests.study_logs import LogBuilder, shifting_session


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("Write to ada.byron@example.org today", "Write to [mail-1] today"),
        ("call +44 20 7946 0958 now", "call [number-1] now"),
        ("card 4111-1111-1111-1111", "card [number-1]"),
        ("host 192.168.100.12 is up", "host [number-1] is up"),
        ("key sk-abcdef0123456789 leaked", "key [token-1] leaked"),
        ("Bearer eyJhbGci.eyJzdWIi.c2ln", "Bearer [token-1]"),
        ("sha 0123456789abcdef0123456789abcdef", "sha [token-1]"),
        ("id aB3dE5fG7hJ9kL1mN3pQ5rS7", "id [token-1]"),
        ("in 1969 we had 12 apples and 99.5 pears", "in 1969 we had 12 apples and 99.5 pears"),
        ("incomprehensibilities aside", "incomprehensibilities aside"),
    ],
)
def test_rules(text: str, redacted: str) -> None:
    assert Redactor().text(text) == redacted


def log_of(*turns: tuple[str, str]) -> LogBuilder:
    log = LogBuilder()
    for asked, said in turns:
        log.turn(asked, said, "conversational")
    return log


def spoken(log: LogBuilder, names: tuple[str, ...] = ()) -> list[str]:
    redactor = Redactor(names)
    redactor.learn(log.records)
    return [message.text for message in view("ses_1", redactor.redact(log.records)).messages]


def test_a_name_that_is_introduced_goes_everywhere_before_and_after() -> None:
    # name-1 is the owner, who stands in the first event.
    log = log_of(("Is Grace there?", "My name is Grace Hopper."), ("Hello Grace", "Hello Hopper"))
    assert spoken(log) == [
        "Is [name-2] there?",
        "My name is [name-2].",
        "Hello [name-2]",
        "Hello [name-2]",
    ]


def test_principals_and_names_that_are_given_go_and_roles_stay() -> None:
    log = log_of(("ada asked the owner", "Turing said so"))
    assert spoken(log, ("Turing",)) == ["[name-1] asked the owner", "[name-2] said so"]


def test_one_value_has_one_pseudonym_in_all_sessions_of_an_export() -> None:
    first, second = log_of(("a@b.org", "and c@d.org")), log_of(("c@d.org", "A@B.org"))
    redactor = Redactor()
    redactor.learn(first.records)
    redactor.learn(second.records)
    texts = [
        message.text
        for log in (first, second)
        for message in view("ses_1", redactor.redact(log.records)).messages
    ]
    assert texts == ["[mail-1]", "and [mail-2]", "[mail-2]", "[mail-1]"]


def test_a_match_across_two_pieces_of_a_stream_is_found() -> None:
    log = LogBuilder()
    log.turn("Who?", ["Write to ada@exa", "mple.org please"], "conversational")
    assert spoken(log)[1] == "Write to [mail-1] please"


def test_nothing_secret_is_left_anywhere_in_the_log() -> None:
    log = LogBuilder(persona="You serve Dr Ada Byron, ada@example.org.")
    log.turn("I am ada@example.org", "Hello", "conversational", key="call-0123456789")
    log.tool("c1", "mail", '{"to": "ada@example.org"}', "sent to ada@example.org, +44 20 7946 0958")
    redactor = Redactor()
    redactor.learn(log.records)
    text = msgspec.json.encode(redactor.redact(log.records)).decode()
    for secret in ("ada@", "Byron", "7946", "0123456789", '"ada"'):
        assert secret not in text, secret


def test_ids_and_ash_terms_stay_so_that_measures_do() -> None:
    log = shifting_session()
    redactor = Redactor()
    redactor.learn(log.records)
    before, after = view("ses_1", log.records), view("ses_1", redactor.redact(log.records))
    assert [message.message_id for message in after.messages] == [
        message.message_id for message in before.messages
    ]
    assert after.shifts == before.shifts
    assert [turn.route for turn in after.turns] == [turn.route for turn in before.turns]
    counts = ("shifts", "answers", "share_creative", "hours")
    assert [session_measures(after)[name] for name in counts] == [
        session_measures(before)[name] for name in counts
    ]


@given(st.text())
def test_redacting_twice_changes_nothing_more(text: str) -> None:
    redactor = Redactor(["Ada"])
    once = redactor.text(text)
    assert redactor.text(once) == once
