"""The arithmetic of results. Percentiles interpolate linearly between ranks, as numpy's default does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy as np


def median(values: Iterable[float]) -> float | None:
    """The median; None of nothing."""
    kept = list(values)
    return statistics.median(kept) if kept else None


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The percentile, 0 to 100; None of nothing."""
    kept = list(values)
    return float(np.percentile(kept, percent)) if kept else None


def histogram_quantile(quantile: float, counts: Mapping[float, float]) -> float | None:
    """A quantile (0 to 1) from a cumulative histogram, as Prometheus' `histogram_quantile` estimates it.

    Args:
        quantile: which one.
        counts: observations at or below each upper bound, the last bound infinite.

    Returns:
        None without observations. The largest finite bound when the quantile lies beyond it.
    """
    bounds = sorted(counts)
    total = counts[bounds[-1]] if bounds else 0.0
    if total == 0:
        return None
    rank = quantile * total
    lower, below = 0.0, 0.0
    for bound in bounds:
        if counts[bound] >= rank:
            if math.isinf(bound):
                return lower
            inside = counts[bound] - below
            return bound if inside == 0 else lower + (bound - lower) * (rank - below) / inside
        lower, below = bound, counts[bound]
    return lower


def paired_ratios(numerators: Mapping[int, float], denominators: Mapping[int, float]) -> Sequence[float]:
    """Ratios of what was measured side by side: only keys that both have, in their order."""
    return [
        numerators[key] / denominators[key] for key in sorted(numerators) if denominators.get(key, 0.0) > 0
    ]
