"""Rates and means with their uncertainty. Pure; seeds are arguments, so that a report can be made again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

REPLICATES = 10_000
LEVEL = 0.95


class Interval(Struct, frozen=True):
    """An estimate with its confidence interval; NaN where there is nothing to estimate from.

    `method`: `bootstrap`; `widened` where the sessions differ less than so few events can be trusted to.
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
    whole sessions as the unit that is drawn: events of one session depend on each other. Where all sessions
    agree, most of all on no event, it would claim certainty; so the interval is widened to that of a Poisson
    count (`poisson_bounds`) wherever that one reaches further.

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
    low, high = poisson_bounds(sum(counts), level)
    resampled = _interval(sum(counts) / total, _resampled_ratio(counts, exposures, seed, replicates), level)
    return _widened(resampled, low / total, high / total)


def share(
    counts: Sequence[float],
    totals: Sequence[float],
    *,
    seed: int,
    replicates: int = REPLICATES,
    level: float = LEVEL,
) -> Interval:
    """The share of `totals` that `counts` are, over several sessions; as `rate`, for what cannot exceed 1.

    Widened to the score interval (Wilson, Probable inference, the law of succession, and statistical
    inference, 1927).
    """
    total = sum(totals)
    if total <= 0:
        return UNKNOWN
    estimate, z = sum(counts) / total, NormalDist().inv_cdf((1 + level) / 2)
    middle = (estimate + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(estimate * (1 - estimate) / total + z**2 / (4 * total**2))
    resampled = _interval(estimate, _resampled_ratio(counts, totals, seed, replicates), level)
    return _widened(resampled, max(0.0, middle - half), min(1.0, middle + half))


def mean(
    values: Sequence[float], *, seed: int, replicates: int = REPLICATES, level: float = LEVEL
) -> Interval:
    """The mean over sessions with its percentile-bootstrap interval; NaN values do not count."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return UNKNOWN
    samples = _resampled_ratio(known, [1.0] * len(known), seed, replicates)
    return _interval(sum(known) / len(known), samples, level)


def difference(treated: Interval, control: Interval) -> Interval:
    """The difference of two independent rates, from their intervals; it keeps what was widened in either.

    The square-and-add limits of Zou and Donner, Construction of confidence limits about effect measures,
    Statistics in Medicine 2008.
    """
    if math.isnan(treated.estimate) or math.isnan(control.estimate):
        return UNKNOWN
    gap = treated.estimate - control.estimate
    below = math.hypot(treated.estimate - treated.low, control.high - control.estimate)
    above = math.hypot(treated.high - treated.estimate, control.estimate - control.low)
    widened = "widened" in {treated.method, control.method}
    return Interval(gap, gap - below, gap + above, "widened" if widened else "bootstrap")


def poisson_bounds(count: float, level: float = LEVEL) -> tuple[float, float]:
    """The limits of a Poisson mean of which `count` events were seen.

    Byar's approximation to the exact limits: the upper one within 0.2%, the lower one within 3% from 3 events
    on, and too low below that (Breslow and Day, Statistical
    methods in cancer research II, 1987, section 2.3); for none the exact ones, 0 and -ln(alpha / 2) (Garwood,
    Biometrika 1936).
    """
    if count == 0:
        return 0.0, -math.log((1 - level) / 2)
    z = NormalDist().inv_cdf((1 + level) / 2)
    low = count * (1 - 1 / (9 * count) - z / (3 * math.sqrt(count))) ** 3
    more = count + 1
    return max(0.0, low), more * (1 - 1 / (9 * more) + z / (3 * math.sqrt(more))) ** 3


def _widened(interval: Interval, low: float, high: float) -> Interval:
    if interval.low <= low and high <= interval.high:
        return interval
    return Interval(interval.estimate, min(low, interval.low), max(high, interval.high), "widened")


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
