"""Intervals that claim no more than the sessions bear, and agreement of raters."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash.study.statistics import UNKNOWN, Interval, cohen_kappa, difference, mean, poisson_bounds, rate, share


def test_no_event_gives_the_exact_upper_bound_and_not_certainty() -> None:
    found = rate([0, 0, 0], [10, 10, 10], seed=1)
    assert (found.estimate, found.low, found.method) == (0.0, 0.0, "widened")
    assert found.high == pytest.approx(3.689 / 30, rel=1e-3)


def test_sessions_that_agree_by_chance_are_not_certain_either() -> None:
    found = rate([1, 1], [7, 7], seed=1)
    assert found.low < found.estimate < found.high
    assert found.high == pytest.approx(poisson_bounds(2)[1] / 14)


def test_sessions_that_differ_more_than_chance_keep_the_bootstrap() -> None:
    found = rate([0, 0, 0, 40], [10, 10, 10, 10], seed=1)
    assert found.method == "bootstrap"
    assert (found.estimate, found.low) == (1.0, 0.0)
    assert found.high > 2


@pytest.mark.parametrize(
    ("count", "low", "high"), [(3, 0.619, 8.767), (10, 4.795, 18.390), (50, 37.11, 65.92)]
)
def test_poisson_bounds_are_near_the_exact_ones(count: int, low: float, high: float) -> None:
    found = poisson_bounds(count)
    assert found == (pytest.approx(low, rel=0.03), pytest.approx(high, rel=0.002))


def test_the_same_seed_gives_the_same_interval_and_another_one_another() -> None:
    counts, hours = [0, 3, 9, 1], [1.0, 1.0, 2.0, 1.0]
    assert rate(counts, hours, seed=1) == rate(counts, hours, seed=1)
    values = [0.11, 0.23, 0.37, 0.41, 0.59, 0.67, 0.83]
    assert mean(values, seed=1) != mean(values, seed=2)


def test_without_exposure_nothing_is_known() -> None:
    assert rate([0], [0], seed=1).method == "none"
    assert mean([math.nan], seed=1).method == "none"
    assert share([], [], seed=1).method == "none"
    assert difference(UNKNOWN, Interval(1, 0, 2)).method == "none"


@pytest.mark.parametrize(("counts", "exposures"), [([1], [1, 2]), ([1], [-1])])
def test_a_rate_needs_an_exposure_for_each_count(counts: list[float], exposures: list[float]) -> None:
    with pytest.raises(ValueError, match="exposure"):
        rate(counts, exposures, seed=1)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20)), min_size=1, max_size=6))
def test_an_interval_holds_its_estimate_and_a_share_stays_within_1(pairs: list[tuple[int, int]]) -> None:
    counts, totals = [float(min(pair)) for pair in pairs], [float(total) for _, total in pairs]
    found = rate(counts, totals, seed=0, replicates=200)
    assert found.low <= found.estimate <= found.high
    part = share(counts, totals, seed=0, replicates=200)
    assert 0 <= part.low <= part.estimate + 1e-9
    assert part.estimate <= part.high + 1e-9
    assert part.high <= 1


def test_a_difference_from_nothing_is_as_uncertain_as_that_nothing() -> None:
    gap = difference(Interval(14.0, 14.0, 14.0), Interval(0.0, 0.0, 26.0, "widened"))
    assert (gap.estimate, gap.low, gap.high, gap.method) == (14.0, -12.0, 14.0, "widened")


def test_kappa_of_a_table_worked_by_hand() -> None:
    # Cohen 1960: observed 0.7, expected 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    first = [True] * 5 + [False] * 5
    second = [True] * 4 + [False] + [True] * 2 + [False] * 3
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(first, first) == 1.0
    assert cohen_kappa(first, [not each for each in first]) == -1.0


def test_kappa_is_undefined_without_variation_and_refuses_unequal_lists() -> None:
    assert math.isnan(cohen_kappa([], []))
    assert math.isnan(cohen_kappa([True, True], [True, True]))
    with pytest.raises(ValueError, match="2 labels"):
        cohen_kappa([1, 2], [1])


def test_a_difference_adds_the_squares_of_its_distances() -> None:
    gap = difference(Interval(10.0, 7.0, 14.0), Interval(4.0, 1.0, 8.0))
    assert gap == Interval(6.0, 1.0, 11.0, "bootstrap")
