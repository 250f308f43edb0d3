"""The report of a study: one self-contained page, and its figures as tables. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ash.domain.values import MODES
from ash.study.analysis import (
    CAUSE_REACH,
    TRIGGERS,
    ConditionSummary,
    SessionSummary,
    StudiedSession,
    StudyResult,
)
from ash.study.conclusions import conclusions
from ash.study.plots import intervals, ribbons
from ash.study.progress import StudyRecord
from ash.study.statistics import REPLICATES, Interval

INTERVALS = (
    *("per_hour", "per_100", "self_directed_per_100", "events_followed", "distinct_2"),
    *("repetition_of_earlier", "dispersion", "collapse", "persona_distance", "line_to_line"),
    *("within", "between"),
)
"""Attributes of a condition that are intervals."""

STYLE = Path(__file__).with_name("report.css")


def html_report(record: StudyRecord, result: StudyResult, sessions: Sequence[StudiedSession]) -> str:
    """The page. It loads nothing, and holds no text of the agent's: only what the plan says is quoted."""
    plan = result.plan
    missing = len(record.missing())
    done = f"{len(record.finished)} sessions" + (f", {missing} are still missing" if missing else "")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(plan.name)}</title><style>{STYLE.read_text()}</style></head><body>",
        f"<h1>{escape(plan.name)}</h1>",
        _note(f"{done}; {plan.turns} turns behind the opening in each; {', '.join(plan.conditions)}."),
        "<h2>What can be said</h2><ul>",
        *(f"<li>{escape(sentence)}</li>" for sentence in conclusions(result.conditions)),
        "</ul><h2>Modes over the answers</h2><figure class='scroll'>",
        ribbons(plan, sessions, result.shifts),
        f"<figcaption>{_legend(sessions)}</figcaption></figure>",
        "<h2>Shift rates</h2>",
        *_rates(result.conditions),
        "<h2>Conditions</h2>",
        _table(condition_rows(result.conditions)),
        "<h2>Modes: share of the answers</h2>",
        _table(_share_rows(result.conditions)),
        "<h2>Triggers: what the plan did, and what was attributed</h2>",
        _table(confusion_rows(result.conditions)),
        _note(
            f"By the plan a shift is caused by a cue that asks for its mode and came in within {CAUSE_REACH} "
            "answers before it, by the opening if it falls there, and else by nothing."
        ),
        "<h2>Persona, repetition, theme</h2>",
        _table(_behaviour_rows(result.conditions)),
        _note(
            "Cosine of sentence vectors; persona distance is 1 - prompt-to-line. Collapse is the dispersion "
            "of the first half of a session minus that of the second."
        ),
        "<h2>Sessions</h2>",
        _table(session_rows(result.sessions)),
        "<h2>To run it again</h2>",
        _provenance(record),
        "</body></html>",
    ]
    return "".join(parts)


def _rates(conditions: Sequence[ConditionSummary]) -> Iterable[str]:
    for attribute, title, unit in (
        ("per_100", "All shifts per 100 answers", "shifts per 100 answers"),
        ("self_directed_per_100", "Self-directed shifts per 100 answers", "shifts per 100 answers"),
        ("per_hour", "All shifts per hour", "shifts per hour of the session, at this machine's speed"),
    ):
        rows = [(each.condition, getattr(each, attribute)) for each in conditions]
        plot = intervals(rows, title, unit)
        yield f"<h3>{title}</h3><figure class='scroll'>{plot}</figure>"
    gaps = [
        (f"{each.condition} - {conditions[0].condition}"[:24], each.difference)
        for each in conditions
        if each.difference is not None
    ]
    if gaps:
        plot = intervals(gaps, "Difference of the rates", "shifts per 100 answers")
        yield f"<h3>Difference from {escape(conditions[0].condition)}</h3>"
        yield f"<figure class='scroll'>{plot}</figure>"
    yield _note(
        f"Dots are estimates, lines 95% percentile-bootstrap intervals over sessions ({REPLICATES} samples). "
        "`w`: widened to the limits of a Poisson count, for sessions that agree by chance claim too much."
    )


