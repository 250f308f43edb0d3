"""More examples from the anchors: what real requests have that authored sentences lack.

People greet, thank, apologise, mistype, drop capitals and full stops, and paste in what their request is
about, which may read like a request of another intent. Two steps add that, the same for the same seed:

1. `filled`: frames such as "Translate into {language}: {text}" get a passage, or a whole request as a lure.
2. `perturbed`: openers, closers, case, punctuation and typing errors.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from ash.domain.errors import ConfigError
from ash.heads.document import Document, Example
from ash.routing.anchors import INTENT_TIERS, INTENTS, Anchors

PACKAGED_MATERIAL = Path(__file__).with_name("material")
"""Openers, closers, passages and frames that Ash ships."""

SLOTS = ("prose", "chat", "problem", "code", "word", "language")
"""The lists of passages.toml, and the places of frames that they fill."""

ANY_TEXT = "text"
"""The place that takes any passage, or a request of a turbo intent."""

# Shares of what fills ANY_TEXT; the rest are requests.
_ANY_TEXT_SHARES = {"prose": 0.40, "chat": 0.20, "problem": 0.12, "code": 0.06}

_HELD_OUT_EVERY = 8

_PLACE = re.compile(r"\{(\w+)\}")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Material(Struct, frozen=True):
    """What requests are dressed with. Lists by slot of SLOTS, and by intent."""

    passages: dict[str, tuple[str, ...]]
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    frames: dict[str, tuple[str, ...]]

    @property
    def content_hash(self) -> str:
        """SHA-256 over everything, hex."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class Rates(Struct, frozen=True):
    """How often each perturbation happens, as probabilities.

    Attributes:
        opener: something is said before the request.
        closer: something is said after it.
        case: all letters become small, or now and then capital.
        punctuation: the last sign is dropped.
        typing: letters are swapped, dropped or doubled, one in about 60.
    """

    opener: float = 0.35
    closer: float = 0.25
    case: float = 0.30
    punctuation: float = 0.20
    typing: float = 0.20


class Augmentation(Struct, frozen=True):
    """How many examples are made; part of the identity of what is trained on them.

    Attributes:
        fills: examples from each frame.
        perturbed_fills: share of them that is perturbed too.
        rates: of the perturbations.
    """

    fills: int = 4
    perturbed_fills: float = 0.5
    rates: Rates = Rates()


def load_material(folder: Path = PACKAGED_MATERIAL) -> Material:
    """The material in openers.toml, passages.toml and frames.toml of `folder`.

    Raises:
        ConfigError: a file is missing or wrong; names file and line.
    """
    passages = _document(folder / "passages.toml", SLOTS)
    openers = _document(folder / "openers.toml", ("openers", "closers"))
    frames = _document(folder / "frames.toml", INTENTS)
    found: dict[str, tuple[str, ...]] = {}
    for intent in INTENTS:
        if frames.has(intent):
            examples = frames.examples(intent, at_least=1)
            for example in examples:
                _check_places(frames, example)
            found[intent] = tuple(example.text for example in examples)
    return Material(
        passages={slot: _texts(passages, slot) for slot in SLOTS},
        openers=_texts(openers, "openers"),
        closers=_texts(openers, "closers"),
        frames=found,
    )


