"""Plain methods to be better than; each is fitted on the router's own anchors and on nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ash.heads.cache import head_key
from ash.heads.head import Head, Training, fit_head
from ash.routing.anchors import INTENT_TIERS, INTENTS, Anchors, Tier
from ash.routing.evaluation import LabelledPrompt, Scores, evaluate

Distribution = dict[str, float]


def majority_baseline(prompts: Sequence[LabelledPrompt]) -> Scores:
    """Always the commonest tier, and the commonest intent of that tier.

    It alone has seen the labels of `prompts`: no method that ignores the text can do better.
    """
    tier = Counter(prompt.tier for prompt in prompts).most_common(1)[0][0]
    intents = Counter(prompt.intent for prompt in prompts if INTENT_TIERS[prompt.intent] == tier)
    intent = intents.most_common(1)[0][0] if intents else _first_of(tier)
    return evaluate(prompts, [_certain(intent)] * len(prompts)).scores


def length_baseline(anchors: Anchors, prompts: Sequence[LabelledPrompt]) -> Scores:
    """Turbo from some number of characters on, the number that fits the anchors best."""
    threshold = _best_threshold(anchors)
    long, short = _certain(_first_of("turbo")), _certain(_first_of("nano"))
    return evaluate(prompts, [long if len(prompt.text) >= threshold else short for prompt in prompts]).scores


def plain_head_key(anchors: Anchors, encoder: str) -> str:
    """The cache key of the head that `fit_plain_head` fits on vectors of the encoder `encoder`."""
    return head_key(
        purpose="plain-intents", encoder=encoder, content_hash=anchors.content_hash, training=Training()
    )


def fit_plain_head(anchors: Anchors, vectors: Sequence[Sequence[float]]) -> Head:
    """Logistic regression on the encoder's vectors of `anchors.texts()` and nothing else."""
    return fit_head(vectors, anchors.labels(), Training())


def encoder_baseline(
    head: Head, prompts: Sequence[LabelledPrompt], vectors: Sequence[Sequence[float]]
) -> Scores:
    """What a router is without the rest: `head` is from `fit_plain_head`, `vectors` those of `prompts`."""
    found = [dict(zip(head.labels, map(float, row), strict=True)) for row in head.predict(vectors)]
    return evaluate(prompts, found).scores


def _best_threshold(anchors: Anchors) -> int:
    """The length from which most anchors of either tier fall on their own side."""
    lengths = np.asarray([len(text) for text in anchors.texts()])
    turbo = np.asarray([INTENT_TIERS[intent] == "turbo" for intent in anchors.labels()])
    candidates = np.unique(lengths)
    right = [int(np.sum((lengths >= candidate) == turbo)) for candidate in candidates]
    return int(candidates[int(np.argmax(right))])


def _first_of(tier: Tier) -> str:
    return next(intent for intent in INTENTS if INTENT_TIERS[intent] == tier)


def _certain(intent: str) -> Distribution:
    return {name: float(name == intent) for name in INTENTS}
