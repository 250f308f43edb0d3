"""Measures of a session, on cases worked by hand."""

from __future__ import annotations

import math

import pytest

from ash.domain.events import Origin
from ash.study.measures import (
    activity,
    distinct,
    genre_adaptation,
    genre_asked,
    repetition_of_earlier,
    repetition_within,
    session_measures,
)
from ash.study.rubric import RUBRIC, KeywordJudge, LexicalRater, agreement, rate_messages
from ash.study.transcript import Message, view
from ash.study.vectors import collapse, dispersion, persona_consistency
from tests.study_logs import LogBuilder, shifting_session


@pytest.mark.parametrize(
    ("text", "genre"),
    [
        ("Now write me a country song", "country"),
        ("Can you answer with the blues?", "blues"),
        ("Try a gospel hymn, then a rap", "gospel"),
        ("Your turn: a haiku", "poetry"),
        ("The country has many rivers", None),
        ("Write a report on rivers", None),
        ("Write about countryside", None),
    ],
)
def test_an_input_asks_for_a_genre_in_words(text: str, genre: str | None) -> None:
    assert genre_asked(text) == genre


def test_a_genre_follows_its_challenge_with_a_delay_in_answers() -> None:
    log = LogBuilder()
    log.turn("Sing a country song", "Trucks", "creative", genre="country")
    log.turn("Now do a blues", "Still trucks", "creative", genre="country")
    log.turn("Go on", "My baby left", "creative", genre="blues")
    log.turn("Try a gospel hymn", "My baby left again", "creative", genre="blues")
    found = genre_adaptation(view("ses_1", log.records))
    assert [(each.genre, each.followed_by, each.delay) for each in found] == [
        ("country", "msg_1a", 0),
        ("blues", "msg_3a", 1),
        ("gospel", None, None),
    ]
    measures = session_measures(view("ses_1", log.records))
    assert measures["genre_followed"] == pytest.approx(2 / 3)
    assert measures["genre_delay"] == 0.5


def test_what_follows_the_next_challenge_counts_for_that_one() -> None:
    log = LogBuilder()
    log.turn("Sing a country song", "My baby left", "creative", genre="blues")
    log.turn("Now do a rap", "Trucks", "creative", genre="country")
    country, rap = genre_adaptation(view("ses_1", log.records))
    assert (country.delay, rap.delay) == (None, None)


def test_activity_is_counted_by_origin() -> None:
    log = LogBuilder()
    log.turn("Hi", "Hello", "conversational")
    log.turn("Go on", "Well", "conversational", origin=Origin.TICK)
    log.turn("Go on", "Then", "conversational", origin=Origin.TICK)
    found = activity(view("ses_1", log.records))
    assert {origin: (part.turns, part.characters) for origin, part in found.items()} == {
        "user": (1, 5),
        "tick": (2, 8),
    }
    assert session_measures(view("ses_1", log.records))["turns_tick"] == pytest.approx(2 / 3)


def test_distinct_and_repetition() -> None:
    assert distinct(["a b a b"], 1) == 0.5
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert math.isnan(distinct(["a"], 2))
    assert repetition_within("one two three four one two three four", 4) == pytest.approx(1 / 5)
    assert repetition_of_earlier(["a b c d", "x a b c d", "a b c d"], 4) == [0.5, 1.0]
    assert repetition_of_earlier(["a b c d", "x x x x", "a b c d"], 4, window=1) == [0.0, 0.0]


def test_rates_of_a_session_with_one_shift() -> None:
    measures = session_measures(view("ses_1", shifting_session().records))
    assert measures["shifts"] == measures["shifts_self_directed"] == 1
    assert measures["shifts_per_100_answers"] == pytest.approx(100 / 6)
    assert measures["shifts_per_hour"] == pytest.approx(1 / measures["hours"])
    assert (measures["share_analytic"], measures["share_creative"]) == (0.5, 0.5)


def test_an_empty_session_has_counts_and_no_rates() -> None:
    measures = session_measures(view("ses_1", []))
    assert (measures["answers"], measures["shifts"]) == (0, 0)
    assert math.isnan(measures["shifts_per_hour"])
    assert math.isnan(measures["distinct_2"])


# -- vectors -----------------------------------------------------------------------------------------------

NORTH, EAST = (0.0, 1.0), (1.0, 0.0)


def test_an_agent_that_keeps_to_its_persona_and_others_that_do_not() -> None:
    found = persona_consistency(
        NORTH, {"keeps": [NORTH, NORTH], "strays": [EAST, EAST], "turns": [NORTH, EAST]}
    )
    assert (found["keeps"].prompt_to_line, found["keeps"].line_to_line, found["keeps"].within) == (1, 1, 1)
    assert (found["strays"].prompt_to_line, found["strays"].distance) == (0, 1)
    assert (found["turns"].line_to_line, found["turns"].prompt_to_line) == (0, 0.5)
    assert found["keeps"].between == 0.25


def test_lines_that_are_missing_leave_measures_undefined() -> None:
    found = persona_consistency(None, {"one": [NORTH], "none": []})
    assert math.isnan(found["one"].prompt_to_line)
    assert math.isnan(found["one"].within)
    assert math.isnan(found["none"].between)
    assert math.isnan(persona_consistency(NORTH, {"none": []})["none"].prompt_to_line)


def test_a_session_that_narrows_to_a_theme_collapses() -> None:
    assert dispersion([NORTH, NORTH]) == 0
    assert dispersion([NORTH, EAST]) == 1
    assert collapse([NORTH, EAST, NORTH, NORTH]) == 1
    assert collapse([NORTH, NORTH, NORTH, EAST]) == -1
    assert math.isnan(collapse([NORTH, EAST, NORTH]))


# -- rubric ------------------------------------------------------------------------------------------------


def message(number: int, text: str) -> Message:
    return Message(f"m{number}", "assistant", text, number, number, 0, 0, None, None)


@pytest.mark.parametrize(
    ("text", "item", "citation"),
    [
        ("Bring it on, friend.", "competitive", "Bring it on"),
        ("Let me see you beat that.", "competitive", "beat that"),
        ("Well played. I can\u2019t match it.", "acknowledging", "Well played"),
        ("Your second verse was really good.", "acknowledging", "Your second verse was really good"),
    ],
)
def test_the_lexical_rater_cites_what_it_found(text: str, item: str, citation: str) -> None:
    rater = LexicalRater(RUBRIC)
    found = {each.name: rater.rate(each, message(1, text)) for each in RUBRIC}
    assert found[item].citation == citation
    assert [name for name, verdict in found.items() if verdict.present] == [item]


def test_a_text_without_a_mark_is_neither() -> None:
    rater = LexicalRater(RUBRIC)
    text = "The trie stores a key in as many steps as it has letters."
    assert not any(rater.rate(each, message(1, text)).present for each in RUBRIC)


async def test_two_raters_and_their_agreement() -> None:
    texts = ["Bring it on", "Well done", "A trie is a tree", "I am the champion"]
    judge = KeywordJudge({RUBRIC[0].question: ["bring", "champion"], RUBRIC[1].question: ["well done"]})
    verdicts = await rate_messages([message(n, text) for n, text in enumerate(texts)], judge)
    competitive, acknowledging = agreement(verdicts, "lexical", "keyword")
    assert (competitive.messages, competitive.observed) == (4, 0.75)
    # Observed 3/4, expected 1/4 * 1/2 + 3/4 * 1/2 = 1/2.
    assert competitive.kappa == pytest.approx(0.5)
    assert (competitive.first_rate, competitive.second_rate) == (0.25, 0.5)
    assert acknowledging.kappa == 1.0
