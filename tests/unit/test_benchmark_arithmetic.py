"""The arithmetic behind the benchmarks' figures."""

from __future__ import annotations

import math

import pytest

from benchmarks.harness.conversation import Answer, Piece
from benchmarks.harness.rounds import measure
from benchmarks.harness.stats import histogram_quantile, median, paired_ratios, percentile
from benchmarks.harness.table import markdown, number


def answer(asked_at: float, *times: float, tokens: int | None = None) -> Answer:
    pieces = tuple(Piece(at, 4) for at in times)
    return Answer(asked_at, pieces, "word" * len(times), len(times) if tokens is None else tokens)


def test_the_window_runs_from_the_first_token_of_any_answer_to_the_last_of_any() -> None:
    answers = [answer(0.0, 1.0, 2.0, 3.0), answer(0.0, 2.0, 3.0, 5.0)]
    result = measure(answers, repetition=0, system="any", number=1, foreign_cpu=0.0)
    assert result.window_tokens_per_s == pytest.approx(6 / 4)
    assert result.wall_tokens_per_s == pytest.approx(6 / 5)
    assert result.first_token_s == [1.0, 2.0]
    assert result.gaps_s == [1.0, 1.0, 1.0, 2.0]


def test_the_steady_part_begins_when_all_decode_and_ends_when_the_first_is_done() -> None:
    answers = [answer(0.0, 1.0, 2.0, 3.0), answer(0.0, 2.0, 3.0, 5.0)]
    result = measure(answers, repetition=0, system="any", number=1, foreign_cpu=0.0)
    assert (result.steady_s, result.steady_tokens) == pytest.approx((1.0, 2.0))


def test_answers_one_after_the_other_have_no_steady_part() -> None:
    answers = [answer(0.0, 1.0, 2.0), answer(0.0, 3.0, 4.0)]
    result = measure(answers, repetition=0, system="any", number=1, foreign_cpu=0.0)
    assert result.steady_tokens_per_s is None
    assert result.steady_tokens == 0


def test_a_piece_of_several_tokens_counts_by_its_characters() -> None:
    assert answer(0.0, 1.0, 2.0, tokens=6).tokens_between(1.0, 2.0) == pytest.approx(3.0)


def test_a_round_with_a_failed_answer_has_its_reason_and_no_figures() -> None:
    failed = Answer(0.0, (), "", 0, failure="HTTP 500")
    result = measure([answer(0.0, 1.0), failed], repetition=0, system="any", number=1, foreign_cpu=0.1)
    assert result.failures == ["HTTP 500"]
    assert result.window_tokens_per_s is None


def test_ratios_are_taken_only_of_what_both_sides_have() -> None:
    assert paired_ratios({0: 2.0, 1: 9.0, 2: 3.0}, {0: 4.0, 2: 1.0}) == [0.5, 3.0]


def test_nothing_measured_has_no_median_and_no_percentile() -> None:
    assert median([]) is None
    assert percentile([], 95) is None
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0


def test_a_quantile_of_a_histogram_interpolates_within_its_bucket() -> None:
    counts = {0.1: 50.0, 0.2: 100.0, math.inf: 100.0}
    assert histogram_quantile(0.75, counts) == pytest.approx(0.15)
    assert histogram_quantile(0.25, counts) == pytest.approx(0.05)


def test_a_quantile_beyond_the_last_bound_is_that_bound() -> None:
    assert histogram_quantile(0.99, {0.1: 0.0, math.inf: 10.0}) == 0.1
    assert histogram_quantile(0.5, {0.1: 0.0, math.inf: 0.0}) is None


def test_a_table_aligns_its_columns() -> None:
    assert markdown(["a", "bb"], [["x", "1"]]) == "| a | bb |\n|---|----|\n| x |  1 |"
    assert (number(None), number(0.5, 1, 1000)) == ("-", "500.0")
