"""Form features of a text: what an encoder of meaning does not see. Cheap and pure; word lists are English.

Every feature lies in [0, 1], so that none outweighs the others by its unit; `SCALE` then brings them to
the size of the entries of a unit vector, beside which they stand in a head with one L2 penalty.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from ash.modes.verse import rhyme_density, verse_lines, word_set

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
    "stance",  # I think, I heard, I love... per sentence, one in two and more are 1
    "reply_openers",  # sentences that open as replies do (yeah, oh, really...), 40% and more are 1
    "casual",  # words of casual talk about things (crazy, kids, apparently...), 6% and more are 1
    "third_person",  # he, she, his... per word, 10% and more are 1
    "quotation_marks",  # double quotation marks per word, 8% and more are 1
    "articles",  # the, of per word, 15% and more are 1
    "small_starts",  # share of sentences that start with a small letter, in a text of one line
    "speaker",  # the word I per word, 10% and more are 1
)
# Left out after measuring (docs/decisions/2026-11-24-modes-quality.md): lengths of lines, of sentences and
# of texts, the share of short lines, the second person, past tenses and connectives tell one collection of
# texts from another rather than one mode from another.

SCALE = 0.5
"""Factor on every form feature; on texts of other authors than the anchors' 0.35 to 0.7 do equally well."""

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|\n")
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+|\n")
_CODE_MARKS = frozenset("{}[]()<>=+*/\\|`_^#;")
_QUOTATION_MARKS = re.compile('["\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}]')
_FIRST_PERSON = frozenset({"i", "me", "my", "mine", "myself", "i'm", "i've", "i'll", "i'd", "im"})
_THIRD_PERSON = frozenset({"he", "she", "his", "her", "him", "hers"})
_ARTICLES = frozenset({"the", "of"})
_TALK = word_set(
    "actually ah awesome btw cool definitely glad great guess haha hello hey hi hmm honestly lol love "
    "maybe nice no nope oh ok okay please really sorry sure tbh thank thanks well wow yeah yep yes"
)
_REPLY_OPENERS = word_set(
    "absolutely agreed ah anyway aw awesome aww congratulations cool crazy definitely exactly funny "
    "good great ha haha hello hey hi hm hmm honestly hopefully interesting lol maybe nah nice no nope "
    "oh ok okay really right same sorry sure surprisingly thank thanks true weirdly well whoa wow "
    "yeah yep yes yup"
)
_CASUAL = word_set(
    "actually amazing apparently awesome bet cool crazy dad fun funny gonna gotta guy guys haha idk "
    "insane kids kinda lol lot mom omg pretty stuff super supposedly thing things u ur wanna weird "
    "wild ya"
)
_STANCE = re.compile(
    r"\bi(?:'m| am)? "
    r"(?:(?:also|just|really|do|don't|did|didn't|never|would|wouldn't|only|still|always|actually|have|had|not|"
    r"was) )*"
    r"(?:think|thought|guess|heard|hear|agree|bet|wonder|suppose|believe|know|knew|loved?|liked?|hope|feel|felt|"
    r"remember|mean|see|saw|read|watch|watched|sure|glad|sorry|want|wish|prefer|enjoy|hate|imagine)\b"
)


def form_features(text: str) -> list[float]:
    """The features named in FORM_FEATURES, in that order, each in [0, 1]; all 0 for a blank text."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return [0.0] * len(FORM_FEATURES)
    plain = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    characters = sum(map(len, lines))
    words = [word.lower() for word in _WORD.findall(plain)]
    word_count = max(1, len(words))
    sentence_ends = max(1, len(_SENTENCE_END.findall(text.strip())))
    sentences = [part for part in _BETWEEN_SENTENCES.split(plain) if part.strip()]
    values = (
        (len(lines) - 1) / characters * 100 / 5,
        text.count("?") / sentence_ends,
        text.count("!") / sentence_ends,
        _share(words, _FIRST_PERSON) / 0.1,
        sum("'" in word for word in words) / word_count / 0.1,
        _share(words, _TALK) / 0.1,
        rhyme_density(verse_lines(text)),
        sum(map(str.isdigit, text)) / characters / 0.2,
        sum(character in _CODE_MARKS for character in text) / characters / 0.1,
        len(_STANCE.findall(plain.lower())) / len(sentences) / 0.5,
        _share([_first_word(sentence) for sentence in sentences], _REPLY_OPENERS) / 0.4,
        _share(words, _CASUAL) / 0.06,
        _share(words, _THIRD_PERSON) / 0.1,
        len(_QUOTATION_MARKS.findall(text)) / word_count / 0.08,
        _share(words, _ARTICLES) / 0.15,
        _small_starts(sentences) if len(lines) == 1 else 0.0,
        _share(words, {"i"}) / 0.1,
    )
    return [min(1.0, value) for value in values]


def features(vector: Sequence[float], text: str) -> NDArray[np.float64]:
    """A head's input: the unit vector of `text` and behind it its form features times SCALE."""
    return np.concatenate([np.asarray(vector, dtype=np.float64), SCALE * np.asarray(form_features(text))])


def _share(words: Sequence[str], known: Collection[str]) -> float:
    """Which part of `words` is in `known`; 0 without words."""
    return sum(word in known for word in words) / len(words) if words else 0.0


def _first_word(sentence: str) -> str:
    found = _WORD.search(sentence)
    return found.group().lower() if found else ""


def _small_starts(sentences: Sequence[str]) -> float:
    return sum(sentence[:1].islower() for sentence in sentences) / len(sentences)
