"""The measuring stick: metrics against values worked out by hand, rows that are refused, baselines."""

from __future__ import annotations

import json
import math

import pytest

from ash.domain.errors import ConfigError
from ash.routing.anchors import INTENT_TIERS, INTENTS, Anchors, load_anchors
from ash.routing.baselines import length_baseline, majority_baseline
from ash.routing.evaluation import (
    NO_SOURCE,
    LabelledPrompt,
    confusion,
    evaluate,
    expected_calibration_error,
    f1_by_label,
    macro_f1,
    parse_prompts,
    risk_coverage,
)


def row(**fields: object) -> str:
    return json.dumps({"text": "add 2 and 2", "tier": "turbo", "intent": "math", **fields})


def prompt(intent: str, source: str = "a", text: str = "text") -> LabelledPrompt:
    return LabelledPrompt(text, INTENT_TIERS[intent], intent, source, 1)


def opinion(**likely: float) -> dict[str, float]:
    rest = (1 - sum(likely.values())) / (len(INTENTS) - len(likely))
    return {intent: likely.get(intent, rest) for intent in INTENTS}


def test_rows_are_read_with_their_line_and_other_fields_ignored() -> None:
    lines = [row(), "", row(source="there", licence="MIT"), row(tier="nano")]

    first, second, third = parse_prompts(lines, "data.jsonl")

    assert first == LabelledPrompt("add 2 and 2", "turbo", "math", NO_SOURCE, 1)
    assert (second.source, second.line) == ("there", 3)
    assert (third.tier, third.intent) == ("nano", "math")


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], r"data.jsonl:1: holds no prompts"),
        (["  "], r"data.jsonl:1: holds no prompts"),
        ([row(), "{"], r"data.jsonl:2: .*; want \{"),
        (["[]"], r"data.jsonl:1: Expected `object`"),
        ([row(text=3)], r"data.jsonl:1: .*\$.text"),
        ([row(tier="large")], r"data.jsonl:1: Invalid enum value 'large' - at `\$.tier`"),
        ([row(intent="maths")], r"data.jsonl:1: unknown intent 'maths'; did you mean 'math'"),
        (['{"text": "a", "tier": "nano"}'], r"data.jsonl:1: .*missing required field `intent`"),
        (["\ud800"], r"data.jsonl:1: .*surrogates"),
    ],
)
def test_a_malformed_row_is_named_with_file_and_line(lines: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_prompts(lines, "data.jsonl")


def test_f1_counts_labels_that_are_only_predicted() -> None:
    actual, predicted = ["x", "x", "x", "y"], ["x", "x", "y", "z"]
    # x: precision 1, recall 2/3. y: one predicted and one actual, never the same. z: predicted only.
    assert f1_by_label(actual, predicted) == pytest.approx({"x": 0.8, "y": 0.0, "z": 0.0})
    assert macro_f1(actual, predicted) == pytest.approx(0.8 / 3)
    assert confusion(actual, predicted) == {"x": {"x": 2, "y": 1}, "y": {"z": 1}}


def test_calibration_error_weighs_the_gap_of_every_bin() -> None:
    # Two bins: [0, 0.5) holds 0.4 right; [0.5, 1] holds 0.6 wrong, 0.8 right and 1.0 right.
    found = expected_calibration_error([0.4, 0.6, 0.8, 1.0], [True, False, True, True], bins=2)
    assert found == pytest.approx(1 / 4 * abs(1 - 0.4) + 3 / 4 * abs(2 / 3 - 0.8))


def test_risk_falls_with_coverage_where_confidence_is_worth_something() -> None:
    curve = risk_coverage([0.9, 0.6, 0.8, 0.7], [True, False, True, False])
    # Surest first: right, right, wrong, wrong.
    assert curve.area == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)
    assert curve.points == ((0.25, 0.0), (0.5, 0.0), (0.75, pytest.approx(1 / 3)), (1.0, 0.5))