class Examples(Struct, frozen=True):
    """What a head is fitted on.

    Attributes:
        texts: one for each anchor, in the order of the anchors, then those of the frames.
        intents: of the texts.
        held_out: True for texts on which no encoder is tuned, so that they can show how sure a head may be.
    """

    texts: list[str]
    intents: list[str]
    held_out: list[bool]

    @classmethod
    def of(cls, anchors: Anchors) -> Examples:
        """The anchors as they are, none held out."""
        texts = anchors.texts()
        return cls(texts, anchors.labels(), [False] * len(texts))

    @property
    def content_hash(self) -> str:
        """SHA-256 over everything, hex."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    def tuned_on(self) -> tuple[list[str], list[str]]:
        """Texts and intents without those that are held out."""
        kept = [number for number, held in enumerate(self.held_out) if not held]
        return [self.texts[number] for number in kept], [self.intents[number] for number in kept]


def augmented(
    anchors: Anchors, material: Material, augmentation: Augmentation | None = None, seed: int = 0
) -> Examples:
    """Every anchor once, perturbed, and every frame filled `fills` times.

    `seed` gives the same examples every time; tuning takes another one for each epoch.
    """
    augmentation = augmentation or Augmentation()
    # Nothing secret hangs on it.
    generator = random.Random(seed)  # noqa: S311
    texts, labels = anchors.texts(), anchors.labels()
    lures = [text for text, intent in zip(texts, labels, strict=True) if INTENT_TIERS[intent] == "turbo"]
    made = [perturbed(text, material, augmentation.rates, generator) for text in texts]
    intents = list(labels)
    for intent, frames in material.frames.items():
        for frame in frames:
            for _ in range(augmentation.fills):
                text = filled(frame, material.passages, lures, generator)
                if generator.random() < augmentation.perturbed_fills:
                    text = perturbed(text, material, augmentation.rates, generator)
                made.append(text)
                intents.append(intent)
    # Files list anchors of one kind together, so every eighth is a sample of all kinds.
    held_out = [number % _HELD_OUT_EVERY == 0 for number in range(len(texts))]
    return Examples(made, intents, held_out + [False] * (len(made) - len(texts)))


def filled(
    frame: str, passages: Mapping[str, Sequence[str]], lures: Sequence[str], generator: random.Random
) -> str:
    """`frame` with something in each of its places."""

    def entry(match: re.Match[str]) -> str:
        slot = match.group(1)
        if slot == ANY_TEXT:
            slots = [*_ANY_TEXT_SHARES, ""]
            shares = [*_ANY_TEXT_SHARES.values(), 1 - sum(_ANY_TEXT_SHARES.values())]
            (slot,) = generator.choices(slots, shares)
            if not slot:
                return generator.choice(lures)
        passage = generator.choice(passages[slot])
        return _other_length(passage, passages[slot], generator) if slot == "prose" else passage

    return _PLACE.sub(entry, frame)


def _other_length(passage: str, others: Sequence[str], generator: random.Random) -> str:
    """One sentence of `passage`, all of it, or all of it and another one: material is of any length."""
    kind = generator.random()
    if kind < 0.45:
        return generator.choice(_SENTENCE_END.split(passage))
    return f"{passage} {generator.choice(others)}" if kind < 0.6 else passage


def perturbed(text: str, material: Material, rates: Rates, generator: random.Random) -> str:
    """`text` as somebody in a hurry, or somebody polite, would send it."""
    if generator.random() < rates.case:
        # Some people shout.
        text = text.upper() if generator.random() < 0.15 else text.lower()
    if generator.random() < rates.punctuation:
        text = text.rstrip(".?!")
    if generator.random() < rates.opener:
        opener = generator.choice(material.openers)
        if not opener.endswith((".", "!", "?")) and generator.random() < 0.6 and not text[1:2].isupper():
            text = text[:1].lower() + text[1:]
        text = f"{opener} {text}"
    if generator.random() < rates.closer:
        separator = ", " if text[-1:].isalnum() and generator.random() < 0.5 else " "
        text = f"{text}{separator}{generator.choice(material.closers)}"
    if generator.random() < rates.typing:
        for _ in range(max(1, len(text) // 60)):
            text = _mistyped(text, generator)
    return text


def _mistyped(text: str, generator: random.Random) -> str:
    """`text` with one slip of the fingers inside a word, where it has a word."""
    places = [i for i in range(1, len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
    if not places:
        return text
    place = generator.choice(places)
    here, following = text[place], text[place + 1]
    slip = generator.choices([following + here, following, here + here + following], [0.4, 0.3, 0.3])[0]
    return text[:place] + slip + text[place + 2 :]


def _document(path: Path, keys: Sequence[str]) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}:1: cannot be read as UTF-8 text: {error}") from error
    document = Document(text, str(path))
    document.allow_keys(keys)
    return document


def _texts(document: Document, key: str) -> tuple[str, ...]:
    return tuple(example.text for example in document.examples(key, at_least=1))


def _check_places(frames: Document, example: Example) -> None:
    """Refuse a frame without a place, or with one that nothing fills."""
    places = _PLACE.findall(example.text)
    unknown = [place for place in places if place not in (*SLOTS, ANY_TEXT)]
    if unknown or not places:
        known = ", ".join(f"{{{slot}}}" for slot in (*SLOTS, ANY_TEXT))
        what = f"an unknown place {{{unknown[0]}}}" if unknown else "no place"
        raise frames.error(example.line, f"the frame {example.text!r} has {what}; known are {known}")
