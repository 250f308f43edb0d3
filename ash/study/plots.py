"""Plots of a report as SVG: the ribbon of every session, and rates with their intervals. Pure.

Colours are CSS variables of the page, so that light and dark are decided there; the three modes are those of
Okabe and Ito (Color universal design, 2008), which people with a colour vision deficiency tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from ash.study.analysis import FoundShift, StudiedSession, events_of
from ash.study.plan import Plan, Step
from ash.study.statistics import Interval
from ash.study.tables import iso_time
from ash.study.transcript import Message

CELL = 18
ROW = 34
LABEL = 130
BAR = 14


def ribbons(plan: Plan, sessions: Sequence[StudiedSession], shifts: Sequence[FoundShift]) -> str:
    """One row a session, one cell an answer: events above it, its mode, the slice below, shifts across.

    Every mark has a title that a pointer shows and a screen reader says.
    """
    longest = max((len(session.view.answers) for session in sessions), default=0)
    width, height = LABEL + longest * CELL + 20, len(sessions) * ROW + 30
    parts = [_open(width, height, "Modes of every session over its answers")]
    slices = sorted({name for session in sessions for name in _slices(session) if name})
    for row, session in enumerate(sessions):
        top = row * ROW + 24
        parts.append(_text(0, top + BAR - 3, f"{session.condition} {session.seed}", "label"))
        routes = _slices(session)
        for number, answer in enumerate(session.view.answers):
            x = LABEL + number * CELL
            parts.append(_cell(x, top, answer, number))
            if routes[number]:
                place = slices.index(routes[number])
                parts.append(
                    f'<rect x="{x}" y="{top + BAR + 2}" width="{CELL - 2}" height="3" '
                    f'class="slice{place % 3}"><title>{escape(routes[number])}</title></rect>'
                )
        parts += [_event(step, place, top) for place, step in events_of(plan, session)]
        parts += [_shift(shift, top) for shift in shifts if shift.session_id == session.view.session_id]
    for number in range(0, longest, 5):
        parts.append(_text(LABEL + number * CELL + CELL / 2 - 1, 10, str(number), "tick"))
    return "".join([*parts, "</svg>"])


def _slices(session: StudiedSession) -> list[str]:
    """The slice of every answer; empty where no route is in the log."""
    routes = {turn.run_id: turn.route.slice for turn in session.view.turns if turn.route is not None}
    return [routes.get(answer.run_id or "", "") for answer in session.view.answers]


def _cell(x: int, top: int, answer: Message, number: int) -> str:
    reading = answer.reading
    if reading is None or not reading.observed:
        kind, says = "unobserved", "not observed"
    else:
        kind = reading.mode
        says = f"{reading.mode} {reading.probabilities.get(reading.mode, math.nan):.2f} {reading.genre or ''}"
    title = escape(f"answer {number}, {iso_time(answer.ts)}, {answer.message_id}: {says}")
    return (
        f'<rect x="{x}" y="{top}" width="{CELL - 2}" height="{BAR}" class="{escape(kind)}">'
        f"<title>{title}</title></rect>"
    )


def _event(step: Step, place: int, top: int) -> str:
    x = LABEL + place * CELL + CELL // 2 - 1
    title = f"<title>{escape(f'{step.kind} before answer {place}: {step.text}')}</title>"
    if step.kind == "cue":
        return f'<path d="M{x - 4},{top - 8} h8 l-4,6 z" class="cue">{title}</path>'
    return f'<circle cx="{x}" cy="{top - 5}" r="3" class="remark">{title}</circle>'


def _shift(shift: FoundShift, top: int) -> str:
    """A line where the new mode began, its trigger's letter at the foot, a thin line to the alarm."""
    x, end = LABEL + shift.onset_answer * CELL - 1, LABEL + shift.alarm_answer * CELL + CELL / 2 - 1
    title = escape(
        f"shift {shift.from_mode} to {shift.to_mode}, onset {shift.onset_message}, alarm {shift.delay} "
        f"answers later; trigger {shift.trigger}; by the plan: {shift.cause}"
    )
    return (
        f"<g><title>{title}</title>"
        f'<line x1="{x}" x2="{x}" y1="{top - 4}" y2="{top + BAR + 6}" class="shift"/>'
        f'<line x1="{x}" x2="{end}" y1="{top + BAR + 7}" y2="{top + BAR + 7}" class="alarm"/>'
        f'<text x="{x + 3}" y="{top + BAR - 3}" class="trigger">{shift.trigger[0].upper()}</text></g>'
    )


def intervals(rows: Sequence[tuple[str, Interval]], title: str, unit: str) -> str:
    """A dot and a line from low to high for each row; the numbers stand beside them."""
    known = [interval.high for _, interval in rows if not math.isnan(interval.estimate)]
    low = min([0.0, *(interval.low for _, interval in rows if not math.isnan(interval.estimate))])
    high = max([*known, low + 1e-9])
    scale = 380 / (high - low)
    parts = [_open(760, len(rows) * 28 + 40, title)]
    zero = LABEL - low * scale
    parts.append(f'<line x1="{zero:.1f}" x2="{zero:.1f}" y1="4" y2="{len(rows) * 28 + 8}" class="axis"/>')
    for number, (name, interval) in enumerate(rows):
        y = number * 28 + 18
        parts.append(_text(0, y + 4, name, "label"))
        if math.isnan(interval.estimate):
            parts.append(_text(LABEL, y + 4, "nothing to estimate from", "label"))
            continue
        start, dot, end = (
            LABEL + (value - low) * scale for value in (interval.low, interval.estimate, interval.high)
        )
        parts.append(f'<line x1="{start:.1f}" x2="{end:.1f}" y1="{y}" y2="{y}" class="interval"/>')
        parts.append(f'<circle cx="{dot:.1f}" cy="{y}" r="4.5" class="estimate"/>')
        note = f"{interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f})"
        if interval.method == "widened":
            note += " w"
        parts.append(_text(LABEL + 395, y + 4, note, "label"))
    parts += [
        _text(LABEL + (value - low) * scale, len(rows) * 28 + 22, f"{value:.3g}", "tick")
        for value in (low, (low + high) / 2, high)
    ]
    parts.append(_text(LABEL + 190, len(rows) * 28 + 36, unit, "tick"))
    return "".join([*parts, "</svg>"])


def _open(width: float, height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">'
    )


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(text)}</text>'
