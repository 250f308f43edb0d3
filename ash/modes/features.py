"""Form features of a text: what an encoder of meaning does not see. Cheap, pure, language-light.

Every feature lies in [0, 1], so that none outweighs the others by its unit; `SCALE` then brings them to
the size of the entries of a unit vector, beside which they stand in a head with one L2 penalty.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FORM_FEATURES = (
    "line_breaks",  # line breaks per 100 characters, 5 and more are 1
    "question_marks",  # question marks per sentence, at most 1
    "exclamation_marks",  # exclamation marks per sentence, at most 1
    "first_person",  # I, me, my... per word, 10% and more are 1
    "contractions",  # words with an apostrophe, 10% and more are 1
    "talk",  # words of spoken chat (yeah, well, sorry...), 10% and more are 1
    "rhyme",  # share of lines that rhyme with one of the next two, in a text of 4 lines or more
    "digits",  # digits per character, 20% and more are 1
    "code_marks",  # brackets, operators and backquotes per character, 10% and more are 1
)
# Left out after measuring: lengths of lines and texts, the share of short lines and the second person tell
# one collection of texts from another rather than one mode from another. With them macro-F1 on texts of
# other authors was 4 points lower.

SCALE = 0.5
"""Factor on every form feature; on texts of other authors than the anchors' 0.5 to 1 do equally well."""

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|\n")
_CODE_MARKS = frozenset("{}[]()<>=+*/\\|`_^#;")
_FIRST_PERSON = frozenset({"i", "me", "my", "mine", "myself", "i'm", "i've", "i'll", "i'd", "im"})
# fmt: off - one word a line would take half the file
_TALK = frozenset(
    {
        "actually",
        "ah",
        "awesome",
        "btw",
        "cool",
        "definitely",
        "glad",
        "great",
        "guess",
        "haha",
        "hello",
        "hey",
        "hi",
        "hmm",
        "honestly",
        "lol",
        "love",
        "maybe",
        "nice",
        "no",
        "nope",
        "oh",
        "ok",
        "okay",
        "please",
        "really",
        "sorry",
        "sure",
        "tbh",
        "thank",
        "thanks",
        "well",
        "wow",
        "yeah",
        "yep",
        "yes",
    }
)
# fmt: on
_RHYME_PART = re.compile(r"[aeiouy]+[^aeiouy]*e?$|[^aeiouy]+$")
_VERSE_LINES = 4


def form_features(text: str) -> list[float]:
    """The features named in FORM_FEATURES, in that order, each in [0, 1]; all 0 for a blank text."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return [0.0] * len(FORM_FEATURES)
    characters = sum(map(len, lines))
    words = [word.lower() for word in _WORD.findall(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))]
    word_count = max(1, len(words))
    sentences = max(1, len(_SENTENCE_END.findall(text.strip())))
    values = (
        (len(lines) - 1) / characters * 100 / 5,
        text.count("?") / sentences,
        text.count("!") / sentences,
        sum(word in _FIRST_PERSON for word in words) / word_count / 0.1,
        sum("'" in word for word in words) / word_count / 0.1,
        sum(word in _TALK for word in words) / word_count / 0.1,
        rhyme_density(lines),
        sum(map(str.isdigit, text)) / characters / 0.2,
        sum(character in _CODE_MARKS for character in text) / characters / 0.1,
    )
    return [min(1.0, value) for value in values]


def rhyme_density(lines: Sequence[str]) -> float:
    """Share of `lines` whose last word ends like that of one of the next two lines; 0 below 4 lines.

    Rhyme is taken from spelling: the last vowels and what follows. The last line has no next one and does
    not count. A repeated last word, the habit of blues and refrains, counts as a rhyme.
    """
    if len(lines) < _VERSE_LINES:
        return 0.0
    endings = [_ending(line) for line in lines]
    rhymes = sum(
        bool(ending) and ending in endings[number + 1 : number + 3]
        for number, ending in enumerate(endings[:-1])
    )
    return rhymes / (len(lines) - 1)


def _ending(line: str) -> str:
    """The rhyming part of the last word of `line`, empty where there is none."""
    words = _WORD.findall(line.lower())
    found = _RHYME_PART.search(words[-1]) if words else None
    return found.group() if found else ""


def features(vector: Sequence[float], text: str) -> NDArray[np.float64]:
    """A head's input: the unit vector of `text` and behind it its form features times SCALE."""
    return np.concatenate([np.asarray(vector, dtype=np.float64), SCALE * np.asarray(form_features(text))])
