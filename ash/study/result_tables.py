"""The figures of a study as flat rows for CSV and Parquet. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ash.domain.values import MODES
from ash.study.analysis import ConditionSummary, FoundShift, SessionSummary
from ash.study.report import INTERVALS
from ash.study.statistics import Interval

SHIFT_COLUMNS: dict[str, type] = {
    **dict.fromkeys(("condition", "session_id", "onset_message", "from_mode", "to_mode"), str),
    **dict.fromkeys(("genre", "trigger", "cause"), str),
    **dict.fromkeys(("seed", "onset_answer", "alarm_answer", "delay"), int),
    "after_event": bool,
}
"""Columns of `shifts_table`, which may have no row to take them from."""


def conditions_table(conditions: Sequence[ConditionSummary]) -> list[dict[str, Any]]:
    """One row a condition; an interval is three columns: the estimate, `_low` and `_high`."""
    return [
        {
            "condition": each.condition,
            "sessions": each.sessions,
            "answers": each.answers,
            "hours": each.hours,
            "shifts": each.shifts,
            "events": each.events,
            "delay": each.delay,
            **{
                column: value
                for name in INTERVALS
                for column, value in _columns(name, getattr(each, name)).items()
            },
            **{
                column: value
                for mode in MODES
                for column, value in _columns(f"share_{mode}", each.shares[mode]).items()
            },
        }
        for each in conditions
    ]


def _columns(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}


def sessions_table(sessions: Sequence[SessionSummary]) -> list[dict[str, Any]]:
    """One row a session."""
    rows = []
    for each in sessions:
        row = msgspec.structs.asdict(each)
        shares, persona = row.pop("shares"), row.pop("persona")
        row |= {f"share_{mode}": shares[mode] for mode in MODES}
        names = ("prompt_to_line", "line_to_line", "within", "between")
        row |= {name: None if persona is None else getattr(persona, name) for name in names}
        rows.append(row)
    return rows


def shifts_table(shifts: Sequence[FoundShift]) -> list[dict[str, Any]]:
    """One row a shift."""
    return [{**msgspec.structs.asdict(shift), "delay": shift.delay} for shift in shifts]


def column_types(rows: Sequence[dict[str, Any]]) -> dict[str, type]:
    """The type of every column, from its first value that is known; text where none is."""
    types: dict[str, type] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                types.setdefault(name, type(value))
    return {name: types.get(name, str) for row in rows[:1] for name in row}
