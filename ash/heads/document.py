"""TOML files of examples: read them with the line of every value, for errors that point at the place."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from ash.domain.errors import ConfigError

# A TOML string of any of the four kinds, or a comment (which may hold quotes that open nothing). Three quotes
# may close behind one or two more that belong to the text.
_STRING_OR_COMMENT = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*', re.DOTALL
)
_ERROR_LINE = re.compile(r"at line (\d+)")


class Example(Struct, frozen=True):
    """One text and the place it came from; `line` counts from 1."""

    text: str
    source: str
    line: int

    @property
    def identity(self) -> str:
        """The text without its case and spacing: two examples of the same identity are one twice."""
        return " ".join(self.text.casefold().split())


class Document:
    """One file of examples. Everything it complains about is a ConfigError that names file and line."""

    def __init__(self, text: str, source: str) -> None:
        """Parse `text`; `source` is the file's name in errors.

        Raises:
            ConfigError: not TOML.
        """
        self._source = source
        self._lines = text.splitlines()
        self._text = text
        try:
            self._values: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            found = _ERROR_LINE.search(str(error))
            line = int(found.group(1)) if found else len(self._lines)
            raise ConfigError(f"{source}:{line}: not TOML: {error}; see https://toml.io") from error

    def error(self, line: int, message: str) -> ConfigError:
        """An error about `line`, to be raised."""
        return ConfigError(f"{self._source}:{line}: {message}")

    def line_of(self, key: str) -> int:
        """The line that sets `key`; 1 where nothing does."""
        pattern = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=")
        return next((n for n, line in enumerate(self._lines, 1) if pattern.match(line)), 1)

    def has(self, key: str) -> bool:
        """True where the document sets `key`."""
        return key in self._values

    def allow_keys(self, known: Sequence[str]) -> None:
        """Refuse every key that is not in `known`."""
        for key in self._values:
            if key not in known:
                raise self.error(self.line_of(key), f"unknown key {key!r}{nearest(key, known)}")

    def string(self, key: str) -> str:
        """The text of `key`, which must be there and not empty."""
        value = self.optional_string(key)
        if value is None:
            raise self.error(1, f'{key!r} is missing; add a line such as {key} = "..."')
        return value

    def optional_string(self, key: str) -> str | None:
        """The text of `key`, not empty; None where it is not set."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip():
            raise self.error(self.line_of(key), f"{key!r} must be a text that is not empty")
        return value

    def choice(self, key: str, known: Sequence[str]) -> str:
        """The text of `key`, which must be one of `known`."""
        value = self.string(key)
        if value not in known:
            raise self.error(self.line_of(key), f"unknown {key} {value!r}{nearest(value, known)}")
        return value

    def examples(self, key: str, *, at_least: int) -> tuple[Example, ...]:
        """The list of texts under `key`, without repetitions, with at least `at_least` of them."""
        values = self._values.get(key)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.error(self.line_of(key), f'{key!r} must be a list of texts: {key} = ["...", ...]')
        lines = self._lines_of_strings(key, len(values))
        found = tuple(Example(text, self._source, line) for text, line in zip(values, lines, strict=True))
        for example in found:
            if not example.identity:
                raise self.error(example.line, f"an empty text in {key!r}; remove it")
        if len(found) < at_least:
            count = f"{len(found)} texts in {key!r}; at least {at_least} are needed"
            raise self.error(self.line_of(key), f"{count} for a head that can be trusted")
        refuse_duplicates(found)
        return found

    def _lines_of_strings(self, key: str, count: int) -> list[int]:
        """Lines on which the `count` strings of the list under `key` begin; tomllib does not keep them."""
        start = sum(len(line) for line in self._text.splitlines(keepends=True)[: self.line_of(key) - 1])
        start = self._text.index("=", start)
        tokens = (m for m in _STRING_OR_COMMENT.finditer(self._text, start) if not m.group().startswith("#"))
        starts = [match.start() for match, _ in zip(tokens, range(count), strict=False)]
        return [self._text.count("\n", 0, position) + 1 for position in starts]


def refuse_duplicates(examples: Iterable[Example]) -> None:
    """Refuse two examples that differ in case and spacing at most.

    Raises:
        ConfigError: names both places.
    """
    first: dict[str, Example] = {}
    for example in examples:
        earlier = first.setdefault(example.identity, example)
        if earlier is not example:
            raise ConfigError(
                f"{example.source}:{example.line}: {shortened(example.text)!r} stands already at "
                f"{earlier.source}:{earlier.line} (case and spacing aside); remove one of them"
            )


def shortened(text: str, length: int = 60) -> str:
    """The beginning of `text` on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def nearest(value: str, known: Sequence[str]) -> str:
    """The end of an error about `value`: the nearest known name, or all of them."""
    close = difflib.get_close_matches(value, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def read_documents(folder: Path) -> Iterator[tuple[str, str]]:
    """Text and name of every *.toml file of `folder`, in the order of their names.

    Raises:
        ConfigError: there is none, or one cannot be read as UTF-8.
    """
    paths = sorted(folder.glob("*.toml"))
    if not paths:
        raise ConfigError(f"{folder}: holds no *.toml files; give at least one for each label")
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}:1: cannot be read as UTF-8 text: {error}") from error
