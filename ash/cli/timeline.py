"""`ash log SESSION --timeline`: a session at a glance. Pure; the console decides on width and colour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from ash.cli.render import clock_time
from ash.study.episodes import episodes
from ash.study.tables import onset_message, shift_of
from ash.study.transcript import Message, SessionView, ShiftFact, Turn

MARKS = {"analytic": "A", "creative": "C", "conversational": "v"}
"""One character for each mode: the ribbon can be read without colour."""

STYLES = {"analytic": "blue", "creative": "magenta", "conversational": "green"}
UNOBSERVED = "."

NARROW = 60
"""Columns below which the text of the turns is left out."""


def timeline(view: SessionView, width: int) -> RenderableType:
    """Head line, ribbon, and one line a turn with time, origin, mode, slice and what happened."""
    if not view.turns:
        return Text(f"{view.session_id}: no turns")
    parts: list[RenderableType] = [_head(view), ribbon(view), _legend(view), Text()]
    return Group(*parts, *_turns(view, width))


def ribbon(view: SessionView) -> Text:
    """One character an answer in its mode; `|` stands before the first answer of a shift's new mode."""
    text = Text(overflow="fold")
    for episode in episodes(view):
        if episode.shift is not None:
            text.append("|", style="bold")
        for answer in episode.answers:
            text.append(*_mark(answer))
    return text


def _mark(answer: Message) -> tuple[str, str]:
    reading = answer.reading
    if reading is None or not reading.observed:
        return UNOBSERVED, "dim"
    return MARKS.get(reading.mode, "?"), STYLES.get(reading.mode, "")


def _head(view: SessionView) -> Text:
    triggers = Counter(shift.value.trigger for shift in view.shifts)
    shifts = ", ".join(f"{count} {trigger}" for trigger, count in triggers.items())
    text = Text(f"{view.title or view.session_id}: {len(view.turns)} turns, shifts: {len(view.shifts)}")
    if shifts:
        text.append(f" ({shifts})")
    if view.gaps:
        text.append(f", {view.gaps} events missing", style="yellow")
    return text


def _legend(view: SessionView) -> Text:
    text = Text(style="dim")
    seen = {answer.reading.mode for answer in view.answers if answer.reading is not None}
    text.append("  ".join(f"{mark} {mode}" for mode, mark in MARKS.items() if mode in seen))
    return text


def _turns(view: SessionView, width: int) -> Iterator[Text]:
    by_id = {message.message_id: message for message in view.messages}
    slices = [turn.route.slice if turn.route is not None else "-" for turn in view.turns]
    room = max(map(len, slices))
    wide = width >= NARROW
    before = ""
    for turn, slice_name in zip(view.turns, slices, strict=True):
        answers = [by_id[message_id] for message_id in turn.answers]
        line = Text(f"{clock_time(turn.ts)} {turn.origin or '?':<8} ")
        line.append(*(_mark(answers[-1]) if answers else (UNOBSERVED, "dim")))
        # A route is news only where it changes.
        line.append(f" {slice_name if slice_name != before else '':<{room}} ")
        before = slice_name
        if wide:
            line.append_text(_said(turn, answers, by_id))
        yield _cut(line, width)
        shift = shift_of(view, answers)
        if shift is not None:
            note = Text(f"{'| ':>{len('00:00:00 schedule x')}}", style="bold")
            yield _cut(note.append_text(_shift(view, shift, wide=wide)), width)


def _cut(line: Text, width: int) -> Text:
    line.rstrip()
    line.truncate(width, overflow="ellipsis")
    return line


def _said(turn: Turn, answers: list[Message], by_id: dict[str, Message]) -> Text:
    if turn.error is not None:
        return Text(f"failed: {turn.error}", style="red")
    if answers:
        return Text(" ".join(answers[-1].text.split()) or "(empty)")
    if turn.tools:
        return Text(f"{len(turn.tools)} tool calls", style="dim")
    inputs = [by_id[message_id].text for message_id in turn.inputs if message_id in by_id]
    return Text(f"({turn.outcome}) {' '.join(' '.join(inputs).split())}", style="dim")


def _shift(view: SessionView, shift: ShiftFact, *, wide: bool) -> Text:
    to = " ".join(filter(None, (shift.value.to, shift.value.genre)))
    if not wide:
        return Text(f"{shift.value.trigger}: {to}", style="bold")
    onset = onset_message(view, shift)
    since = f" since {clock_time(onset.ts)}" if onset is not None else ""
    return Text(f"shift {shift.value.from_} -> {to}{since}, {shift.value.trigger}", style="bold")