def test_a_report_by_hand() -> None:
    prompts = [prompt("math"), prompt("coding"), prompt("smalltalk", "b"), prompt("quick_help", "b")]
    found = [
        opinion(math=1.0),
        opinion(math=0.6, coding=0.4),
        opinion(smalltalk=0.7, math=0.2, coding=0.1),
        opinion(math=0.3, coding=0.3, quick_help=0.4),
    ]

    report = evaluate(prompts, found)

    scores = report.scores
    assert (scores.rows, scores.tier_accuracy, scores.intent_accuracy) == (4, 0.75, 0.5)
    # The tier of the last is turbo by 0.6; its intent is the likeliest of turbo's, not quick_help.
    assert report.confusion["quick_help"] in ({"math": 1}, {"coding": 1})
    # The probability of turbo is 1, 1, 0.3, 0.6 for turbo, turbo, nano, nano.
    assert scores.brier == pytest.approx((0.3**2 + 0.6**2) / 4)
    assert scores.log_loss == pytest.approx(-(math.log(0.7) + math.log(0.4)) / 4)
    # Confidence 1, 1, 0.7, 0.6, the first three right; 15 bins keep 0.6 and 0.7 apart.
    assert scores.ece == pytest.approx((0 + 0 + 0.3 + 0.6) / 4)
    squares = 0 + (0.6**2 + 0.6**2) + (0.3**2 + 0.2**2 + 0.1**2) + (0.3**2 + 0.3**2 + 0.6**2)
    assert scores.intent_brier == pytest.approx(squares / 4)
    assert {name: part.tier_accuracy for name, part in report.per_source.items()} == {"a": 1.0, "b": 0.5}
    assert report.mean_over_sources == {"tier_accuracy": 0.75, "intent_accuracy": 0.5}


def test_json_holds_the_promised_keys() -> None:
    report = evaluate([prompt("math")], [opinion(math=0.9)]).to_json()

    promised = [
        "tier_accuracy",
        "intent_macro_f1",
        "brier",
        "ece",
        "per_source",
        "risk_coverage",
        "confusion",
    ]
    assert set(promised) <= set(report)
    assert json.loads(json.dumps(report)) == report


def test_certainty_that_is_wrong_costs_a_finite_loss() -> None:
    report = evaluate([prompt("math")], [opinion(smalltalk=1.0)])
    assert math.isfinite(report.scores.log_loss)
    assert report.scores.brier == 1.0


def test_there_is_an_opinion_for_each_prompt() -> None:
    for prompts, found in (([], []), ([prompt("math")], [])):
        with pytest.raises(ValueError, match="want one for each"):
            evaluate(prompts, found)


def test_baselines_ignore_what_they_say_they_ignore() -> None:
    anchors = load_anchors()
    prompts = [prompt("smalltalk", text="hi"), prompt("smalltalk"), prompt("coding", text="long " * 200)]

    majority = majority_baseline(prompts)
    assert (majority.tier_accuracy, majority.intent_accuracy) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert length_baseline(anchors, prompts).tier_accuracy == 1.0
    reversed_lengths = [prompt("coding", text="c"), prompt("smalltalk", text="long " * 200)]
    assert length_baseline(anchors, reversed_lengths).tier_accuracy == 0.0


def test_majority_survives_tiers_that_contradict_intents() -> None:
    prompts = [LabelledPrompt("add", "nano", "math", "a", 1)]
    assert majority_baseline(prompts).tier_accuracy == 1.0


def test_length_is_fitted_on_the_anchors() -> None:
    whole = load_anchors()
    swapped = Anchors(
        tuple(
            type(part)(part.intent, part.tier, part.description, other.sentences, part.source)
            for part, other in zip(whole.intents, reversed(whole.intents), strict=True)
        )
    )
    prompts = [prompt("coding", text="medium words here " * 5)]
    assert length_baseline(whole, prompts) != length_baseline(swapped, prompts)
