"""The router put together: fitted on vectors, decisions with reasons."""

from __future__ import annotations

import pytest
from msgspec import structs

from ash.domain.errors import ConfigError, SliceUnavailable
from ash.domain.values import Situation, SliceFacts, SliceRates
from ash.encoders.fake import HashEncoder
from ash.heads.head import Head
from ash.routing.anchors import INTENT_TIERS, Anchors, load_anchors
from ash.routing.augmentation import Examples
from ash.routing.features import WORD_DIMENSIONS, WORD_SCALE, features, word_features
from ash.routing.policy import PolicyValues
from ash.routing.router import UNKNOWN_INTENT, Router, fit_router, router_key

NANO = SliceFacts("small", "nano", 2048, vision=False, resident=True)
TURBO = SliceFacts("large", "turbo", 2048, vision=False, resident=False)
EYE = SliceFacts("eye", "turbo", 2048, vision=True, resident=False)


def situation(
    current: str | None = None,
    *,
    pinned: str | None = None,
    vision: bool = False,
    tokens: int = 0,
    slices: tuple[SliceFacts, ...] = (NANO, TURBO),
) -> Situation:
    return Situation(current, pinned, False, vision, tokens, slices)


@pytest.fixture(scope="module")
def anchors() -> Anchors:
    """A few of the packaged sentences of each intent: enough to fit on in no time."""
    whole = load_anchors()
    return Anchors(
        tuple(
            type(part)(part.intent, part.tier, part.description, part.sentences[:40], part.source)
            for part in whole.intents
        )
    )


@pytest.fixture
async def encoder() -> HashEncoder:
    encoder = HashEncoder(dimensions=64)
    await encoder.open()
    return encoder


@pytest.fixture(scope="module")
def head_of() -> dict[str, Head]:
    return {}


@pytest.fixture
async def head(anchors: Anchors, encoder: HashEncoder, head_of: dict[str, Head]) -> Head:
    if not head_of:
        head_of["head"] = fit_router(Examples.of(anchors), await encoder.encode(anchors.texts()))
    return head_of["head"]


async def test_the_anchors_themselves_are_routed_to_their_tier(
    anchors: Anchors, encoder: HashEncoder, head: Head
) -> None:
    router = Router(head)
    vectors = await encoder.encode(anchors.texts())
    right = 0
    for vector, text, intent in zip(vectors, anchors.texts(), anchors.labels(), strict=True):
        route = router.decide(vector, text, situation())
        right += route.slice == {"nano": "small", "turbo": "large"}[INTENT_TIERS[intent]]
    assert right / len(vectors) > 0.9


async def test_a_decision_explains_itself(encoder: HashEncoder, head: Head) -> None:
    text = "Translate this into Spanish please: good morning"
    (vector,) = await encoder.encode([text])

    measured = structs.replace(TURBO, rates=SliceRates(load_s=3.0, prefill_tokens_s=100.0))
    route = Router(head).decide(vector, text, situation("small", tokens=200, slices=(NANO, measured)))

    assert (route.slice, route.intent, route.switched) == ("small", "translation", False)
    assert route.reason.startswith(f"translation {route.probabilities['translation']:.2f}, nano ")
    (other,) = route.alternatives
    assert other["slice"] == "large"
    assert other["reason"] == "less likely"
    assert other["priceS"] == 5.0
    turbo = sum(p for intent, p in route.probabilities.items() if INTENT_TIERS[intent] == "turbo")
    assert other["probability"] == pytest.approx(turbo)


async def test_a_step_down_waits_for_certainty(encoder: HashEncoder, head: Head) -> None:
    text = "Translate this into Spanish please: good morning"
    (vector,) = await encoder.encode([text])
    easy, strict = PolicyValues(down=0.55), PolicyValues(down=1, most=1)

    down = Router(head, values=easy).decide(vector, text, situation("large"))
    kept = Router(head, values=strict).decide(vector, text, situation("large"))

    assert (down.slice, down.switched) == ("small", True)
    assert "switches from large" in down.reason
    assert (kept.slice, kept.switched) == ("large", False)
    assert "short of the 1.00 that a switch to small needs" in kept.reason
    assert kept.alternatives[0]["reason"] == "likelier, but not sure enough to switch"


