"""Examples made from anchors: how many, which are held out, and material that is refused."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from ash.domain.errors import ConfigError
from ash.routing.anchors import INTENTS, load_anchors
from ash.routing.augmentation import (
    PACKAGED_MATERIAL,
    Augmentation,
    Examples,
    Rates,
    augmented,
    load_material,
)

QUIET = Rates(0, 0, 0, 0, 0)


def test_every_anchor_comes_once_and_every_frame_as_often_as_asked() -> None:
    anchors, material = load_anchors(), load_material()

    found = augmented(anchors, material, Augmentation(fills=2, rates=QUIET), seed=3)

    count = len(anchors.texts())
    assert found.texts[:count] == anchors.texts()
    assert found.intents[:count] == anchors.labels()
    from_frames = Counter(found.intents[count:])
    assert from_frames == {intent: 2 * len(frames) for intent, frames in material.frames.items()}
    assert not any("{" + slot + "}" in text for text in found.texts[count:] for slot in material.passages)


def test_examples_follow_the_seed_alone() -> None:
    anchors, material = load_anchors(), load_material()
    one, same, other = (augmented(anchors, material, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.content_hash == same.content_hash
    assert one.content_hash != other.content_hash
    assert one.intents == other.intents
    assert one.held_out == other.held_out


def test_what_is_held_out_is_not_tuned_on_and_of_every_intent() -> None:
    examples = augmented(load_anchors(), load_material())
    texts, intents = examples.tuned_on()
    assert len(texts) == len(intents) == len(examples.texts) - sum(examples.held_out)
    held = [intent for intent, held in zip(examples.intents, examples.held_out, strict=True) if held]
    assert set(held) == set(INTENTS)
    assert 0.05 < len(held) / len(examples.texts) < 0.2


def test_anchors_as_they_are_hold_nothing_out() -> None:
    anchors = load_anchors()
    examples = Examples.of(anchors)
    assert (examples.texts, examples.intents) == (anchors.texts(), anchors.labels())
    assert examples.tuned_on() == (examples.texts, examples.intents)


def test_lures_are_requests_of_turbo_intents() -> None:
    anchors, material = load_anchors(), load_material()
    examples = augmented(anchors, material, Augmentation(fills=20, rates=QUIET))
    turbo = {text for part in anchors.intents if part.tier == "turbo" for text in part.sentences}
    framed = [
        text
        for text, intent in zip(examples.texts, examples.intents, strict=True)
        if intent == "translation" and any(lure.text in text for lure in turbo)
    ]
    assert len(framed) > 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PACKAGED_MATERIAL, tmp_path / "material"))


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("frames.toml", 'math = ["Solve this."]', r"frames.toml:1: the frame 'Solve this.' has no place"),
        (
            "frames.toml",
            '\nmath = ["{prosa}"]',
            r"frames.toml:2: .* unknown place \{prosa\}; known are \{prose\}",
        ),
        ("frames.toml", 'maths = ["{problem}"]', r"frames.toml:1: unknown key 'maths'; did you mean 'math'"),
        ("passages.toml", 'prose = ["a"]', r"passages.toml:1: 'chat' must be a list"),
        ("openers.toml", 'openers = ["Hi", "hi"]', r"openers.toml:1: 'hi' stands already"),
        ("openers.toml", "openers = [", r"openers.toml:1: not TOML"),
    ],
)
def test_wrong_material_is_named_with_its_line(folder: Path, name: str, text: str, complaint: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        load_material(folder)


def test_missing_material_is_named(folder: Path) -> None:
    (folder / "openers.toml").unlink()
    with pytest.raises(ConfigError, match=r"openers.toml:1: cannot be read"):
        load_material(folder)
