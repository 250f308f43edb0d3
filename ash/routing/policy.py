"""The rules of routing, one pure function each. `Router` applies them in this order.

1. `slices_for_input`: an image goes to a slice that declares vision, or nowhere.
2. `pinned_slice`: the user's choice wins over every guess.
3. `tool_loop_slice`: no switch between a tool call and its answer.
4. `abstains` and `slice_when_abstaining`: when the tier is not clear, nothing is changed.
5. `slice_for`: the table, else the tier.
6. `needed_confidence`: up at once, down only when sure, and surer the more the way back would cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from msgspec import Struct

from ash.domain.errors import SliceUnavailable
from ash.domain.values import Situation, SliceFacts, SliceRates
from ash.routing.anchors import INTENT_TIERS, Tier


class PolicyValues(Struct, frozen=True):
    """Thresholds on probabilities, each in [0, 1].

    The defaults were chosen on requests of other authors than the anchors'. Between 0.50 and 0.55 the
    likelier tier is hardly righter than a coin; of those at 0.7 or more for nano, 97% belong there.

    Attributes:
        abstain: below this probability of the likelier tier the head abstains.
        up: probability of turbo that takes a session from nano to turbo.
        down: probability of nano that takes a session from turbo to nano; above `up`.
        down_per_second: added to `down` for every second that the switch costs.
        most: what `down` and its additions may not exceed, so that a sure enough head always gets its way.
    """

    abstain: float = 0.52
    up: float = 0.55
    down: float = 0.7
    down_per_second: float = 0.01
    most: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.abstain <= 1 or not 0 <= self.up <= self.down <= self.most <= 1:
            raise ValueError(
                f"policy values are {self}; want 0 <= abstain <= 1 and 0 <= up <= down <= most <= 1"
            )
        if self.down_per_second < 0:
            raise ValueError(f"down_per_second is {self.down_per_second}; it must not be negative")


EXPECTED_LOAD_S: Final = 2.0
EXPECTED_PREFILL_TOKENS_S: Final = 150.0
"""Of a slice that was not measured yet: between the two bundled ones on two cores."""


def slices_for_input(situation: Situation) -> tuple[SliceFacts, ...]:
    """The slices that can take this input: those that declare vision when it holds an image.

    Raises:
        SliceUnavailable: there is none.
    """
    if not situation.slices:
        raise SliceUnavailable("no slice is usable; look at the log of the start or add one under [slices]")
    if not situation.wants_vision:
        return situation.slices
    seeing = tuple(facts for facts in situation.slices if facts.vision)
    if not seeing:
        names = ", ".join(facts.name for facts in situation.slices)
        raise SliceUnavailable(
            f"the input holds an image and no slice declares vision (there are {names}); "
            "send text only, or configure a slice with vision = true"
        )
    return seeing


def pinned_slice(situation: Situation, usable: Sequence[SliceFacts]) -> SliceFacts | None:
    """The slice that the user pinned; None without a pin.

    Raises:
        SliceUnavailable: the pinned slice is unknown, or cannot take this input.
    """
    if situation.pinned is None:
        return None
    pinned = named(situation.pinned, usable)
    if pinned is None:
        known = named(situation.pinned, situation.slices) is not None
        reason = "takes no images" if known else "does not exist"
        names = ", ".join(facts.name for facts in usable)
        raise SliceUnavailable(f"the pinned slice {situation.pinned!r} {reason}; pin one of {names}, or none")
    return pinned


def tool_loop_slice(situation: Situation, usable: Sequence[SliceFacts]) -> SliceFacts | None:
    """The current slice between a tool call and its answer, None outside a tool loop.

    An image that a tool returned may still force a switch, to a slice that can see it.
    """
    return named(situation.current, usable) if situation.in_tool_loop else None


def tier_probabilities(probabilities: Mapping[str, float]) -> dict[Tier, float]:
    """The sum of the probabilities of each tier's intents."""
    sums: dict[Tier, float] = {"nano": 0.0, "turbo": 0.0}
    for intent, probability in probabilities.items():
        sums[INTENT_TIERS[intent]] += probability
    return sums


def likelier_tier(probabilities: Mapping[str, float]) -> Tier:
    """The tier with the larger sum; turbo when they are equal, because it can do the work of both."""
    tiers = tier_probabilities(probabilities)
    return "nano" if tiers["nano"] > tiers["turbo"] else "turbo"


def likeliest_intent(probabilities: Mapping[str, float]) -> str:
    """The most probable intent within the likelier tier, so that intent and tier never contradict."""
    tier = likelier_tier(probabilities)
    candidates = [intent for intent in probabilities if INTENT_TIERS[intent] == tier]
    return max(candidates, key=probabilities.__getitem__)


def abstains(probabilities: Mapping[str, float], threshold: float) -> bool:
    """True when not even the likelier tier reaches `threshold`."""
    return max(tier_probabilities(probabilities).values()) < threshold


def slice_when_abstaining(situation: Situation, usable: Sequence[SliceFacts]) -> SliceFacts:
    """The session's current slice; for a new session the turbo tier, which can do the work of both."""
    return named(situation.current, usable) or of_tier("turbo", usable, situation.current)


def slice_for(
    intent: str, table: Mapping[str, str], usable: Sequence[SliceFacts], current: str | None
) -> SliceFacts:
    """The slice that `table` gives to `intent`, else one of the intent's tier."""
    chosen = named(table.get(intent), usable)
    return chosen or of_tier(INTENT_TIERS[intent], usable, current)


def of_tier(tier: Tier, usable: Sequence[SliceFacts], current: str | None) -> SliceFacts:
    """A slice of `tier`: the current one, else a resident one, else the first of the catalogue.

    A slice of the other tier where `tier` has none: an answer from the wrong tier is better than none.
    `usable` is not empty.
    """
    candidates = [facts for facts in usable if facts.tier == tier] or list(usable)
    return min(candidates, key=lambda facts: (facts.name != current, not facts.resident))


def switch_price(target: SliceFacts, history_tokens: int) -> float:
    """Seconds before `target` can answer: loading unless it is resident, and prefill of the history.

    By its measured rates, where there are any. The history counts as a whole, although the slice may hold the
    beginning of it from earlier turns: the price is the most that a switch can cost.
    """
    rates = target.rates or SliceRates()
    load_s = EXPECTED_LOAD_S if rates.load_s is None else rates.load_s
    prefill = rates.prefill_tokens_s or EXPECTED_PREFILL_TOKENS_S
    return (0.0 if target.resident else load_s) + history_tokens / prefill


def needed_confidence(current: SliceFacts, target: SliceFacts, price_s: float, values: PolicyValues) -> float:
    """The probability that a switch from `current` to `target` needs: fast up, slow down.

    A step up is worth any price, because a slice that is too small answers wrongly. A step down or
    sideways only saves time, so its own price is held against it.
    """
    if current.tier == "nano" and target.tier == "turbo":
        return values.up
    return min(values.most, values.down + values.down_per_second * price_s)


def named(name: str | None, slices: Sequence[SliceFacts]) -> SliceFacts | None:
    """The slice of that name, None where there is none."""
    return next((facts for facts in slices if facts.name == name), None)