def test_what_cannot_be_judged_says_why(head: Head) -> None:
    router = Router(head)
    vector = [0.0] * 64
    blank = router.decide(vector, "  ", situation("small"))
    down = router.decide(None, "hello", situation())

    assert (blank.slice, blank.intent) == ("small", UNKNOWN_INTENT)
    assert blank.reason == "no text to judge by: keeps the current slice"
    assert (down.slice, down.intent) == ("large", UNKNOWN_INTENT)
    assert down.reason == "the encoder is down: a new session starts on turbo"


def test_images_go_to_a_slice_that_sees_them(head: Head) -> None:
    router = Router(head)
    route = router.decide(None, "", situation("small", vision=True, slices=(NANO, TURBO, EYE)))
    assert (route.slice, route.switched) == ("eye", True)
    assert [alternative["reason"] for alternative in route.alternatives] == ["takes no images"] * 2
    with pytest.raises(SliceUnavailable, match=r"no slice declares vision .there are small, large"):
        router.decide(None, "", situation(vision=True))
    with pytest.raises(SliceUnavailable, match="the pinned slice 'small' takes no images; pin one of eye"):
        router.decide(None, "", situation(pinned="small", vision=True, slices=(NANO, EYE)))


def test_impossible_wishes_are_named(head: Head) -> None:
    router = Router(head)
    with pytest.raises(
        SliceUnavailable, match="the pinned slice 'gone' does not exist; pin one of small, large"
    ):
        router.decide(None, "", situation(pinned="gone"))
    with pytest.raises(SliceUnavailable, match="no slice is usable"):
        router.decide(None, "", situation(slices=()))
    assert router.decide(None, "", situation(pinned="large")).alternatives[0]["reason"] == "large is pinned"


def test_a_router_that_cannot_work_is_refused(head: Head) -> None:
    with pytest.raises(ConfigError, match="unknown intent 'maths'; did you mean 'math'"):
        Router(head, {"maths": "large"})
    other = Head(("a", "b"), head.weights[:, :2], head.bias[:2], 1.0, head.prior[:2])
    with pytest.raises(ValueError, match="fitted on INTENTS"):
        Router(other)
    for values in ({"up": 0.9, "down": 0.8}, {"abstain": 1.5}, {"down_per_second": -1.0}):
        with pytest.raises(ValueError, match=r"want 0 <=|must not be negative"):
            PolicyValues(**values)


def test_fitting_wants_a_vector_for_each_text(anchors: Anchors) -> None:
    with pytest.raises(ValueError, match="1 vectors for"):
        fit_router(Examples.of(anchors), [[0.0]])


def test_the_key_follows_anchors_and_encoder(anchors: Anchors) -> None:
    examples, fewer = Examples.of(anchors), Examples.of(Anchors(anchors.intents[1:]))
    keys = {router_key(examples, "a"), router_key(examples, "b"), router_key(fewer, "a")}
    assert len(keys) == 3


def test_words_are_a_unit_vector_of_the_beginning_and_the_end() -> None:
    assert word_features("").tolist() == [0.0] * WORD_DIMENSIONS
    found = word_features("Translate 12 words!")
    assert found @ found == pytest.approx(1)
    assert word_features("translate 99 WORDS !") == pytest.approx(found)
    assert word_features("say it again") @ word_features("it say again") < 0.9999

    middle, head, tail = "filler " * 100, "please shorten this", "in two sentences"
    assert word_features(f"{head} {middle} {tail}") == pytest.approx(
        word_features(f"{head} {middle}{middle} {tail}")
    )
    assert word_features(f"{head} {middle}") @ word_features(f"{head} {middle} {tail}") < 0.9

    whole = features([1.0, 0.0], "a word")
    assert whole.shape == (2 + WORD_DIMENSIONS,)
    assert whole[2:] @ whole[2:] == pytest.approx(WORD_SCALE**2)
