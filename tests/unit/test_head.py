"""The linear head: its optimum, its calibration, its refusals."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from ash.heads.head import Head, Training, fit_head, fit_temperature, grouped, softmax, stratified_folds
from ash.heads.optimise import minimise

Matrix = NDArray[np.float64]


def clusters(
    seed: int = 1, counts: tuple[int, ...] = (60, 40, 25), spread: float = 0.35
) -> tuple[Matrix, list[str]]:
    """Overlapping groups of unit vectors in 12 dimensions."""
    generator = np.random.default_rng(seed)
    centres = np.eye(12)[: len(counts)]
    rows = np.concatenate(
        [centre + spread * generator.normal(size=(n, 12)) for centre, n in zip(centres, counts, strict=True)]
    )
    labels = [f"label {k}" for k, n in enumerate(counts) for _ in range(n)]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("strength", [0.5, 20.0])
def test_the_optimum_is_that_of_scikit_learn(balanced: bool, strength: float) -> None:
    rows, labels = clusters()
    reference = LogisticRegression(
        C=strength, class_weight="balanced" if balanced else None, tol=1e-8, max_iter=10_000
    ).fit(rows, labels)

    head = fit_head(rows, labels, Training(inverse_regularisation=strength, balanced=balanced))

    assert head.labels == tuple(reference.classes_)
    np.testing.assert_allclose(head.weights.T, reference.coef_, atol=2e-3 * np.abs(reference.coef_).max())
    uncalibrated = softmax(rows @ head.weights + head.bias)
    np.testing.assert_allclose(uncalibrated, reference.predict_proba(rows), atol=2e-3)


def test_probabilities_are_those_of_the_labels() -> None:
    rows, labels = clusters(spread=0.05)
    head = fit_head(rows, labels)

    found = head.probabilities(rows[0])

    assert set(found) == set(labels)
    assert sum(found.values()) == pytest.approx(1)
    assert max(found, key=found.__getitem__) == labels[0]
    predicted = head.predict(rows)
    assert predicted.shape == (len(rows), 3)
    assert [head.labels[k] for k in predicted.argmax(axis=1)] == labels


def test_a_head_is_the_same_for_the_same_examples() -> None:
    rows, labels = clusters()
    first, second = fit_head(rows, labels), fit_head(rows, labels)
    np.testing.assert_array_equal(first.weights, second.weights)
    assert first.temperature == second.temperature


def test_calibration_undoes_overconfidence() -> None:
    generator = np.random.default_rng(3)
    logits = generator.normal(size=(4000, 3))
    probabilities = softmax(logits)
    targets = np.array([generator.choice(3, p=p) for p in probabilities])

    # Logits that are too large by a factor are found out; the sampling error is below a tenth.
    assert fit_temperature(4 * logits, targets, np.ones(4000)) == pytest.approx(4, rel=0.1)
    assert fit_temperature(logits / 5, targets, np.ones(4000)) == pytest.approx(0.2, rel=0.1)


def test_labels_at_random_are_given_no_confidence() -> None:
    generator = np.random.default_rng(4)
    rows = generator.normal(size=(300, 20))
    labels = [f"label {k}" for k in generator.integers(0, 3, 300)]

    head = fit_head(rows, labels, Training(inverse_regularisation=100.0))

    unseen = head.predict(generator.normal(size=(200, 20)))
    assert np.mean(unseen.max(axis=1)) < 0.45


def test_softmax_of_huge_logits_is_finite() -> None:
    result = softmax(np.array([[1e300, 0.0, -1e300], [-1e300, -1e300, -1e300]]))
    np.testing.assert_allclose(result, [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]])


def test_folds_spread_every_class_evenly() -> None:
    targets = np.repeat([0, 1], [50, 11])
    fold = stratified_folds(targets, 5, seed=0)
    assert np.bincount(fold[:50]).tolist() == [10] * 5
    assert sorted(np.bincount(fold[50:])) == [2, 2, 2, 2, 3]


def test_priors_are_shares_of_what_the_head_was_fitted_on() -> None:
    rows, labels = clusters(counts=(60, 30, 10))
    np.testing.assert_allclose(fit_head(rows, labels, Training(balanced=False)).prior, [0.6, 0.3, 0.1])
    np.testing.assert_allclose(fit_head(rows, labels).prior, [1 / 3] * 3)


def test_what_cannot_be_fitted_is_refused() -> None:
    rows, labels = clusters()
    with pytest.raises(ValueError, match=r"125, 12.*for 124 labels"):
        fit_head(rows, labels[:-1])
    with pytest.raises(ValueError, match="NaN"):
        fit_head(np.full_like(rows, np.nan), labels)
    with pytest.raises(ValueError, match="two labels or more"):
        fit_head(rows, ["same"] * len(rows))
    with pytest.raises(ValueError, match="at least 5 each"):
        fit_head(rows, ["rare"] * 4 + ["other"] * (len(rows) - 4))
    with pytest.raises(ValueError, match="must be positive"):
        Training(inverse_regularisation=0)
    with pytest.raises(ValueError, match="at least 2"):
        Training(folds=1)


def test_vectors_of_another_encoder_are_refused() -> None:
    rows, labels = clusters()
    with pytest.raises(ValueError, match="fitted on 12 features"):
        fit_head(rows, labels).predict(np.zeros(13))


def test_groups_are_summed() -> None:
    groups = {"cat": "animal", "dog": "animal", "oak": "plant"}
    assert grouped({"cat": 0.2, "dog": 0.3, "oak": 0.5}, groups) == {"animal": 0.5, "plant": 0.5}
    with pytest.raises(KeyError):
        grouped({"stone": 1.0}, groups)


def rosenbrock(x: Matrix) -> tuple[float, Matrix]:
    a, b = 1 - x[:-1], x[1:] - x[:-1] ** 2
    gradient = np.zeros_like(x)
    gradient[:-1] = -2 * a - 400 * b * x[:-1]
    gradient[1:] += 200 * b
    return float(np.sum(a**2 + 100 * b**2)), gradient


def test_the_optimiser_follows_a_curved_valley() -> None:
    found = minimise(rosenbrock, np.full(8, -1.2), tolerance=1e-8)
    assert found.converged
    np.testing.assert_allclose(found.x, np.ones(8), atol=1e-6)


def test_the_optimiser_stops_where_it_is_told_to() -> None:
    assert minimise(rosenbrock, np.full(8, -1.2), max_iterations=3).iterations == 3
    assert not minimise(rosenbrock, np.full(8, -1.2), max_iterations=3).converged
    assert minimise(rosenbrock, np.ones(8)).iterations == 0


def test_the_optimiser_stops_where_rounding_hides_the_way() -> None:
    def flat(x: Matrix) -> tuple[float, Matrix]:
        return 1e20, np.ones_like(x)

    found = minimise(flat, np.zeros(2), tolerance=1e-30, max_iterations=5)
    assert not found.converged


def test_a_head_knows_its_width() -> None:
    head = Head(("a", "b"), np.zeros((4, 2)), np.zeros(2), 1.0, np.full(2, 0.5))
    assert head.features == 4


def test_rows_that_are_held_out_calibrate_alone() -> None:
    rows, labels = clusters()
    # As if an encoder had been tuned on them: the rows that are not held out are perfectly apart.
    easy = np.eye(12)[[int(label[-1]) for label in labels]]
    held_out = [number % 3 == 0 for number in range(len(labels))]
    seen = np.where(np.asarray(held_out)[:, None], rows, easy)

    naive = fit_head(seen, labels)
    honest = fit_head(seen, labels, held_out=held_out)

    np.testing.assert_array_equal(naive.weights, honest.weights)
    assert honest.temperature > naive.temperature


def test_every_label_is_on_both_sides() -> None:
    rows, labels = clusters()
    for held_out in ([label == "label 1" for label in labels], [False] * len(labels)):
        with pytest.raises(ValueError, match="hold out some rows of each"):
            fit_head(rows, labels, held_out=held_out)
