"""How good routing decisions are: metrics over labelled prompts. Pure; nothing is encoded or fitted here.

Two questions are judged, and every figure says of which it is. *Tier*: nano or turbo, the decision that costs
memory and time. *Intent*: which of INTENTS, from which the tier follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike, NDArray

from ash.domain.errors import ConfigError
from ash.heads.document import nearest
from ash.routing.anchors import INTENT_TIERS, INTENTS, Tier
from ash.routing.policy import likelier_tier, likeliest_intent, tier_probabilities

Vector = NDArray[np.float64]

ECE_BINS = 15
"""Equal-width bins of confidence, as in Guo et al., On Calibration of Modern Neural Networks (2017)."""

RISK_COVERAGE_POINTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)

NO_SOURCE = "(none)"
"""The source of rows that name none."""


class LabelledPrompt(Struct, frozen=True):
    """One row of evaluation data: a prompt, and what it needs. `line` counts from 1."""

    text: str
    tier: Tier
    intent: str
    source: str
    line: int


class _Row(Struct, frozen=True):
    text: str
    tier: Tier
    intent: str
    source: str = NO_SOURCE


class Scores(Struct, frozen=True):
    """Figures of one set of prompts.

    Attributes:
        rows: prompts.
        tier_accuracy: share of prompts whose likelier tier is theirs.
        tier_macro_f1: mean F1 of the two tiers.
        intent_accuracy: share of prompts whose predicted intent is theirs.
        intent_macro_f1: mean F1 over the intents that occur, as labels or as predictions.
        brier: of the tier: mean squared error of the probability of turbo, in [0, 1].
        ece: of the tier: expected calibration error over ECE_BINS bins of the likelier tier's probability.
        log_loss: of the tier: mean negative log-likelihood, nats.
        intent_brier: squared error summed over the intents, in [0, 2].
        intent_ece: expected calibration error of the likeliest intent's probability.
    """

    rows: int
    tier_accuracy: float
    tier_macro_f1: float
    intent_accuracy: float
    intent_macro_f1: float
    brier: float
    ece: float
    log_loss: float
    intent_brier: float
    intent_ece: float


class RiskCoverage(Struct, frozen=True):
    """What would be gained by deciding only where the tier is sure.

    Attributes:
        points: (coverage, risk) where coverage is the share of prompts that are decided, surest first,
            and risk the share of wrong tiers among them.
        area: mean risk over all coverages 1/n, 2/n, ..., 1 (Geifman & El-Yaniv, Selective Classification for
            Deep Neural Networks, 2017); lower is better.
    """

    points: tuple[tuple[float, float], ...]
    area: float


class Report(Struct, frozen=True):
    """Everything `evaluate` finds. `confusion[actual][predicted]` counts prompts; zeros are left out."""

    scores: Scores
    per_intent_f1: dict[str, float]
    per_source: dict[str, Scores]
    risk_coverage: RiskCoverage
    confusion: dict[str, dict[str, int]]

    @property
    def mean_over_sources(self) -> dict[str, float]:
        """Tier and intent accuracy with every source counting the same: nearer to unseen data."""
        found = list(self.per_source.values())
        return {
            "tier_accuracy": float(np.mean([scores.tier_accuracy for scores in found])),
            "intent_accuracy": float(np.mean([scores.intent_accuracy for scores in found])),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values; the figures of all rows stand at the top."""
        return {
            **msgspec.to_builtins(self.scores),
            "mean_over_sources": self.mean_over_sources,
            "per_intent_f1": self.per_intent_f1,
            "per_source": {
                name: msgspec.to_builtins(scores) for name, scores in sorted(self.per_source.items())
            },
            "risk_coverage": {
                "points": [list(point) for point in self.risk_coverage.points],
                "area": self.risk_coverage.area,
            },
            "confusion": self.confusion,
        }


def parse_prompts(lines: Iterable[str], source: str) -> list[LabelledPrompt]:
    """The prompts of a JSON Lines file: fields `text`, `tier`, `intent`, and `source` if there is one.

    Other fields are ignored and so are blank lines. `tier` is taken as it stands, even beside an intent of
    the other tier: data may know better than the table.

    Args:
        lines: of the file.
        source: its name in errors.

    Raises:
        ConfigError: a row is malformed, or there is none; names file and line.
    """
    decoder = msgspec.json.Decoder(_Row)
    prompts: list[LabelledPrompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeEncodeError) as error:
            wanted = 'want {"text": "...", "tier": "nano" or "turbo", "intent": "..."}'
            raise ConfigError(f"{source}:{number}: {error}; {wanted}") from error
        if row.intent not in INTENT_TIERS:
            message = f"unknown intent {row.intent!r}{nearest(row.intent, INTENTS)}"
            raise ConfigError(f"{source}:{number}: {message}")
        prompts.append(LabelledPrompt(row.text, row.tier, row.intent, row.source, number))
    if not prompts:
        raise ConfigError(f"{source}:1: holds no prompts; give one JSON object a line")
    return prompts


def evaluate(prompts: Sequence[LabelledPrompt], probabilities: Sequence[Mapping[str, float]]) -> Report:
    """Judge one distribution over INTENTS for each prompt, in the same order.

    Tier and intent are read off it as the policy does: the likelier tier, and its likeliest intent.

    Raises:
        ValueError: not one distribution for each prompt, or there are none.
    """
    if not prompts or len(prompts) != len(probabilities):
        raise ValueError(f"{len(probabilities)} distributions for {len(prompts)} prompts; want one for each")
    rows = _Judged.of(prompts, probabilities)
    sources = np.asarray([prompt.source for prompt in prompts])
    return Report(
        scores=rows.scores(),
        per_intent_f1=f1_by_label(rows.intents, rows.predicted_intents),
        per_source={str(name): rows.where(sources == name).scores() for name in np.unique(sources)},
        risk_coverage=risk_coverage(rows.tier_confidence, rows.tier_right),
        confusion=confusion(rows.intents, rows.predicted_intents),
    )


