"""Form features, and the observers fitted on them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash.domain.values import MODES
from ash.encoders.fake import HashEncoder
from ash.heads.head import Head
from ash.modes import observer as heads
from ash.modes.anchors import NOTHING, Anchors, load_anchors, load_requests
from ash.modes.features import FORM_FEATURES, SCALE, features, form_features
from ash.modes.instrument import Instrument
from ash.modes.observer import ModeObserver, RequestObserver
from ash.modes.verse import rhyme_density

VERSE = (
    "The rain came down on the silent town\nand nobody heard it fall\n"
    "the lamp went out in the evening gown\nof shadows along the wall"
)
TALK = "Oh, I'm so sorry! Are you ok? I don't really know what I'd do."
PROOF = "Let x = 3 * (y + 2). If y = 12, then x = 42, because 12 + 2 = 14 and 14 * 3 = 42."


def named(text: str) -> dict[str, float]:
    return dict(zip(FORM_FEATURES, form_features(text), strict=True))


@given(st.text())
def test_every_feature_of_any_text_lies_between_0_and_1(text: str) -> None:
    values = form_features(text)
    assert len(values) == len(FORM_FEATURES)
    assert all(0 <= value <= 1 for value in values)


def test_features_tell_forms_apart() -> None:
    verse, talk, proof = named(VERSE), named(TALK), named(PROOF)
    assert verse["line_breaks"] > 0.3 > talk["line_breaks"] == proof["line_breaks"] == 0
    assert verse["rhyme"] > 0.5 > talk["rhyme"] == 0
    for feature in ("first_person", "contractions", "talk", "question_marks", "exclamation_marks"):
        assert talk[feature] > 0 == verse[feature] == proof[feature]
    for feature in ("digits", "code_marks"):
        assert proof[feature] > 0.3 > verse[feature] == talk[feature] == 0


def test_typographic_apostrophes_are_apostrophes() -> None:
    assert form_features(TALK.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}")) == form_features(TALK)


@pytest.mark.parametrize(
    ("lines", "density"),
    [
        (["one", "two", "three"], 0.0),  # too short to be verse
        (["the cat", "a hat", "my dog", "the fog"], 2 / 3),
        (["the cat", "my dog", "a hat", "the fog"], 2 / 3),
        (["gone away", "gone away", "gone away", "home"], 2 / 3),  # a refrain
        (["table", "mountain", "river", "sky"], 0.0),
        (["1.", "2.", "3.", "4."], 0.0),  # no words
    ],
)
def test_rhyme_is_taken_from_spelling(lines: list[str], density: float) -> None:
    assert rhyme_density(lines) == pytest.approx(density)


def test_features_stand_behind_the_vector() -> None:
    row = features([0.6, 0.8], TALK)
    assert row.tolist() == [0.6, 0.8, *(SCALE * value for value in form_features(TALK))]


@pytest.fixture(scope="module")
def instrument_of() -> dict[str, Instrument]:
    return {}


@pytest.fixture
async def encoder() -> HashEncoder:
    encoder = HashEncoder(dimensions=64)
    await encoder.open()
    return encoder


@pytest.fixture
async def instrument(encoder: HashEncoder, instrument_of: dict[str, Instrument]) -> Instrument:
    if not instrument_of:
        anchors, requests = load_anchors(), load_requests()
        vectors = await encoder.encode(anchors.texts())
        modes = ModeObserver(heads.fit_modes(anchors, vectors), heads.fit_genres(anchors, vectors))
        asked = heads.fit_requests(requests, await encoder.encode(requests.texts()))
        instrument_of["fitted"] = Instrument(modes, RequestObserver(asked))
    return instrument_of["fitted"]


@pytest.mark.parametrize(
    ("text", "mode"), [(VERSE, "creative"), (TALK, "conversational"), (PROOF, "analytic")]
)
async def test_forms_are_recognised_even_by_spelling(
    instrument: Instrument, encoder: HashEncoder, text: str, mode: str
) -> None:
    (vector,) = await encoder.encode([text])
    estimate = instrument.observe(vector, text)
    assert estimate.mode == mode
    assert sum(estimate.probabilities.values()) == pytest.approx(1)
    assert (estimate.genre is None) == (mode != "creative")


async def test_a_request_pulls_and_a_remark_does_not(instrument: Instrument, encoder: HashEncoder) -> None:
    wish, remark = "Please write a poem about the sea for me", "okay, go ahead"
    asked, neutral = await encoder.encode([wish, remark])
    wanted, unwanted = instrument.pull(asked, wish), instrument.pull(neutral, remark)
    assert max(wanted, key=wanted.__getitem__) == "creative"
    assert wanted["creative"] > 2 * unwanted["creative"]


def test_a_blank_text_is_of_no_mode_and_asks_for_none(instrument: Instrument) -> None:
    estimate = instrument.observe([0.0] * 64, " \n")
    assert set(estimate.probabilities.values()) == {1 / 3}
    assert estimate.genre is None
    assert instrument._requests.asked([0.0] * 64, "") == dict.fromkeys(MODES, 0.0)


def test_heads_of_other_labels_are_refused() -> None:
    rows = [[float(n == k) for n in range(4)] for k in range(4) for _ in range(5)]
    labels = [name for name in (*MODES, NOTHING) for _ in range(5)]
    head = heads.fit_head(rows, labels)
    with pytest.raises(ValueError, match="an observer needs"):
        ModeObserver(head, None)
    RequestObserver(head)
    three = Head(head.labels[:3], head.weights[:, :3], head.bias[:3], 1.0, head.prior[:3])
    with pytest.raises(ValueError, match="want"):
        RequestObserver(three)


def test_without_two_genres_there_is_no_genre_head() -> None:
    anchors = load_anchors()
    plain = Anchors(tuple(part for part in anchors.parts if part.genre in {None, "rap"}))
    assert heads.fit_genres(plain, [[0.0]] * len(plain.texts())) is None
    with pytest.raises(ValueError, match="zip"):
        heads.fit_modes(anchors, [[0.0]])


def test_keys_tell_heads_apart() -> None:
    anchors, requests = load_anchors(), load_requests()
    keys = {
        heads.mode_key(anchors, "e"),
        heads.genre_key(anchors, "e"),
        heads.request_key(requests, "e"),
        heads.mode_key(anchors, "f"),
    }
    assert len(keys) == 4
