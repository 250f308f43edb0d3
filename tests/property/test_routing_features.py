"""Features and augmentation hold for any text."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash.routing.augmentation import ANY_TEXT, SLOTS, Rates, filled, load_material, perturbed
from ash.routing.features import WORD_DIMENSIONS, word_features

MATERIAL = load_material()
seeds = st.integers(0, 2**32)


@given(st.text())
def test_words_are_a_unit_vector_or_nothing(text: str) -> None:
    found = word_features(text)
    assert found.shape == (WORD_DIMENSIONS,)
    assert np.linalg.norm(found) == pytest.approx(1) or not found.any()


@given(st.text(), seeds)
def test_a_perturbation_is_the_same_for_the_same_seed(text: str, seed: int) -> None:
    one, other = (perturbed(text, MATERIAL, Rates(), random.Random(seed)) for _ in range(2))
    assert one == other


@given(st.text(), seeds)
def test_without_rates_nothing_happens(text: str, seed: int) -> None:
    assert perturbed(text, MATERIAL, Rates(0, 0, 0, 0, 0), random.Random(seed)) == text


@given(st.text(min_size=1), seeds)
def test_openers_and_closers_leave_the_request_whole(text: str, seed: int) -> None:
    found = perturbed(text, MATERIAL, Rates(1, 1, 0, 0, 0), random.Random(seed))
    assert text[1:] in found
    assert any(found.startswith(opener) for opener in MATERIAL.openers)
    assert any(found.endswith(closer) for closer in MATERIAL.closers)


@given(st.text(alphabet=st.characters(categories=["L"]), min_size=3), seeds)
def test_typing_errors_change_a_few_letters(text: str, seed: int) -> None:
    found = perturbed(text, MATERIAL, Rates(0, 0, 0, 0, 1), random.Random(seed))
    slips = max(1, len(text) // 60)
    assert abs(len(found) - len(text)) <= slips
    assert set(found) <= set(text)


@given(st.sampled_from([*SLOTS, ANY_TEXT]), seeds)
def test_every_place_is_filled(slot: str, seed: int) -> None:
    found = filled(f"<{{{slot}}}>", MATERIAL.passages, ["a lure"], random.Random(seed))
    assert found != f"<{{{slot}}}>"
    assert found.startswith("<")
    assert found.endswith(">")
    assert len(found) > 2
