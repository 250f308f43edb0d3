"""What tells one kind of verse or fiction from another: rhyme, repetition and diction. Pure; for English."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

VERSE_FEATURES = (
    "repeated_line",  # likeness of the two neighbouring lines that share most words: the AAB of the blues
    "refrain",  # share of runs of four words that occur again, a third and more is 1
    "section_labels",  # a line such as [Chorus] or (Verse 2)
    "dialect",  # dropped g, ain't, gonna, y'all... per word, 6% and more are 1
    "archaic",  # words of older verse per word, 8% and more are 1; the next ones likewise
    "folk",
    "blues",
    "country",
    "rap",
    "gospel",
)

VERSE_SCALE = 0.25
"""Factor on every feature of verse, beside a unit vector."""


def word_set(words: str) -> frozenset[str]:
    """The words of a string, for lists that would take a page with one word a line."""
    return frozenset(words.split())


_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*'?")
_LABEL = re.compile(
    r"(?im)^\W*(?:verse|chorus|hook|bridge|intro|outro|refrain|pre-chorus|choir|lead)\b[^a-z\n]*$"
)
_INNER_LINE = re.compile(
    r"(?<=[,;:.!?\N{EM DASH}])\s+(?=[\"'\N{LEFT DOUBLE QUOTATION MARK}\N{LEFT SINGLE QUOTATION MARK}]?[A-Z])"
)
_INNER_LINE_AFTER_COMMA = re.compile(r"[,;:\N{EM DASH}]\s+(?!I\b|I')[A-Z]")
_RHYME_PART = re.compile(r"[aeiouy]+[^aeiouy]*e?$|[^aeiouy]+$")
_VERSE_LINES = 4
_RUN = 4
_FEWEST_INNER_LINES = 2
_WORDS_PER_INNER_LINE = 14

_DIALECT = frozenset(
    {"ain't", "gonna", "'cause", "cause", "gotta", "y'all", "ol'", "em", "wanna", "gon'", "po'", "i'ma"}
)
_DICTION: dict[str, tuple[float, frozenset[str]]] = {
    "archaic": (
        0.08,
        word_set(
            "'tis 'twas ah alas amid amidst art beheld bosom bower breast brow dost doth dwell e'er "
            "ere eve fair hark hast hath hither lo maiden midst morn nay ne'er nigh nymph o o'er oft "
            "shalt steed sweet thee thence thine thither thou thy tis twas unto upon vale whence "
            "whilst wilt woe ye yon yonder zephyr"
        ),
    ),
    "folk": (
        0.1,
        word_set(
            "adieu ae ain auld awa banks bonnie bonny boys captain cottage darling dear dee diddle "
            "drum farewell fiddle frae gae gie glen gude guid hae hame harbour haul heave heigh ho "
            "hush jolly lad laddie lads lang lass lassie lay lullaby maid maiden mair meadow mill "
            "miller mony mother nae o' owre ploughboy rove roving row sae sail sailor sea ship shore "
            "sweetheart tra village wae wee wi' willow ye ye'll"
        ),
    ),
    "blues": (
        0.12,
        word_set(
            "baby blue blues bottle crossroads cryin' done door down gone jailhouse key landlord "
            "levee lonesome lord low low-down mama mean mercy midnight misery mojo mornin' morning "
            "pawnshop rent rider said train trouble woke woman worried"
        ),
    ),
    "country": (
        0.1,
        word_set(
            "abilene backroad barn barstool beer blacktop boots bourbon boy buckle corn county cowboy "
            "creek daddy daddy's dashboard denim diner dirt dog fence field fields fishing georgia "
            "girl gravel guitar hat hay highway hometown honky honky-tonk jeans jukebox mama mama's "
            "montana neon oklahoma pickup pines porch preacher radio ranch rodeo saddle saturday "
            "southern steel supper tailgate tea tennessee texas tonk town tractor truck truck's "
            "whiskey windshield"
        ),
    ),
    "rap": (
        0.12,
        word_set(
            "ay ayo bar bars bass bassline battle beat beats block booth boss bread cash chain city "
            "concrete corner crew crown cypher drip flow flows game gonna gotta grind hater haters "
            "homie homies hood hook hustle hustlin i'm king legit lyric lyrical mic microphone momma "
            "nah page rap rapper rappers real rhyme rhymes snare spit spitting stack stacks stage "
            "studio tryna uh verse whip yeah yo"
        ),
    ),
    "gospel": (
        0.1,
        word_set(
            "altar amen blessed blessing blood choir cross deacon father glory god grace hallelujah "
            "heaven heavenly holy jesus jordan king lamb lord lord's mercy pharaoh praise praises "
            "pray prayed prayer preacher redeemed redeemer saints saved savior saviour sin sinner "
            "sinners soul spirit testify thank worthy zion"
        ),
    ),
}


def verse_lines(text: str) -> list[str]:
    """The lines of `text`; those of verse that was written on in one go are found again where it shows.

    It shows by ` / ` between lines, or by capitals after a comma every few words.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) != 1:
        return lines
    (line,) = lines
    if " / " in line:
        return [part.strip() for part in line.split(" / ") if part.strip()]
    inner = len(_INNER_LINE_AFTER_COMMA.findall(line))
    if inner >= _FEWEST_INNER_LINES and len(line.split()) / (inner + 1) <= _WORDS_PER_INNER_LINE:
        return _INNER_LINE.split(line)
    return lines


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


def repeated_line(lines: Sequence[str]) -> float:
    """The largest likeness of two neighbouring lines: shared words over all their words, 0 to 1."""
    words = [set(_words(line)) for line in lines]
    pairs = pairwise(words)
    return max((len(one & other) / len(one | other) for one, other in pairs if one and other), default=0.0)


def refrain(words: Sequence[str]) -> float:
    """Share of runs of four words that occurred before in `words`, 0 to 1."""
    runs = [tuple(words[start : start + _RUN]) for start in range(len(words) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def verse_features(text: str) -> list[float]:
    """The features named in VERSE_FEATURES, in that order, each in [0, 1]; all 0 for a text without words."""
    words = _words(text)
    if not words:
        return [0.0] * len(VERSE_FEATURES)
    dialect = sum(word in _DIALECT or word.endswith("in'") for word in words) / len(words)
    values = [
        repeated_line(verse_lines(text)),
        refrain(words) * 3,
        float(bool(_LABEL.search(text))),
        dialect / 0.06,
    ]
    values += [sum(word in known for word in words) / len(words) / full for full, known in _DICTION.values()]
    return [min(1.0, value) for value in values]


def genre_features(row: NDArray[np.float64], text: str) -> NDArray[np.float64]:
    """The genre head's input: that of the mode head and behind it the features of verse times VERSE_SCALE."""
    return np.concatenate([row, VERSE_SCALE * np.asarray(verse_features(text))])


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))]


def _ending(line: str) -> str:
    """The rhyming part of the last word of `line`, empty where there is none."""
    words = _words(line)
    found = _RHYME_PART.search(words[-1].rstrip("'")) if words else None
    return found.group() if found else ""
