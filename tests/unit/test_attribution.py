"""What set off a shift."""

from __future__ import annotations

import pytest

from ash.modes.attribution import FEWEST_WORDS, Attribution, InputEvidence, attribute, pull, window

NEUTRAL = {"analytic": 0.1, "creative": 0.05, "conversational": 0.2}
SONG = {"analytic": 0.0, "creative": 0.9, "conversational": 0.1}


def user(seq: int, towards: dict[str, float] | None) -> InputEvidence:
    return InputEvidence(seq, "user", towards)


def test_an_input_that_pulls_there_is_the_trigger() -> None:
    inputs = [user(3, NEUTRAL), user(5, SONG), user(7, SONG)]
    assert attribute("creative", inputs, complete=True) == Attribution("external", (5, 7))
    assert attribute("creative", inputs, complete=False).trigger == "external"


def test_without_one_the_shift_is_self_directed() -> None:
    assert attribute("creative", [user(3, NEUTRAL)], complete=True) == Attribution("self_directed", ())
    assert attribute("creative", [], complete=True).trigger == "self_directed"
    assert attribute("analytic", [user(3, SONG)], complete=True).trigger == "self_directed"


def test_what_nobody_saw_leaves_it_open() -> None:
    assert attribute("creative", [user(3, None)], complete=True).trigger == "undetermined"
    assert attribute("creative", [user(3, NEUTRAL)], complete=False).trigger == "undetermined"
    assert attribute("creative", [user(3, None), user(4, SONG)], complete=False).evidence == (4,)


def test_the_threshold_is_met_by_equality() -> None:
    inputs = [user(3, {**NEUTRAL, "creative": 0.7})]
    assert attribute("creative", inputs, complete=True, threshold=0.7).trigger == "external"
    assert attribute("creative", inputs, complete=True, threshold=0.71).trigger == "self_directed"


@pytest.mark.parametrize(
    ("reach", "seqs"), [(1, [35]), (2, [25, 35]), (4, [5, 15, 25, 35]), (9, [5, 15, 25, 35])]
)
def test_the_window_reaches_back_over_answers(reach: int, seqs: list[int]) -> None:
    inputs = [user(seq, NEUTRAL) for seq in (5, 15, 25, 35, 45)]
    answers = [10, 20, 30, 40, 50]
    assert [item.seq for item in window(inputs, answers, 40, reach)] == seqs


def test_an_input_pulls_by_asking_or_by_being_of_the_kind() -> None:
    asked = {"analytic": 0.9, "creative": 0.0, "conversational": 0.1}
    resembles = {"analytic": 0.0, "creative": 0.3, "conversational": 0.7}
    # A line of chat is conversational in form whatever it wants, so that only asking counts there.
    assert pull(asked, resembles, "word " * FEWEST_WORDS) == {**asked, "creative": 0.3}
    # A few words are of no kind.
    assert pull(asked, resembles, "word " * (FEWEST_WORDS - 1)) == asked
