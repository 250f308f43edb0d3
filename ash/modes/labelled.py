"""Texts and streams with known modes, one JSON object a line: what the observer is judged on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from ash.domain.errors import ConfigError
from ash.domain.values import MODES

Mode = Literal["analytic", "creative", "conversational"]
T = TypeVar("T")


class LabelledText(Struct, frozen=True):
    """One text. `genre` where it is creative and of a known kind; `source` names the collection."""

    text: str
    mode: Mode
    genre: str | None = None
    source: str = ""

    @property
    def hard(self) -> bool:
        """The collection crosses topic and purpose: its name says `hard`."""
        return "hard" in self.source.casefold()


class Turn(Struct, frozen=True):
    """A line of a stream. `mode` of the agent's only; `noise`: one message off the mode that is no shift."""

    role: Literal["agent", "user"]
    text: str
    mode: Mode | None = None
    genre: str | None = None
    noise: bool = False


class Switch(Struct, frozen=True):
    """A true shift: `turn` is the index of the first agent turn in the mode `to`."""

    turn: int
    from_: Mode = msgspec.field(name="from")
    to: Mode
    trigger: Literal["external", "self"]


class Stream(Struct, frozen=True):
    """A session with its true shifts, in the order of their turns."""

    id: str
    turns: tuple[Turn, ...]
    switches: tuple[Switch, ...]
    start_mode: Mode | None = None


def read_texts(lines: Iterable[str], source: str) -> list[LabelledText]:
    """One LabelledText a line; blank lines are skipped, further fields ignored.

    Raises:
        ConfigError: a line is malformed; names file and line.
    """
    return list(_rows(lines, source, LabelledText))


def read_streams(lines: Iterable[str], source: str) -> list[Stream]:
    """One Stream a line; blank lines are skipped, further fields ignored.

    Raises:
        ConfigError: a line is malformed, or a switch points at no agent turn; names file and line.
    """
    return list(_rows(lines, source, Stream))


def _rows(lines: Iterable[str], source: str, kind: type[T]) -> Iterator[T]:
    found = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = True
        try:
            row = msgspec.json.decode(line, type=kind)
        except (msgspec.DecodeError, UnicodeEncodeError) as error:
            raise ConfigError(f"{source}:{number}: {error}; {_wanted(kind)}") from error
        problem = _problem(row)
        if problem:
            raise ConfigError(f"{source}:{number}: {problem}")
        yield row
    if not found:
        raise ConfigError(f"{source}:1: holds no rows; {_wanted(kind)}")


def _wanted(kind: type[Any]) -> str:
    if kind is Stream:
        return (
            "want id, turns [{role, text, mode, noise?}] and switches [{turn, from, to, trigger}] in a line"
        )
    return f"want text, mode ({', '.join(MODES)}) and, if known, genre and source in a line"


def _problem(row: object) -> str | None:
    """What a row of the right form has wrong in itself."""
    if not isinstance(row, Stream):
        return None
    for number, turn in enumerate(row.turns):
        if turn.role == "agent" and turn.mode is None:
            return f"turn {number} is the agent's and has no mode; give one of {', '.join(MODES)}"
    before = -1
    for switch in row.switches:
        if not 0 <= switch.turn < len(row.turns) or row.turns[switch.turn].role != "agent":
            return (
                f"the switch at turn {switch.turn} points at no agent turn; the stream has {len(row.turns)}"
            )
        if switch.turn <= before:
            return f"the switch at turn {switch.turn} follows one at {before}; give them in order, each once"
        if row.turns[switch.turn].mode != switch.to:
            return f"the switch at turn {switch.turn} goes to {switch.to}, but that turn has another mode"
        before = switch.turn
    return None
