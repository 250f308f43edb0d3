"""What tells kinds of verse apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash.modes.verse import (
    VERSE_FEATURES,
    VERSE_SCALE,
    genre_features,
    refrain,
    repeated_line,
    rhyme_density,
    verse_features,
    verse_lines,
)

BLUES = (
    "My kettle went and left me, took the cups along,\n"
    "Said my kettle went and left me, took them cups along,\n"
    "Now there's nothing in the kitchen but this mean old song."
)


def named(text: str) -> dict[str, float]:
    return dict(zip(VERSE_FEATURES, verse_features(text), strict=True))


@given(st.text())
def test_every_feature_of_any_text_lies_between_0_and_1(text: str) -> None:
    values = verse_features(text)
    assert len(values) == len(VERSE_FEATURES)
    assert all(0 <= value <= 1 for value in values)


@given(st.text())
def test_lines_lose_no_word(text: str) -> None:
    assert "".join("".join(verse_lines(text)).split()).replace("/", "") == "".join(text.split()).replace(
        "/", ""
    )


def test_lines_of_verse_in_one_go_are_found_again() -> None:
    lines = [
        "The rain is on the river,",
        "The wind is in the tree,",
        "And who will mind the ferry",
        "But me?",
    ]
    assert verse_lines("\n".join(lines)) == lines
    assert verse_lines(" / ".join(lines)) == lines
    flowing = "The rain is on the river, The wind is in the tree; And who will mind it, But me?"
    assert verse_lines(flowing) == [
        "The rain is on the river,",
        "The wind is in the tree;",
        "And who will mind it,",
        "But me?",
    ]


@pytest.mark.parametrize(
    "prose",
    [
        "We met in Paris, London and Rome, and in the end nobody could say which of the three was best.",
        "I think, I said, I hope, I know: that was all he wrote.",
        "",
    ],
)
def test_prose_stays_in_one_piece(prose: str) -> None:
    assert verse_lines(prose) == ([prose] if prose else [])


def test_the_repeated_line_of_a_blues_stands_out() -> None:
    assert repeated_line(BLUES.splitlines()) > 0.6
    assert repeated_line(["one two", "three four"]) == 0.0
    assert repeated_line(["one two three", "one two four"]) == pytest.approx(0.5)
    assert repeated_line(["one"]) == 0.0
    assert named(BLUES)["repeated_line"] > 0.6


def test_a_refrain_is_what_comes_again() -> None:
    line = ["we", "will", "go", "down"]
    # Runs of four: 9, of which `we will go down` comes twice.
    assert refrain([*line, "to", "the", "sea", "and", *line]) == pytest.approx(1 / 9)
    assert refrain(["too", "few"]) == 0.0
    assert named(" ".join([*line, "to", "the", "sea", "and", *line]))["refrain"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("text", "labelled"),
    [
        ("[Chorus]\nla la", True),
        ("(Verse 2)\nla la", True),
        ("Hook:\nla", True),
        ("The chorus comes back\nla", False),
    ],
)
def test_labels_of_sections_stand_on_lines_of_their_own(text: str, labelled: bool) -> None:
    assert named(text)["section_labels"] == labelled


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("archaic", "O thou whose bower beside the vale doth lie"),
        ("folk", "Fare well, my bonnie lass, the ship is by the shore"),
        ("blues", "Woke this morning, baby, trouble at my door"),
        ("country", "Tailgate down on a gravel road with whiskey in the truck"),
        ("rap", "Yo, I spit these bars, the mic and the beat and the hook"),
        ("gospel", "Hallelujah, praise the Lord, my soul was saved by grace"),
    ],
)
def test_diction_points_at_its_genre(kind: str, text: str) -> None:
    values = {name: value for name, value in named(text).items() if name in VERSE_FEATURES[4:]}
    assert max(values, key=values.__getitem__) == kind


def test_dialect_is_heard_in_dropped_letters() -> None:
    assert named("I ain't goin' nowhere, y'all, I\N{RIGHT SINGLE QUOTATION MARK}m stayin'")["dialect"] == 1.0
    assert named("I am going nowhere, all of you")["dialect"] == 0.0


def test_rhyme_counts_spelling() -> None:
    assert rhyme_density(["the cat", "a hat", "my dog", "the fog"]) == pytest.approx(2 / 3)


def test_features_of_verse_stand_behind_the_others() -> None:
    row = genre_features(np.array([0.5, 0.25]), BLUES)
    assert row.tolist() == [0.5, 0.25, *(VERSE_SCALE * value for value in verse_features(BLUES))]
