"""The intents, and the sentences that stand for them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import msgspec
from msgspec import Struct

from ash.domain.errors import ConfigError
from ash.heads.document import Document, Example, read_documents, refuse_duplicates

Tier = Literal["nano", "turbo"]

INTENT_TIERS: Mapping[str, Tier] = MappingProxyType(
    {
        "smalltalk": "nano",
        "command_service": "nano",
        "simple_fact": "nano",
        "short_rewrite": "nano",
        "translation": "nano",
        "extract_classify": "nano",
        "quick_help": "nano",
        "math": "turbo",
        "coding": "turbo",
        "reasoning": "turbo",
        "analysis_planning": "turbo",
        "creative_long": "turbo",
        "longform_writing": "turbo",
    }
)
"""The tier that an intent's work needs."""

INTENTS = tuple(INTENT_TIERS)
FEWEST_SENTENCES = 30

PACKAGED_ANCHORS = Path(__file__).with_name("anchors")
"""The anchors that Ash ships."""


class IntentAnchors(Struct, frozen=True):
    """One file: an intent and its sentences."""

    intent: str
    tier: Tier
    description: str
    sentences: tuple[Example, ...]
    source: str


class Anchors(Struct, frozen=True):
    """All intents with their sentences, in the order of INTENTS."""

    intents: tuple[IntentAnchors, ...]

    @property
    def content_hash(self) -> str:
        """SHA-256 over intents and sentences, hex; file names, comments and descriptions do not count."""
        facts = [(part.intent, [example.text for example in part.sentences]) for part in self.intents]
        return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()

    def texts(self) -> list[str]:
        """Every sentence, in the order of `labels`: what is to be encoded before fitting."""
        return [example.text for part in self.intents for example in part.sentences]

    def labels(self) -> list[str]:
        """The intent of every sentence, in the order of `texts`."""
        return [part.intent for part in self.intents for _ in part.sentences]


def parse_anchors(text: str, source: str) -> IntentAnchors:
    """One anchor file: `intent`, `tier`, `description` and `sentences`.

    Args:
        text: TOML.
        source: the file's name in errors.

    Raises:
        ConfigError: names file and line.
    """
    document = Document(text, source)
    document.allow_keys(("intent", "tier", "description", "sentences"))
    intent = document.choice("intent", INTENTS)
    tier = document.choice("tier", ("nano", "turbo"))
    if tier != INTENT_TIERS[intent]:
        message = (
            f"intent {intent!r} belongs to tier {INTENT_TIERS[intent]!r}, not {tier!r}; correct the tier"
        )
        raise document.error(document.line_of("tier"), message)
    return IntentAnchors(
        intent=intent,
        tier=INTENT_TIERS[intent],
        description=document.string("description"),
        sentences=document.examples("sentences", at_least=FEWEST_SENTENCES),
        source=source,
    )


def join_anchors(parts: Iterable[IntentAnchors]) -> Anchors:
    """The anchors of all intents.

    Raises:
        ConfigError: an intent has no file or two, or a sentence stands in two files.
    """
    by_intent: dict[str, IntentAnchors] = {}
    for part in parts:
        other = by_intent.setdefault(part.intent, part)
        if other is not part:
            raise ConfigError(
                f"{part.source}:1: intent {part.intent!r} has a file already, {other.source}; join the two"
            )
    missing = [intent for intent in INTENTS if intent not in by_intent]
    if missing:
        raise ConfigError(f"no anchor file has intent {', '.join(missing)}; every intent needs one")
    anchors = Anchors(tuple(by_intent[intent] for intent in INTENTS))
    refuse_duplicates(example for part in anchors.intents for example in part.sentences)
    return anchors


def load_anchors(folder: Path = PACKAGED_ANCHORS) -> Anchors:
    """The anchors in the *.toml files of `folder`.

    Raises:
        ConfigError: a file is wrong, or cannot be read as UTF-8; names file and line.
    """
    return join_anchors(parse_anchors(text, source) for text, source in read_documents(folder))
