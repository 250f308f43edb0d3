"""The routing decision: head, then policy, then a sentence that says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ash.domain.errors import ConfigError
from ash.domain.values import Route, Situation, SliceFacts
from ash.heads.cache import head_key
from ash.heads.document import nearest
from ash.heads.head import Head, Training, fit_head
from ash.routing import policy
from ash.routing.anchors import INTENT_TIERS, INTENTS
from ash.routing.augmentation import Examples
from ash.routing.features import WORD_DIMENSIONS, WORD_SCALE, features
from ash.routing.policy import PolicyValues

UNKNOWN_INTENT = "unknown"
"""The intent of an input that could not be judged: it has no text, or the encoder is down."""

TRAINING = Training(inverse_regularisation=3.0)


def router_key(examples: Examples, encoder: str) -> str:
    """The cache key of the head that `fit_router` fits on vectors of the encoder with identity `encoder`."""
    return head_key(
        purpose="intents",
        encoder=encoder,
        content_hash=examples.content_hash,
        training=TRAINING,
        features=(WORD_DIMENSIONS, WORD_SCALE),
    )


def fit_router(examples: Examples, vectors: Sequence[Sequence[float]]) -> Head:
    """The intent head. `vectors` are those of `examples.texts`, in that order.

    Raises:
        ValueError: not one vector for each text.
    """
    if len(vectors) != len(examples.texts):
        raise ValueError(f"{len(vectors)} vectors for {len(examples.texts)} examples; want one for each")
    rows = [features(vector, text) for vector, text in zip(vectors, examples.texts, strict=True)]
    held_out = examples.held_out if any(examples.held_out) else None
    return fit_head(rows, examples.intents, TRAINING, held_out=held_out)


class Router:
    """Decides which slice answers. Pure: the same input gives the same route."""

    def __init__(
        self,
        head: Head,
        table: Mapping[str, str] = MappingProxyType({}),
        values: PolicyValues | None = None,
    ) -> None:
        """Take a fitted head and the policy.

        Args:
            head: from `fit_router`; its labels must be INTENTS.
            table: intent -> slice name, where the tier alone shall not decide.
            values: thresholds.

        Raises:
            ConfigError: `table` holds an unknown intent.
            ValueError: `head` was fitted on other labels.
        """
        for intent in table:
            if intent not in INTENT_TIERS:
                raise ConfigError(
                    f"the routing table has an unknown intent {intent!r}{nearest(intent, INTENTS)}"
                )
        if set(head.labels) != set(INTENTS):
            raise ValueError(f"the head knows {head.labels}; a router needs one fitted on INTENTS")
        self._head = head
        self._table = dict(table)
        self._values = values or PolicyValues()

    def probabilities(self, vector: Sequence[float] | None, text: str) -> dict[str, float]:
        """The head's opinion by intent, in the order of INTENTS; all the same where nothing can be judged.

        Args:
            vector: the encoder's for `text`; None while the encoder is down.
            text: of the input; nothing can be judged where it is blank.
        """
        if vector is None or not text.strip():
            return dict.fromkeys(INTENTS, 1 / len(INTENTS))
        found = self._head.probabilities(features(vector, text))
        return {intent: found[intent] for intent in INTENTS}

    def decide(self, vector: Sequence[float] | None, text: str, situation: Situation) -> Route:
        """The route of one input. Any text gets one; a blank text abstains, and so does one without a vector.

        Args:
            vector: the encoder's for `text`; None while the encoder is down.
            text: of the input.
            situation: what the policy may know of the session.

        Raises:
            SliceUnavailable: no slice can take the input, or not the pinned one.
        """
        obstacle = (
            "no text to judge by" if not text.strip() else "the encoder is down" if vector is None else ""
        )
        probabilities = self.probabilities(vector, text)
        usable = policy.slices_for_input(situation)
        chosen, reason = self._choose(probabilities, situation, usable, obstacle)
        return Route(
            slice=chosen.name,
            intent=UNKNOWN_INTENT if obstacle else policy.likeliest_intent(probabilities),
            probabilities=probabilities,
            alternatives=self._alternatives(probabilities, situation, usable, chosen),
            switched=situation.current is not None and situation.current != chosen.name,
            reason=reason,
        )

    def _choose(
        self,
        probabilities: Mapping[str, float],
        situation: Situation,
        usable: tuple[SliceFacts, ...],
        obstacle: str,
    ) -> tuple[SliceFacts, str]:
        """The slice and why. `obstacle` says why nothing could be judged, empty if it could."""
        if pinned := policy.pinned_slice(situation, usable):
            return pinned, "pinned by the user"
        if looping := policy.tool_loop_slice(situation, usable):
            return looping, "no switch inside a tool loop"
        current = policy.named(situation.current, usable)
        if obstacle or policy.abstains(probabilities, self._values.abstain):
            why = obstacle or f"unclear, {_tiers(probabilities)}"
            kept = "keeps the current slice" if current else "a new session starts on turbo"
            return policy.slice_when_abstaining(situation, usable), f"{why}: {kept}"
        intent = policy.likeliest_intent(probabilities)
        opinion = f"{intent} {probabilities[intent]:.2f}, {_tiers(probabilities)}"
        target = policy.slice_for(intent, self._table, usable, situation.current)
        if current is None or target is current:
            return target, opinion
        needed = policy.needed_confidence(current, target, self._price(target, situation), self._values)
        confidence = self._confidence(probabilities, current, target, usable)
        if confidence >= needed:
            return target, f"{opinion}: switches from {current.name}"
        short = f"{confidence:.2f} is short of the {needed:.2f} that a switch to {target.name} needs"
        return current, f"{opinion}: {short}"

    def _confidence(
        self,
        probabilities: Mapping[str, float],
        current: SliceFacts,
        target: SliceFacts,
        usable: tuple[SliceFacts, ...],
    ) -> float:
        """How sure the head is of `target`: between tiers its tier counts, within one its own intents."""
        if current.tier != target.tier:
            return policy.tier_probabilities(probabilities)[target.tier]
        return self._by_slice(probabilities, usable, current.name)[target.name]

    def _by_slice(
        self, probabilities: Mapping[str, float], usable: tuple[SliceFacts, ...], current: str | None
    ) -> dict[str, float]:
        """For each usable slice the probability that the intent is one it is meant for."""
        sums = dict.fromkeys((facts.name for facts in usable), 0.0)
        for intent, probability in probabilities.items():
            sums[policy.slice_for(intent, self._table, usable, current).name] += probability
        return sums

    def _price(self, target: SliceFacts, situation: Situation) -> float:
        return policy.switch_price(target, situation.history_tokens)

    def _alternatives(
        self,
        probabilities: Mapping[str, float],
        situation: Situation,
        usable: tuple[SliceFacts, ...],
        chosen: SliceFacts,
    ) -> tuple[dict[str, str | float], ...]:
        """The slices not taken: their probability, the seconds a switch there costs, and why not."""
        by_slice = self._by_slice(probabilities, usable, situation.current)
        result: list[dict[str, str | float]] = []
        for facts in situation.slices:
            if facts is chosen:
                continue
            if facts not in usable:
                reason = "takes no images"
            elif situation.pinned is not None:
                reason = f"{chosen.name} is pinned"
            elif by_slice[facts.name] > by_slice[chosen.name]:
                reason = "likelier, but not sure enough to switch"
            else:
                reason = "less likely"
            price = 0.0 if facts.name == situation.current else self._price(facts, situation)
            result.append(
                {
                    "slice": facts.name,
                    "probability": by_slice.get(facts.name, 0.0),
                    "priceS": round(price, 3),
                    "reason": reason,
                }
            )
        return tuple(result)


def _tiers(probabilities: Mapping[str, float]) -> str:
    """The likelier tier and its probability, to be read."""
    tier = policy.likelier_tier(probabilities)
    return f"{tier} {policy.tier_probabilities(probabilities)[tier]:.2f}"
