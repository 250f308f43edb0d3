"""Competitive and acknowledging behaviour: two raters by one rubric, every verdict with its citation."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from ash.study.statistics import cohen_kappa
from ash.study.transcript import Message


class RubricItem(Struct, frozen=True):
    """One kind of behaviour: what a rater answers of a message, and the marks of the lexical rater."""

    name: str
    question: str
    marks: tuple[str, ...]


class Verdict(Struct, frozen=True):
    """One rater's answer for one message; `citation` is the text it rests on, empty where none is named."""

    item: str
    message_id: str
    rater: str
    present: bool
    citation: str = ""


RUBRIC: tuple[RubricItem, ...] = (
    RubricItem(
        "competitive",
        "Does the speaker challenge the other one, or claim to be better?",
        (
            r"\b(?:beat|top|outdo|out-?rhyme|outshine) (?:that|this|me|you|your)\b",
            r"\b(?:i|we) (?:win|won|will win)\b",
            r"\bi(?:'ll| will| can)? (?:do|go) (?:one )?better\b",
            r"\bbetter than (?:you|your|yours|that)\b",
            r"\b(?:bring it on|your move|your turn|game on|challenge (?:you|accepted)|i challenge)\b",
            r"\b(?:can you|bet you can't|you can't) (?:beat|match|top|keep up)\b",
            r"\b(?:next round|round (?:one|two|three|\d+))\b",
        ),
    ),
    RubricItem(
        "acknowledging",
        "Does the speaker praise the other one's contribution, thank for it, or admit a limit of their own?",
        (
            r"\b(?:well (?:done|played|said|put)|nicely (?:done|put))\b",
            r"\b(?:good (?:point|one)|great (?:point|line|verse))\b",
            r"\b(?:you(?:'re| are) (?:right|better)|you win|you got me|fair enough|hats off|i concede)\b",
            r"\b(?:thank you|thanks) for\b",
            r"\b(?:i (?:admit|must admit|have to admit)|i was wrong|my mistake|i stand corrected)\b",
            r"\bi (?:can't|cannot|don't|do not) (?:match|compete|know (?:that|how|enough))\b",
            r"\byour (?:\w+ )?(?:verse|line|song|poem) (?:is|was) (?:\w+ )?(?:good|great|better|lovely)\b",
        ),
    ),
)
"""The behaviours that the source research reports of its lyric battle. As categories of interaction they are
Bales's: shows antagonism (12), and shows solidarity or agrees (1, 3); Interaction process analysis, 1950.
"""


class LexicalRater:
    """Rater 1: fixed phrases. Precise where it finds something, blind to what is said otherwise."""

    name = "lexical"

    def __init__(self, rubric: Sequence[RubricItem]) -> None:
        self._patterns = {item.name: re.compile("|".join(item.marks), re.IGNORECASE) for item in rubric}

    def rate(self, item: RubricItem, message: Message) -> Verdict:
        """Whether a phrase of `item` stands in the message; cites the first one."""
        text = message.text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        found = self._patterns[item.name].search(text)
        return Verdict(
            item.name, message.message_id, self.name, found is not None, found.group() if found else ""
        )


LEXICAL_RATER = LexicalRater(RUBRIC)


class Judge(Protocol):
    """Rater 2: a model that answers yes or no about a text.

    A slice stands behind it under a grammar that admits the two words only (ash.domain.values.OutputFormat).
    """

    @property
    def name(self) -> str: ...

    async def judge(self, question: str, text: str) -> bool:
        """Whether the answer to `question` about `text` is yes.

        Raises:
            SliceError: no slice could answer.
        """


class KeywordJudge:
    """The shipped fake of the port Judge: yes where the text holds one of the question's keywords."""

    name = "keyword"

    def __init__(self, keywords: Mapping[str, Sequence[str]]) -> None:
        """`keywords` by question; a question that is not there is answered with no."""
        self._keywords = {question: tuple(words) for question, words in keywords.items()}

    async def judge(self, question: str, text: str) -> bool:
        """Whether a keyword of `question` stands in `text`, in any case."""
        lowered = text.lower()
        return any(word.lower() in lowered for word in self._keywords.get(question, ()))


class Agreement(Struct, frozen=True):
    """How two raters agree on one item. `kappa` NaN: undefined, both gave one label throughout."""

    item: str
    messages: int
    observed: float
    kappa: float
    first_rate: float
    second_rate: float


async def rate_messages(
    messages: Sequence[Message], judge: Judge, rubric: Sequence[RubricItem] = RUBRIC
) -> list[Verdict]:
    """The verdicts of both raters on every message and item.

    Raises:
        SliceError: the judge could not answer.
    """
    lexical = LexicalRater(rubric)
    verdicts = []
    for message in messages:
        for item in rubric:
            verdicts.append(lexical.rate(item, message))
            present = await judge.judge(item.question, message.text)
            verdicts.append(Verdict(item.name, message.message_id, judge.name, present))
    return verdicts


def agreement(verdicts: Sequence[Verdict], first: str, second: str) -> list[Agreement]:
    """Cohen's kappa of raters `first` and `second` on each item, over the messages that both rated."""
    found = []
    for item in dict.fromkeys(verdict.item for verdict in verdicts):
        by_rater = {
            rater: {
                verdict.message_id: verdict.present
                for verdict in verdicts
                if verdict.item == item and verdict.rater == rater
            }
            for rater in (first, second)
        }
        both = [message_id for message_id in by_rater[first] if message_id in by_rater[second]]
        one, two = ([by_rater[rater][message_id] for message_id in both] for rater in (first, second))
        total = len(both)
        found.append(
            Agreement(
                item=item,
                messages=total,
                observed=sum(a == b for a, b in zip(one, two, strict=True)) / total if total else math.nan,
                kappa=cohen_kappa(one, two),
                first_rate=sum(one) / total if total else math.nan,
                second_rate=sum(two) / total if total else math.nan,
            )
        )
    return found