def _legend(sessions: Sequence[StudiedSession]) -> str:
    modes = "".join(f'<span class="key {mode}"></span>{mode}' for mode in (*MODES, "unobserved"))
    names = dict.fromkeys(
        turn.route.slice for session in sessions for turn in session.view.turns if turn.route is not None
    )
    return (
        f"{modes}<br>Upright line: a shift's onset, with its trigger (E external, S self-directed, "
        "U undetermined); the thin line below runs to the alarm. Triangle: a cue. Circle: a neutral remark. "
        f"The strip below is the slice: {escape(', '.join(sorted(names)) or 'none')}. "
        "Point at a mark for its details."
    )


def condition_rows(conditions: Sequence[ConditionSummary]) -> list[dict[str, Any]]:
    """One row a condition, as the report shows it."""
    return [
        {
            "condition": each.condition,
            "sessions": each.sessions,
            "answers": each.answers,
            "hours": _number(each.hours),
            "shifts": each.shifts,
            "per 100 answers": _interval(each.per_100),
            "self-directed per 100": _interval(each.self_directed_per_100),
            "per hour": _interval(each.per_hour),
            "delay (answers)": _number(each.delay),
            "events": each.events,
            "events followed": _interval(each.events_followed),
        }
        for each in conditions
    ]


def _share_rows(conditions: Sequence[ConditionSummary]) -> list[dict[str, Any]]:
    return [
        {"condition": each.condition, **{mode: _interval(each.shares[mode]) for mode in MODES}}
        for each in conditions
    ]


def confusion_rows(conditions: Sequence[ConditionSummary]) -> list[dict[str, Any]]:
    """One row a condition and cause, one column a trigger, counts of shifts."""
    return [
        {
            "condition": each.condition,
            "by the plan": cause,
            **{trigger: each.confusion.get((cause, trigger), 0) for trigger in TRIGGERS},
        }
        for each in conditions
        for cause in ("cue", "opening", "none")
    ]


def _behaviour_rows(conditions: Sequence[ConditionSummary]) -> list[dict[str, Any]]:
    return [
        {
            "condition": each.condition,
            "persona distance": _interval(each.persona_distance),
            "line to line": _interval(each.line_to_line),
            "within agents": _interval(each.within),
            "between agents": _interval(each.between),
            "distinct-2": _interval(each.distinct_2),
            "repeats earlier": _interval(each.repetition_of_earlier),
            "dispersion": _interval(each.dispersion),
            "collapse": _interval(each.collapse),
        }
        for each in conditions
    ]


def session_rows(sessions: Sequence[SessionSummary]) -> list[dict[str, Any]]:
    """One row a session, as the report shows it."""
    return [
        {
            "condition": each.condition,
            "seed": each.seed,
            "session": each.session_id,
            "answers": each.answers,
            "minutes": _number(each.hours * 60),
            "external": each.external,
            "self-directed": each.self_directed,
            "undetermined": each.undetermined,
            **{mode: _number(each.shares[mode]) for mode in MODES},
            "repeats earlier": _number(each.repetition_of_earlier),
        }
        for each in sessions
    ]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "<p>There are none.</p>"
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(str(value))}</td>' for value in row.values())}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _provenance(record: StudyRecord) -> str:
    origin = record.provenance
    rows = [
        {"what": "plan", "value": f"sha256 {record.plan_digest}"},
        {"what": "seeds", "value": ", ".join(map(str, record.plan.seeds))},
        {"what": "encoder", "value": origin.encoder},
        *(
            {"what": f"weights of {name}", "value": digest or "not on this machine"}
            for name, digest in origin.weights.items()
        ),
        *({"what": name, "value": value} for name, value in origin.versions.items()),
        *({"what": name, "value": str(value)} for name, value in origin.machine.items()),
    ]
    return _table(rows) + _note(
        "Plan, settings and session ids in full: study.json. Equal seeds give equal tokens only on the same "
        "machine, with the same batches."
    )


def _note(text: str) -> str:
    return f'<p class="faint">{escape(text)}</p>'


def _interval(interval: Interval) -> str:
    if math.isnan(interval.estimate):
        return "-"
    return f"{interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