class _Judged(Struct, frozen=True):
    """Labels and predictions as columns, one entry a prompt."""

    tiers: NDArray[np.str_]
    intents: NDArray[np.str_]
    predicted_tiers: NDArray[np.str_]
    predicted_intents: NDArray[np.str_]
    turbo: Vector
    distributions: Vector

    @classmethod
    def of(cls, prompts: Sequence[LabelledPrompt], probabilities: Sequence[Mapping[str, float]]) -> _Judged:
        return cls(
            tiers=np.asarray([prompt.tier for prompt in prompts]),
            intents=np.asarray([prompt.intent for prompt in prompts]),
            predicted_tiers=np.asarray([likelier_tier(found) for found in probabilities]),
            predicted_intents=np.asarray([likeliest_intent(found) for found in probabilities]),
            turbo=np.asarray([tier_probabilities(found)["turbo"] for found in probabilities]),
            distributions=np.asarray([[found[intent] for intent in INTENTS] for found in probabilities]),
        )

    def where(self, chosen: NDArray[np.bool_]) -> _Judged:
        return _Judged(*(column[chosen] for column in msgspec.structs.astuple(self)))

    @property
    def tier_right(self) -> NDArray[np.bool_]:
        return np.equal(self.tiers, self.predicted_tiers)

    @property
    def tier_confidence(self) -> Vector:
        return np.maximum(self.turbo, 1 - self.turbo)

    def scores(self) -> Scores:
        is_turbo = (self.tiers == "turbo").astype(np.float64)
        intent_right = self.intents == self.predicted_intents
        column = {intent: number for number, intent in enumerate(INTENTS)}
        own = np.arange(len(self.intents))
        target = np.zeros_like(self.distributions)
        target[own, [column[intent] for intent in self.intents]] = 1.0
        confidence = self.distributions[own, [column[intent] for intent in self.predicted_intents]]
        own_tier = np.where(is_turbo > 0, self.turbo, 1 - self.turbo)
        return Scores(
            rows=len(self.intents),
            tier_accuracy=float(np.mean(self.tier_right)),
            tier_macro_f1=macro_f1(self.tiers, self.predicted_tiers),
            intent_accuracy=float(np.mean(intent_right)),
            intent_macro_f1=macro_f1(self.intents, self.predicted_intents),
            brier=float(np.mean((self.turbo - is_turbo) ** 2)),
            ece=expected_calibration_error(self.tier_confidence, self.tier_right),
            # A probability of 0 would be an infinite loss; the smallest positive float is a finite one.
            log_loss=float(-np.mean(np.log(np.maximum(own_tier, np.finfo(np.float64).tiny)))),
            intent_brier=float(np.mean(np.sum((self.distributions - target) ** 2, axis=1))),
            intent_ece=expected_calibration_error(confidence, intent_right),
        )


def f1_by_label(actual: ArrayLike, predicted: ArrayLike) -> dict[str, float]:
    """F1 of every label that occurs in either; 0 for one that is never right."""
    actual, predicted = np.asarray(actual), np.asarray(predicted)
    found: dict[str, float] = {}
    for label in np.union1d(actual, predicted):
        right = int(np.sum((actual == label) & (predicted == label)))
        found[str(label)] = 2 * right / int(np.sum(actual == label) + np.sum(predicted == label))
    return found


def macro_f1(actual: ArrayLike, predicted: ArrayLike) -> float:
    """Mean of `f1_by_label`."""
    return float(np.mean(list(f1_by_label(actual, predicted).values())))


def expected_calibration_error(confidence: ArrayLike, right: ArrayLike, bins: int = ECE_BINS) -> float:
    """Mean over equal-width bins of |accuracy - confidence|, weighted by the predictions in each."""
    confidence, hits = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    # The last bin includes 1, the others exclude their upper edge.
    number = np.minimum((confidence * bins).astype(np.intp), bins - 1)
    gaps = np.bincount(number, hits - confidence, minlength=bins)
    return float(np.sum(np.abs(gaps)) / len(confidence))


def risk_coverage(confidence: ArrayLike, right: ArrayLike) -> RiskCoverage:
    """The risk-coverage curve of decisions with this `confidence`; ties keep the order of the data."""
    order = np.argsort(-np.asarray(confidence, dtype=np.float64), kind="stable")
    wrong = 1.0 - np.asarray(right, dtype=np.float64)[order]
    risks = np.cumsum(wrong) / np.arange(1, len(wrong) + 1)
    counts = [max(1, round(share * len(wrong))) for share in RISK_COVERAGE_POINTS]
    points = tuple(dict.fromkeys((count / len(wrong), float(risks[count - 1])) for count in counts))
    return RiskCoverage(points, float(np.mean(risks)))


def confusion(actual: ArrayLike, predicted: ArrayLike) -> dict[str, dict[str, int]]:
    """Counts by actual and predicted label; pairs that do not occur are left out."""
    counts: dict[str, dict[str, int]] = {}
    for one, other in zip(np.asarray(actual).tolist(), np.asarray(predicted).tolist(), strict=True):
        row = counts.setdefault(one, {})
        row[other] = row.get(other, 0) + 1
    return counts
