"""The packaged anchors with the real encoder: requests and texts that no anchor file holds."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from ash.domain.values import Situation, SliceFacts
from ash.encoders.sentence import SentenceEncoder
from ash.heads.cache import HeadCache
from ash.modes import anchors as mode_anchors
from ash.modes import observer as heads
from ash.modes.instrument import Instrument
from ash.modes.observer import ModeObserver, RequestObserver
from ash.routing import anchors as intent_anchors
from ash.routing.augmentation import Examples
from ash.routing.router import Router, fit_router, router_key

pytestmark = [pytest.mark.slices, pytest.mark.slow]

# Fewer than there are, because encoding all of them takes a minute.
SENTENCES_PER_INTENT = 60
TEXTS_PER_FILE = 30

NANO = [
    "evening! how was your weekend",
    "turn the hallway lamp off",
    "what is the boiling point of ethanol",
    "fix the spelling: i recieved teh parcel",
    "how do you say 'see you tomorrow' in Portuguese",
    "Is this review positive or negative? 'The soup was cold and the waiter rude.'",
    "know any good puns about cheese?",
]
TURBO = [
    "A train leaves at 9:15 with 80 km/h, another at 9:45 with 110 km/h. When does the second catch up?",
    "write a rust function that merges two sorted vectors",
    "Five friends sit in a row. Anna is not next to Bob, Carl sits left of Dora. Who is in the middle?",
    "Compare leasing and buying a car for a family with two children and plan the decision.",
    "Write a long story about a clockmaker who cannot stop time.",
    "Write an essay on the effects of remote work on small towns.",
]
MODES = {
    "analytic": "The residuals grow with the fitted values, which points to heteroscedasticity. "
    "Taking logarithms of the response stabilises the variance; the slope then reads as a relative change.",
    "creative": "I left my boots by the river door,\nmy hat on the willow tree,\n"
    "and walked till the road was road no more\nand the night walked back with me.",
    "conversational": "Aw, that's lovely! I'm so happy for you. When's the party, and can I bring cake?",
}


async def test_requests_and_texts_of_other_hands_are_recognised(tmp_path: Path) -> None:
    encoder = SentenceEncoder()
    await encoder.open()
    try:
        router = await fitted_router(encoder, HeadCache(tmp_path))
        instrument = await fitted_instrument(encoder)
        vectors = await encoder.encode([*NANO, *TURBO])
        slices = (
            SliceFacts("small", "nano", 2048, vision=False, resident=True),
            SliceFacts("large", "turbo", 2048, vision=False, resident=True),
        )
        situation = Situation(None, None, False, False, 0, slices)
        wanted = dict.fromkeys(NANO, "small") | dict.fromkeys(TURBO, "large")
        wrong = [
            text
            for (text, name), vector in zip(wanted.items(), vectors, strict=True)
            if router.decide(vector, text, situation).slice != name
        ]
        assert len(wrong) <= 2, wrong
        for (mode, text), vector in zip(
            MODES.items(), await encoder.encode(list(MODES.values())), strict=True
        ):
            assert instrument.observe(vector, text).mode == mode
        for mode, wish in (
            ("creative", "would you write a little ballad for me"),
            ("analytic", "please explain step by step why the sky is blue"),
        ):
            (vector,) = await encoder.encode([wish])
            assert instrument.pull(vector, wish)[mode] >= 0.5
        (vector,) = await encoder.encode(["okay, thanks"])
        assert max(instrument.pull(vector, "okay, thanks").values()) < 0.5
    finally:
        await encoder.close()


async def fitted_router(encoder: SentenceEncoder, cache: HeadCache) -> Router:
    """Fitted, stored and read again, as a warm start does."""
    whole = intent_anchors.load_anchors()
    anchors = intent_anchors.Anchors(
        tuple(replace(part, sentences=part.sentences[:SENTENCES_PER_INTENT]) for part in whole.intents)
    )
    examples = Examples.of(anchors)
    vectors = await encoder.encode(examples.texts)
    key = router_key(examples, encoder.identity)
    cache.store(key, await asyncio.to_thread(fit_router, examples, vectors))
    head = cache.load(key)
    assert head is not None
    return Router(head)


async def fitted_instrument(encoder: SentenceEncoder) -> Instrument:
    whole = mode_anchors.load_anchors()
    anchors = mode_anchors.Anchors(
        tuple(replace(part, texts=part.texts[:TEXTS_PER_FILE]) for part in whole.parts)
    )
    requests = mode_anchors.load_requests()
    vectors = await encoder.encode(anchors.texts())
    asked = await encoder.encode(requests.texts())
    return Instrument(
        ModeObserver(heads.fit_modes(anchors, vectors), heads.fit_genres(anchors, vectors)),
        RequestObserver(heads.fit_requests(requests, asked)),
    )
