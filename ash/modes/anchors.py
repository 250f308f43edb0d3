"""The texts that stand for modes and genres, and the requests that ask for a mode."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import Struct, structs

from ash.domain.errors import ConfigError
from ash.domain.values import MODES
from ash.heads.document import Document, Example, read_documents, refuse_duplicates

FEWEST_TEXTS = 12
FEWEST_REQUESTS = 25

NOTHING = "nothing"
"""What a request asks for when it asks for no mode: go on, thanks, one more of these."""

PACKAGED_ANCHORS = Path(__file__).with_name("anchors")
PACKAGED_REQUESTS = Path(__file__).with_name("requests")


class ModeAnchors(Struct, frozen=True):
    """One file: a mode, its genre where the mode is creative, and texts of that kind."""

    mode: str
    genre: str | None
    description: str
    texts: tuple[Example, ...]
    source: str


class Anchors(Struct, frozen=True):
    """Texts of every mode."""

    parts: tuple[ModeAnchors, ...]

    @property
    def content_hash(self) -> str:
        """SHA-256 over modes, genres and texts, hex; file names, comments and descriptions do not count."""
        facts = [(part.mode, part.genre, [example.text for example in part.texts]) for part in self.parts]
        return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()

    def with_joined_lines(self) -> Anchors:
        """These anchors and, behind them, every creative text of several lines once more in one line.

        Verse often arrives without its line breaks, and line breaks alone must not make a text creative.
        The copies name no genre: they serve the mode head; genres were told apart worse with them.
        """
        joined = []
        for part in self.parts:
            copies = tuple(
                structs.replace(example, text=" ".join(example.text.split()))
                for example in part.texts
                if part.mode == "creative" and "\n" in example.text
            )
            if copies:
                joined.append(structs.replace(part, genre=None, texts=copies))
        return Anchors((*self.parts, *joined))

    def texts(self) -> list[str]:
        """Every text, in the order of `modes` and `genres`: what is to be encoded before fitting."""
        return [example.text for part in self.parts for example in part.texts]

    def modes(self) -> list[str]:
        """The mode of every text."""
        return [part.mode for part in self.parts for _ in part.texts]

    def genres(self) -> list[str | None]:
        """The genre of every text; None outside the creative mode and where a file gives none."""
        return [part.genre for part in self.parts for _ in part.texts]


class RequestAnchors(Struct, frozen=True):
    """Sentences by what they ask for: one of MODES, or NOTHING."""

    parts: tuple[tuple[str, tuple[Example, ...]], ...]

    @property
    def content_hash(self) -> str:
        """SHA-256 over labels and sentences, hex."""
        facts = [(label, [example.text for example in examples]) for label, examples in self.parts]
        return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()

    def texts(self) -> list[str]:
        """Every sentence, in the order of `labels`."""
        return [example.text for _, examples in self.parts for example in examples]

    def labels(self) -> list[str]:
        """What every sentence asks for."""
        return [label for label, examples in self.parts for _ in examples]


def parse_anchors(text: str, source: str) -> ModeAnchors:
    """One anchor file: `mode`, `genre` (creative only, optional), `description` and `texts`.

    Raises:
        ConfigError: names file and line.
    """
    document = Document(text, source)
    document.allow_keys(("mode", "genre", "description", "texts"))
    mode = document.choice("mode", MODES)
    genre = document.optional_string("genre")
    if genre is not None and mode != "creative":
        message = f"mode {mode!r} has no genres; remove 'genre' or set mode = \"creative\""
        raise document.error(document.line_of("genre"), message)
    return ModeAnchors(
        mode=mode,
        genre=genre,
        description=document.string("description"),
        texts=document.examples("texts", at_least=FEWEST_TEXTS),
        source=source,
    )


def join_anchors(parts: Iterable[ModeAnchors]) -> Anchors:
    """The anchors of all modes.

    Raises:
        ConfigError: a mode has no file, a mode and genre have two, or a text stands in two files.
    """
    by_kind: dict[tuple[str, str], ModeAnchors] = {}
    for part in parts:
        other = by_kind.setdefault((part.mode, part.genre or ""), part)
        if other is not part:
            kind = " ".join(filter(None, (part.mode, part.genre)))
            raise ConfigError(f"{part.source}:1: {kind!r} has a file already, {other.source}; join the two")
    missing = [mode for mode in MODES if all(kind[0] != mode for kind in by_kind)]
    if missing:
        raise ConfigError(f"no anchor file has mode {', '.join(missing)}; every mode needs one")
    anchors = Anchors(tuple(by_kind[kind] for kind in sorted(by_kind)))
    refuse_duplicates(example for part in anchors.parts for example in part.texts)
    return anchors


def load_anchors(folder: Path = PACKAGED_ANCHORS) -> Anchors:
    """The anchors in the *.toml files of `folder`.

    Raises:
        ConfigError: a file is wrong or a mode has none; names file and line.
    """
    return join_anchors(parse_anchors(text, source) for text, source in read_documents(folder))


def load_requests(folder: Path = PACKAGED_REQUESTS) -> RequestAnchors:
    """The sentences in the *.toml files of `folder`: `asks_for`, `description` and `texts`.

    Raises:
        ConfigError: a file is wrong or a label has none or two; names file and line.
    """
    labels = (*MODES, NOTHING)
    by_label: dict[str, tuple[Example, ...]] = {}
    for text, source in read_documents(folder):
        document = Document(text, source)
        document.allow_keys(("asks_for", "description", "texts"))
        label = document.choice("asks_for", labels)
        document.string("description")
        if label in by_label:
            message = f"{label!r} has a file already, {by_label[label][0].source}; join the two"
            raise document.error(document.line_of("asks_for"), message)
        by_label[label] = document.examples("texts", at_least=FEWEST_REQUESTS)
    missing = [label for label in labels if label not in by_label]
    if missing:
        raise ConfigError(f"{folder}: no file has asks_for {', '.join(missing)}; every label needs one")
    refuse_duplicates(example for examples in by_label.values() for example in examples)
    return RequestAnchors(tuple((label, by_label[label]) for label in labels))
