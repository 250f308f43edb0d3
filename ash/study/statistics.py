"""Rates and means with their uncertainty. Pure; seeds are arguments, so that a report can be made again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

REPLICATES = 10_000
LEVEL = 0.95


class Interval(Struct, frozen=True):
    """An estimate with its confidence interval; NaN where there is nothing to estimate from.

    `method`: `bootstrap`, or `exact` for the bound of a count of zero, which resampling cannot give.
    """

    estimate: float
    low: float
    high: float
    method: str = "bootstrap"


UNKNOWN = Interval(math.nan, math.nan, math.nan, "none")


def rate(
    counts: Sequence[float],
    exposures: Sequence[float],
    *,
    seed: int,
    replicates: int = REPLICATES,
    level: float = LEVEL,
) -> Interval:
    """Events per unit of exposure over several sessions.

    The percentile bootstrap (Efron and Tibshirani, An introduction to the bootstrap, 1993, chapter 13) with
    whole sessions as the unit that is drawn: events of one session depend on each other. With no event at
    all every sample has rate 0 and the bootstrap would claim certainty; then the upper bound is the exact one
    of a Poisson count, -ln(alpha / 2) / exposure (Garwood, Fiducial limits for the Poisson distribution,
    Biometrika 1936).

    Args:
        counts: events of each session.
        exposures: hours or messages of each session; not negative.
        seed: of the resampling.
        replicates: how many samples are drawn.
        level: of the interval.

    Raises:
        ValueError: not one exposure for each count, or one is negative.
    """
    if len(counts) != len(exposures) or any(exposure < 0 for exposure in exposures):
        raise ValueError("a rate needs one exposure, not negative, for each count")
    total = sum(exposures)
    if total <= 0:
        return UNKNOWN
    estimate = sum(counts) / total
    if sum(counts) == 0:
        return Interval(0.0, 0.0, -math.log((1 - level) / 2) / total, "exact")
    return _interval(estimate, _resampled_ratio(counts, exposures, seed, replicates), level)


def mean(
    values: Sequence[float], *, seed: int, replicates: int = REPLICATES, level: float = LEVEL
) -> Interval:
    """The mean over sessions with its percentile-bootstrap interval; NaN values do not count."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return UNKNOWN
    samples = _resampled_ratio(known, [1.0] * len(known), seed, replicates)
    return _interval(sum(known) / len(known), samples, level)


def rate_difference(
    treated: tuple[Sequence[float], Sequence[float]],
    control: tuple[Sequence[float], Sequence[float]],
    *,
    seed: int,
    replicates: int = REPLICATES,
    level: float = LEVEL,
) -> Interval:
    """The rate of `treated` minus that of `control`, each (counts, exposures) of its sessions.

    Sessions of the two groups are drawn independently. Where one of them has no event its own uncertainty is
    missing in the interval, which is then too narrow: look at the two rates.
    """
    if sum(treated[1]) <= 0 or sum(control[1]) <= 0:
        return UNKNOWN
    estimate = sum(treated[0]) / sum(treated[1]) - sum(control[0]) / sum(control[1])
    first = _resampled_ratio(*treated, seed, replicates)
    second = _resampled_ratio(*control, seed + 1, replicates)
    return _interval(estimate, first - second, level)


def _resampled_ratio(
    counts: Sequence[float], exposures: Sequence[float], seed: int, replicates: int
) -> NDArray[np.float64]:
    """Sum of counts over sum of exposures, in `replicates` samples of sessions drawn with replacement."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(counts), size=(replicates, len(counts)))
    numerators = np.asarray(counts, dtype=np.float64)[drawn].sum(axis=1)
    denominators = np.asarray(exposures, dtype=np.float64)[drawn].sum(axis=1)
    # A sample of sessions without any exposure says nothing of the rate.
    usable = denominators > 0
    ratios: NDArray[np.float64] = numerators[usable] / denominators[usable]
    return ratios


def _interval(estimate: float, samples: NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(low), float(high))


def cohen_kappa(first: Sequence[object], second: Sequence[object]) -> float:
    """Agreement of two raters beyond chance (Cohen, A coefficient of agreement for nominal scales, 1960).

    NaN where it is undefined: nothing was rated, or both raters gave one and the same label throughout.

    Raises:
        ValueError: the raters did not rate the same number of things.
    """
    if len(first) != len(second):
        raise ValueError(f"one rater gave {len(first)} labels, the other {len(second)}")
    total = len(first)
    if total == 0:
        return math.nan
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / total
    labels = set(first) | set(second)
    expected = sum(
        sum(a == label for a in first) * sum(b == label for b in second) / total**2 for label in labels
    )
    return math.nan if expected == 1 else (observed - expected) / (1 - expected)
