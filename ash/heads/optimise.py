"""Minimise a smooth function with limited-memory BFGS, in numpy alone.

scipy would do the same at 60 MB of resident memory in a server that fits its heads once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Objective = Callable[[Vector], tuple[float, Vector]]
"""x of shape (n,) -> value and gradient of shape (n,)."""

# Sufficient decrease and curvature, as recommended for quasi-Newton steps by Nocedal & Wright,
# Numerical Optimization (2006), section 3.1.
_DECREASE = 1e-4
_CURVATURE = 0.9
_LINE_SEARCH_STEPS = 40


class Minimum(Struct, frozen=True):
    """Where the search ended. `converged` says that the gradient's largest entry is within the tolerance."""

    x: Vector
    value: float
    iterations: int
    converged: bool


def minimise(
    objective: Objective,
    start: Vector,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 500,
    memory: int = 10,
) -> Minimum:
    """The minimum of `objective` from `start`, by L-BFGS (Nocedal & Wright, algorithm 7.5).

    Args:
        objective: value and gradient at a point; must be bounded below and differentiable.
        start: first point, shape (n,).
        tolerance: stop when no entry of the gradient is larger than this.
        max_iterations: quasi-Newton steps, each of at least one evaluation.
        memory: pairs of steps and gradient changes kept as the model of the curvature.
    """
    x = start.astype(np.float64)
    value, gradient = objective(x)
    pairs: deque[tuple[Vector, Vector]] = deque(maxlen=memory)
    for iteration in range(max_iterations):
        if np.max(np.abs(gradient)) <= tolerance:
            return Minimum(x, value, iteration, converged=True)
        direction = -_inverse_hessian_times(gradient, pairs)
        # Without curvature to go by, the first step is kept to length 1.
        first_length = 1.0 if pairs else min(1.0, 1.0 / float(np.linalg.norm(gradient)))
        step = _weak_wolfe_step(objective, (x, value, gradient), direction, first_length)
        if step is None:
            # Rounding hides any further decrease: this point is the minimum as far as floats can tell.
            return Minimum(x, value, iteration, converged=False)
        new_x, value, new_gradient = step
        change, gradient_change = new_x - x, new_gradient - gradient
        if change @ gradient_change > 1e-12 * (gradient_change @ gradient_change):
            pairs.append((change, gradient_change))
        x, gradient = new_x, new_gradient
    return Minimum(x, value, max_iterations, converged=bool(np.max(np.abs(gradient)) <= tolerance))


def _inverse_hessian_times(gradient: Vector, pairs: deque[tuple[Vector, Vector]]) -> Vector:
    """The two-loop recursion (Nocedal & Wright, algorithm 7.4)."""
    result = gradient.copy()
    weights = []
    for change, gradient_change in reversed(pairs):
        weight = (change @ result) / (change @ gradient_change)
        result -= weight * gradient_change
        weights.append(weight)
    if pairs:
        change, gradient_change = pairs[-1]
        result *= (change @ gradient_change) / (gradient_change @ gradient_change)
    for (change, gradient_change), weight in zip(pairs, reversed(weights), strict=True):
        result += change * (weight - (gradient_change @ result) / (change @ gradient_change))
    return result


def _weak_wolfe_step(
    objective: Objective, start: tuple[Vector, float, Vector], direction: Vector, length: float
) -> tuple[Vector, float, Vector] | None:
    """A point along `direction` that meets the weak Wolfe conditions, found by bracketing and bisection.

    `start` and the result are a point, its value and its gradient; `length` is tried first.

    Source: Lewis & Overton, Nonsmooth optimization via quasi-Newton methods (2013), algorithm 2.6.
    None when rounding leaves no such point.
    """
    x, value, gradient = start
    slope = float(gradient @ direction)
    low, high = 0.0, np.inf
    for _ in range(_LINE_SEARCH_STEPS):
        candidate = x + length * direction
        new_value, new_gradient = objective(candidate)
        if new_value > value + _DECREASE * length * slope:
            high = length
        elif new_gradient @ direction < _CURVATURE * slope:
            low = length
        else:
            return candidate, new_value, new_gradient
        length = (low + high) / 2 if np.isfinite(high) else 2 * low
    return None
