"""What a study measures of one session from its log alone. Pure; measures over vectors: ash.study.vectors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from msgspec import Struct

from ash.domain.values import MODES
from ash.study.rubric import LEXICAL_RATER, RUBRIC
from ash.study.transcript import SessionView

_WORD = re.compile(r"[^\W_]+(?:['\N{RIGHT SINGLE QUOTATION MARK}][^\W_]+)*")

GENRE_WORDS: dict[str, tuple[str, ...]] = {
    "story": ("story", "tale", "fable"),
    "poetry": ("poem", "poetry", "sonnet", "haiku", "verse"),
    "rap": ("rap", "hip-hop", "hip hop"),
    "country": ("country song", "country music", "country style", "country"),
    "blues": ("blues",),
    "folk": ("folk song", "folk ballad", "folk"),
    "gospel": ("gospel", "hymn"),
}
"""Words with which an input names a genre; those that mean other things too count with a request only."""

_REQUEST = re.compile(
    r"\b(write|sing|make|give|do|try|turn|compose|tell|perform|answer|reply|now|your turn|can you|could you|"
    r"let's|battle|beat|top)\b",
    re.IGNORECASE,
)

FOLLOW_WITHIN = 3
"""Answers within which a genre counts as taken up."""


class Challenge(Struct, frozen=True):
    """An input that asks for a genre, and the answer that took it up, if one did.

    `delay` counts answers: 0 is the first one behind the input; None where none followed.
    """

    message_id: str
    genre: str
    followed_by: str | None
    delay: int | None


class Activity(Struct, frozen=True):
    """What runs of one origin amounted to."""

    turns: int
    answers: int
    characters: int
    output_tokens: int


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def genre_asked(text: str) -> str | None:
    """The genre that an input asks for; None if it names none or asks for nothing."""
    if not _REQUEST.search(text):
        return None
    lowered = text.lower()
    places = [
        (found.start(), genre)
        for genre, names in GENRE_WORDS.items()
        for name in names
        if (found := re.search(rf"\b{re.escape(name)}\b", lowered))
    ]
    return min(places)[1] if places else None


def genre_adaptation(view: SessionView, within: int = FOLLOW_WITHIN) -> list[Challenge]:
    """For every input that asks for a genre, whether and how fast the agent's genre followed.

    An answer follows when its reading is creative and of that genre; those behind the next challenge count
    for the next one. The question is the source research's: its agent went through country, blues, gospel.
    """
    asked = [(message, genre_asked(message.text)) for message in view.inputs]
    challenges = [(message, genre) for message, genre in asked if genre is not None]
    found = []
    for number, (message, genre) in enumerate(challenges):
        end = challenges[number + 1][0].seq if number + 1 < len(challenges) else math.inf
        answers = [answer for answer in view.answers if message.seq < answer.seq < end][:within]
        delay = next(
            (
                place
                for place, answer in enumerate(answers)
                if answer.reading is not None and answer.reading.genre == genre
            ),
            None,
        )
        followed = None if delay is None else answers[delay].message_id
        found.append(Challenge(message.message_id, genre, followed, delay))
    return found


def activity(view: SessionView) -> dict[str, Activity]:
    """Turns, answers, characters and tokens by origin of the run; `unknown` where the log does not say."""
    lengths = {message.message_id: len(message.text) for message in view.answers}
    found: dict[str, Activity] = {}
    for turn in view.turns:
        origin = turn.origin or "unknown"
        before = found.get(origin, Activity(0, 0, 0, 0))
        tokens = (turn.usage.output_tokens or 0) if turn.usage else 0
        found[origin] = Activity(
            before.turns + 1,
            before.answers + len(turn.answers),
            before.characters + sum(lengths[message_id] for message_id in turn.answers),
            before.output_tokens + tokens,
        )
    return found


def prevalence(view: SessionView) -> dict[str, float]:
    """The share of the observed answers in each mode; NaN without one."""
    modes = Counter(
        answer.reading.mode for answer in view.answers if answer.reading and answer.reading.observed
    )
    total = sum(modes.values())
    return {mode: modes[mode] / total if total else math.nan for mode in MODES}


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams; NaN where there is no n-gram.

    Distinct-n of Li et al., A diversity-promoting objective function for neural conversation models, NAACL
    2016. It falls with the length of the texts: compare equal ones.
    """
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition_within(text: str, n: int = 4) -> float:
    """The share of n-grams that repeat an earlier one of the same text; NaN for a text without one.

    Seq-rep-n of Welleck et al., Neural text generation with unlikelihood training, ICLR 2020.
    """
    grams = ngrams(words(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def repetition_of_earlier(texts: Sequence[str], n: int = 4, window: int = 10) -> list[float]:
    """For each text from the second on, the share of its n-grams that one of the `window` texts before holds.

    An agent that says the same again goes to 1. NaN for a text without an n-gram.
    """
    grams = [ngrams(words(text), n) for text in texts]
    shares = []
    for number in range(1, len(grams)):
        earlier = {gram for part in grams[max(0, number - window) : number] for gram in part}
        own = grams[number]
        shares.append(sum(gram in earlier for gram in own) / len(own) if own else math.nan)
    return shares


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """The runs of `n` neighbouring tokens."""
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def hours(view: SessionView) -> float:
    """From the first to the last message; 0 for a session with fewer than two moments."""
    if not view.messages:
        return 0.0
    return (max(each.end_ts for each in view.messages) - min(each.ts for each in view.messages)) / 3_600_000


def session_measures(view: SessionView) -> dict[str, float]:
    """Every measure of a session that needs its log alone, by name; NaN where it is undefined.

    Rates are per hour of the session and per 100 answers; `share_*` are of answers, `turns_*` of turns by
    origin.
    """
    answers = view.answers
    texts = [answer.text for answer in answers]
    span, count = hours(view), len(answers)
    triggers = Counter(shift.value.trigger for shift in view.shifts)
    found: dict[str, float] = {
        "turns": len(view.turns),
        "answers": count,
        "hours": span,
        "shifts": len(view.shifts),
        "shifts_per_hour": len(view.shifts) / span if span > 0 else math.nan,
        "shifts_per_100_answers": 100 * len(view.shifts) / count if count else math.nan,
    }
    for trigger in ("external", "self_directed", "undetermined"):
        found[f"shifts_{trigger}"] = triggers[trigger]
    for mode, share in prevalence(view).items():
        found[f"share_{mode}"] = share
    for origin, part in activity(view).items():
        found[f"turns_{origin}"] = part.turns / len(view.turns)
    found["distinct_1"], found["distinct_2"] = distinct(texts, 1), distinct(texts, 2)
    found["repetition_within"] = average([repetition_within(text) for text in texts])
    found["repetition_of_earlier"] = average(repetition_of_earlier(texts))
    challenges = genre_adaptation(view)
    delays = [challenge.delay for challenge in challenges if challenge.delay is not None]
    found["genre_challenges"] = len(challenges)
    found["genre_followed"] = len(delays) / len(challenges) if challenges else math.nan
    found["genre_delay"] = average([float(delay) for delay in delays])
    for item in RUBRIC:
        marked = sum(LEXICAL_RATER.rate(item, answer).present for answer in answers)
        found[item.name] = marked / count if count else math.nan
    return found


def average(values: Sequence[float]) -> float:
    """The mean of the values that are known; NaN where none is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
