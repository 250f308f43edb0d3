"""The rules of routing, for any session and any opinion of the head."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace

from ash.domain.errors import SliceUnavailable
from ash.domain.values import Situation, SliceFacts, SliceRates
from ash.heads.head import Head
from ash.routing import policy
from ash.routing.anchors import INTENT_TIERS, INTENTS
from ash.routing.features import WORD_DIMENSIONS
from ash.routing.policy import PolicyValues
from ash.routing.router import UNKNOWN_INTENT, Router

NAMES = ("small", "large", "eye", "spare")

slices = st.lists(
    st.builds(
        SliceFacts,
        name=st.sampled_from(NAMES),
        tier=st.sampled_from(["nano", "turbo"]),
        context=st.just(2048),
        vision=st.booleans(),
        resident=st.booleans(),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda facts: facts.name,
).map(tuple)


@st.composite
def situations(draw: st.DrawFn, *, pinned: bool = True) -> Situation:
    found = draw(slices)
    names = st.sampled_from([facts.name for facts in found])
    return Situation(
        current=draw(st.none() | names | st.just("removed")),
        pinned=draw(st.none() | names) if pinned else None,
        in_tool_loop=draw(st.booleans()),
        wants_vision=draw(st.booleans()),
        history_tokens=draw(st.integers(0, 100_000)),
        slices=found,
    )


@st.composite
def distributions(draw: st.DrawFn) -> dict[str, float]:
    weights = draw(st.lists(st.floats(0, 1), min_size=len(INTENTS), max_size=len(INTENTS)))
    total = sum(weights)
    assume(total > 1e-6)
    return dict(zip(INTENTS, (weight / total for weight in weights), strict=True))


def router_of(probabilities: dict[str, float], table: dict[str, str] | None = None) -> Router:
    """A router whose head has this opinion of everything."""
    bias = np.log(np.maximum([probabilities[intent] for intent in INTENTS], 1e-12))
    count = len(INTENTS)
    head = Head(INTENTS, np.zeros((2 + WORD_DIMENSIONS, count)), bias, 1.0, np.full(count, 1 / count))
    return Router(head, table or {})


def able(situation: Situation) -> list[str]:
    return [facts.name for facts in situation.slices if facts.vision or not situation.wants_vision]


texts = st.text(max_size=40)
tables = st.dictionaries(st.sampled_from(INTENTS), st.sampled_from(NAMES), max_size=6)


@given(situations(), distributions(), texts, tables)
def test_any_text_gets_a_sound_route_or_no_slice_can_take_it(
    situation: Situation, probabilities: dict[str, float], text: str, table: dict[str, str]
) -> None:
    router = router_of(probabilities, table)
    if not able(situation) or (situation.pinned and situation.pinned not in able(situation)):
        with pytest.raises(SliceUnavailable):
            router.decide([1.0, 0.0], text, situation)
        return

    route = router.decide([1.0, 0.0], text, situation)

    assert route.slice in able(situation)
    assert route.switched == (situation.current is not None and route.slice != situation.current)
    assert set(route.probabilities) == set(INTENTS)
    assert math.isclose(sum(route.probabilities.values()), 1, rel_tol=1e-9)
    others = [facts.name for facts in situation.slices if facts.name != route.slice]
    assert [alternative["slice"] for alternative in route.alternatives] == others
    assert all(alternative["reason"] for alternative in route.alternatives)
    assert route.reason


@given(situations(), distributions(), tables)
def test_a_pin_wins(situation: Situation, probabilities: dict[str, float], table: dict[str, str]) -> None:
    assume(able(situation))
    for name in able(situation):
        pinned = replace(situation, pinned=name)
        assert router_of(probabilities, table).decide([1.0, 0.0], "x", pinned).slice == name


@given(situations(pinned=False), distributions(), tables)
def test_a_tool_loop_keeps_its_slice(
    situation: Situation, probabilities: dict[str, float], table: dict[str, str]
) -> None:
    assume(able(situation))
    for name in able(situation):
        looping = replace(situation, in_tool_loop=True, current=name)
        assert router_of(probabilities, table).decide([1.0, 0.0], "x", looping).slice == name


@given(situations(pinned=False), distributions(), st.sampled_from(["", " ", "\n\t", "\u2003"]))
def test_a_blank_text_and_a_missing_vector_change_nothing(
    situation: Situation, probabilities: dict[str, float], blank: str
) -> None:
    assume(able(situation))
    router = router_of(probabilities)
    for route in (router.decide([1.0, 0.0], blank, situation), router.decide(None, "words", situation)):
        if situation.current in able(situation):
            assert route.slice == situation.current
        else:
            usable = [facts for facts in situation.slices if facts.name in able(situation)]
            chosen = next(facts for facts in usable if facts.name == route.slice)
            assert chosen.tier == "turbo" or all(facts.tier == "nano" for facts in usable)
        if not situation.in_tool_loop:
            assert route.intent == UNKNOWN_INTENT


@given(distributions(), st.floats(0, 1))
def test_it_abstains_exactly_when_no_tier_reaches_the_threshold(
    probabilities: dict[str, float], threshold: float
) -> None:
    tiers = policy.tier_probabilities(probabilities)
    assert math.isclose(sum(tiers.values()), 1, rel_tol=1e-9)
    assert policy.abstains(probabilities, threshold) == all(p < threshold for p in tiers.values())


@given(distributions())
def test_the_likeliest_intent_lies_in_the_likelier_tier(probabilities: dict[str, float]) -> None:
    intent = policy.likeliest_intent(probabilities)
    tier = policy.likelier_tier(probabilities)
    assert INTENT_TIERS[intent] == tier
    assert policy.tier_probabilities(probabilities)[tier] >= 0.5 - 1e-9
    assert all(
        probabilities[intent] >= p for other, p in probabilities.items() if INTENT_TIERS[other] == tier
    )


NANO = SliceFacts("small", "nano", 2048, vision=False, resident=True)
TURBO = SliceFacts("large", "turbo", 2048, vision=False, resident=False)


@given(st.floats(0, 10_000), st.floats(0, 10_000), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_up_is_easier_than_down_and_a_price_only_slows_down(
    cheap: float, dear: float, a: float, b: float, c: float
) -> None:
    up, down, most = sorted((a, b, c))
    values = PolicyValues(up=up, down=down, most=most)
    cheap, dear = sorted((cheap, dear))

    assert policy.needed_confidence(NANO, TURBO, dear, values) == up
    going_down = policy.needed_confidence(TURBO, NANO, cheap, values)
    assert up <= going_down <= policy.needed_confidence(TURBO, NANO, dear, values) <= most


@given(st.floats(0, 1))
def test_a_session_moves_up_and_down_at_its_thresholds(nano: float) -> None:
    values = PolicyValues()
    probabilities = dict.fromkeys(INTENTS, 0.0) | {"smalltalk": nano, "math": 1 - nano}
    # Both resident and no history: a switch costs nothing.
    both = (NANO, replace(TURBO, resident=True))

    def decide(current: str) -> str:
        situation = Situation(current, None, False, False, 0, both)
        return router_of(probabilities).decide([1.0, 0.0], "x", situation).slice

    # The head computes a softmax: a probability at the threshold may fall on either side.
    assume(abs(1 - nano - values.up) > 1e-6 and abs(nano - values.down) > 1e-6)
    assert decide("small") == ("large" if 1 - nano >= values.up else "small")
    assert decide("large") == ("small" if nano >= values.down else "large")


@given(slices, st.sampled_from(INTENTS), st.none() | st.sampled_from(NAMES), tables)
def test_the_table_decides_then_the_tier_then_the_current_slice(
    found: tuple[SliceFacts, ...], intent: str, current: str | None, table: dict[str, str]
) -> None:
    chosen = policy.slice_for(intent, table, found, current)

    names = [facts.name for facts in found]
    of_tier = [facts for facts in found if facts.tier == INTENT_TIERS[intent]]
    if table.get(intent) in names:
        assert chosen.name == table[intent]
        return
    assert chosen in (of_tier or found)
    if current in [facts.name for facts in of_tier or found]:
        assert chosen.name == current
    elif any(facts.resident for facts in of_tier or found):
        assert chosen.resident


@given(st.integers(0, 10**6), st.floats(0.1, 100), st.floats(1, 10_000), st.booleans())
def test_a_price_is_loading_and_prefill(tokens: int, load_s: float, rate: float, resident: bool) -> None:
    target = SliceFacts("small", "nano", 2048, vision=False, resident=resident)
    measured = replace(target, rates=SliceRates(load_s=load_s, prefill_tokens_s=rate))
    price = policy.switch_price(measured, tokens)
    assert price == pytest.approx(tokens / rate + (0 if resident else load_s))
    expected = tokens / policy.EXPECTED_PREFILL_TOKENS_S + (0 if resident else policy.EXPECTED_LOAD_S)
    for unmeasured in (target, replace(target, rates=SliceRates())):
        assert policy.switch_price(unmeasured, tokens) == pytest.approx(expected)
