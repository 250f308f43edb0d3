"""A calibrated multinomial logistic regression: fit, calibrate, predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike, NDArray

from ash.heads.optimise import minimise

Matrix = NDArray[np.float64]

# On entries of the gradient of the mean loss. One number is read off the folds, which needs less precision.
_TOLERANCE = 1e-5
_FOLD_TOLERANCE = 1e-4

# Inverse temperatures between which calibration searches.
_SHARPEST, _FLATTEST = 100.0, 0.01


class Training(Struct, frozen=True):
    """How a head is fitted; part of its identity in the cache.

    Attributes:
        inverse_regularisation: scikit-learn's `C`: weight of the data against 1/2 |W|^2.
        balanced: weigh every label the same, however many examples it has.
        folds: parts of the examples that are held out in turn to calibrate the temperature.
        seed: of the order in which examples are dealt to the folds.
    """

    inverse_regularisation: float = 10.0
    balanced: bool = True
    folds: int = 5
    seed: int = 20

    def __post_init__(self) -> None:
        if self.inverse_regularisation <= 0:
            raise ValueError(f"inverse_regularisation is {self.inverse_regularisation}; it must be positive")
        if self.folds < 2:
            raise ValueError(f"folds is {self.folds}; calibration needs at least 2")


class Head(Struct, frozen=True):
    """Logits are `features @ weights + bias`; probabilities are their softmax at `temperature`.

    Attributes:
        labels: names of the k classes, in the order of the columns.
        weights: shape (features, k).
        bias: shape (k,).
        temperature: divides the logits; above 1 where held-out examples showed overconfidence.
        prior: shape (k,): share of each label in what the head was fitted on, after balancing.
    """

    labels: tuple[str, ...]
    weights: Matrix
    bias: Matrix
    temperature: float
    prior: Matrix

    @property
    def features(self) -> int:
        """Length of a feature vector."""
        return int(self.weights.shape[0])

    def predict(self, features: ArrayLike) -> Matrix:
        """Calibrated probabilities, shape (..., k), of `features` of shape (..., features).

        Raises:
            ValueError: `features` has another length than the head was fitted on.
        """
        rows = np.asarray(features, dtype=np.float64)
        if rows.shape[-1:] != self.weights.shape[:1]:
            raise ValueError(
                f"the head was fitted on {self.features} features and got shape {rows.shape}; "
                "fit it again for this encoder"
            )
        return softmax((rows @ self.weights + self.bias) / self.temperature)

    def probabilities(self, features: ArrayLike) -> dict[str, float]:
        """The probabilities of one feature vector, by label."""
        return dict(zip(self.labels, map(float, self.predict(features)), strict=True))


def softmax(logits: Matrix) -> Matrix:
    """Probabilities over the last axis; logits of any finite size neither overflow nor divide by zero."""
    exponentials = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    return np.asarray(exponentials / np.sum(exponentials, axis=-1, keepdims=True))


def fit_head(
    features: ArrayLike,
    labels: Sequence[str],
    training: Training | None = None,
    *,
    held_out: Sequence[bool] | None = None,
) -> Head:
    """Fit on `features` of shape (n, features) and one label for each row.

    The temperature is the one that minimises the negative log-likelihood of logits that were computed
    out of fold (Guo et al., On Calibration of Modern Neural Networks, 2017, with cross-validation in place
    of a held-out set). Labels are ordered alphabetically.

    Args:
        features: one row an example.
        labels: of the rows.
        training: hyperparameters.
        held_out: True for the rows that alone calibrate, where the other rows are too easy, because the
            encoder was tuned on them; the final weights are fitted on all rows. None calibrates on folds.

    Raises:
        ValueError: rows and labels do not match in number, features are not finite, a label has fewer
            examples than there are folds, or one has none that is held out or none that is not.
    """
    training = training or Training()
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) != len(labels):
        raise ValueError(f"features have shape {rows.shape} for {len(labels)} labels; want one row for each")
    if not np.all(np.isfinite(rows)):
        raise ValueError("features hold infinite values or NaN; the encoder must give finite vectors")
    names, targets = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    counts = np.bincount(targets)
    if len(names) < 2 or counts.min() < training.folds:
        fewest = dict(zip(names.tolist(), counts.tolist(), strict=True))
        raise ValueError(
            f"examples by label are {fewest}; want two labels or more with at least {training.folds} each"
        )
    sample_weights = len(rows) / (len(names) * counts[targets]) if training.balanced else np.ones(len(rows))
    weights, bias = _fit_weights(rows, targets, sample_weights, training.inverse_regularisation)
    if held_out is None:
        fold = stratified_folds(targets, training.folds, training.seed)
        logits = _logits_out_of_fold(
            rows, targets, sample_weights, training, fold=fold, start=(weights, bias)
        )
        judged = np.ones(len(rows), dtype=bool)
    else:
        judged = np.asarray(held_out, dtype=bool)
        if any(len(np.unique(judged[targets == target])) < 2 for target in range(len(names))):
            raise ValueError("held_out leaves a label without a row on one side; hold out some rows of each")
        # From nothing: a start that has seen the rows held out would remember them.
        without, other_bias = _fit_weights(
            rows[~judged], targets[~judged], sample_weights[~judged], training.inverse_regularisation
        )
        logits = rows @ without + other_bias
    temperature = fit_temperature(logits[judged], targets[judged], sample_weights[judged])
    prior = np.full(len(names), 1 / len(names)) if training.balanced else counts / len(rows)
    return Head(tuple(names.tolist()), weights, bias, temperature, prior)


def _fit_weights(
    rows: Matrix,
    targets: NDArray[np.intp],
    sample_weights: Matrix,
    inverse_regularisation: float,
    *,
    start: tuple[Matrix, Matrix] | None = None,
    tolerance: float = _TOLERANCE,
) -> tuple[Matrix, Matrix]:
    """Minimise C * sum of weighted losses + 1/2 |W|^2 over W and an unpenalised bias.

    The objective is divided by C times the total weight, so that the optimiser's tolerance means the same
    for any number of examples.
    """
    count, width = rows.shape
    classes = int(targets.max()) + 1
    one_hot = np.zeros((count, classes))
    one_hot[np.arange(count), targets] = 1.0
    total = sample_weights.sum()
    shares = (sample_weights / total)[:, None]
    penalty = 1.0 / (inverse_regularisation * total)

    def objective(flat: Matrix) -> tuple[float, Matrix]:
        weights = flat[: width * classes].reshape(width, classes)
        logits = rows @ weights + flat[width * classes :]
        logits -= logits.max(axis=1, keepdims=True)
        log_sums = np.log(np.exp(logits).sum(axis=1, keepdims=True))
        log_probabilities = logits - log_sums
        loss = -float(np.sum(shares * one_hot * log_probabilities)) + penalty / 2 * float(np.sum(weights**2))
        error = shares * (np.exp(log_probabilities) - one_hot)
        gradient = np.concatenate([(rows.T @ error + penalty * weights).ravel(), error.sum(axis=0)])
        return loss, gradient

    first = np.zeros((width + 1) * classes) if start is None else np.concatenate([start[0].ravel(), start[1]])
    best = minimise(objective, first, tolerance=tolerance).x
    return best[: width * classes].reshape(width, classes), best[width * classes :]


def _logits_out_of_fold(
    rows: Matrix,
    targets: NDArray[np.intp],
    sample_weights: Matrix,
    training: Training,
    *,
    fold: NDArray[np.intp],
    start: tuple[Matrix, Matrix],
) -> Matrix:
    """Logits of every row from weights fitted on the other folds. `start` only shortens the search."""
    logits = np.empty((len(rows), int(targets.max()) + 1))
    for number in range(training.folds):
        held = fold == number
        weights, bias = _fit_weights(
            rows[~held],
            targets[~held],
            sample_weights[~held],
            training.inverse_regularisation,
            start=start,
            tolerance=_FOLD_TOLERANCE,
        )
        logits[held] = rows[held] @ weights + bias
    return logits


def stratified_folds(targets: NDArray[np.intp], folds: int, seed: int) -> NDArray[np.intp]:
    """A fold number for each row, every class spread evenly over the folds."""
    generator = np.random.default_rng(seed)
    fold = np.empty(len(targets), dtype=np.intp)
    for target in np.unique(targets):
        members = np.flatnonzero(targets == target)
        fold[generator.permutation(members)] = np.arange(len(members)) % folds
    return fold


def fit_temperature(logits: Matrix, targets: NDArray[np.intp], sample_weights: Matrix) -> float:
    """The temperature that minimises the weighted negative log-likelihood of `logits`, shape (n, k).

    The likelihood is convex in the inverse temperature b, so its derivative, the mean of
    E_p(b)[logit] - logit of the target, is bisected; the result lies in [0.01, 100].
    """
    target_logits = logits[np.arange(len(logits)), targets]

    def slope(inverse: float) -> float:
        expected = np.sum(softmax(inverse * logits) * logits, axis=1)
        return float(np.sum(sample_weights * (expected - target_logits)))

    low, high = _FLATTEST, _SHARPEST
    for _ in range(60):
        # Halving the ratio, not the difference: the scale of a temperature is logarithmic.
        middle = float(np.sqrt(low * high))
        if slope(middle) < 0:
            low = middle
        else:
            high = middle
    return float(1 / np.sqrt(low * high))


def grouped(probabilities: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
    """Sum the probabilities of labels that share a group.

    Raises:
        KeyError: a label belongs to no group.
    """
    sums: dict[str, float] = {}
    for label, probability in probabilities.items():
        sums[groups[label]] = sums.get(groups[label], 0.0) + probability
    return sums
