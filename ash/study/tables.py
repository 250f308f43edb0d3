"""One row a turn, as CSV and as Parquet."""

from __future__ import annotations

import csv
import datetime as dt
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ash.domain.errors import StudyError
from ash.domain.values import MODES
from ash.study.transcript import Message, SessionView, ShiftFact, Turn

TURN_COLUMNS: dict[str, type] = {
    "session_id": str,
    "title": str,
    "turn": int,
    "run_id": str,
    "origin": str,
    "started": str,
    "ended": str,
    "outcome": str,
    "error": str,
    "input_ids": str,
    "input": str,
    "answer_ids": str,
    "answer": str,
    "tools": str,
    "slice": str,
    "intent": str,
    "switched": bool,
    "route_reason": str,
    "mode": str,
    "genre": str,
    **{f"p_{mode}": float for mode in MODES},
    **{f"raw_{mode}": float for mode in MODES},
    "mode_observed": bool,
    "shift_from": str,
    "shift_to": str,
    "shift_trigger": str,
    "shift_onset_message": str,
    "shift_evidence": str,
    "input_tokens": int,
    "cached_tokens": int,
    "output_tokens": int,
    "ttft_ms": float,
    "total_ms": float,
    "tokens_per_second": float,
    "stop_reason": str,
}
"""Columns of a row and their types; any value may be missing. Times are ISO 8601 in UTC, ids are joined by
spaces, texts by a blank line. `p_*` is the filter's probability of a mode, `raw_*` the head's.
"""


def iso_time(ts: int) -> str:
    """ISO 8601 in UTC with milliseconds, of `ts` milliseconds since the Unix epoch."""
    return dt.datetime.fromtimestamp(ts / 1000, tz=dt.UTC).isoformat(timespec="milliseconds")


def turn_rows(view: SessionView) -> list[dict[str, Any]]:
    """The turns of a session as rows of TURN_COLUMNS; none for an empty session."""
    by_id = {message.message_id: message for message in view.messages}
    names = {tool.tool_call_id: tool.name for tool in view.tools}
    return [
        _row(view, number, turn, by_id, [names[call] for call in turn.tools])
        for number, turn in enumerate(view.turns, start=1)
    ]


def _row(
    view: SessionView, number: int, turn: Turn, by_id: dict[str, Message], tools: Sequence[str]
) -> dict[str, Any]:
    inputs = [by_id[message_id] for message_id in turn.inputs]
    answers = [by_id[message_id] for message_id in turn.answers]
    row: dict[str, Any] = dict.fromkeys(TURN_COLUMNS)
    row |= {
        "session_id": view.session_id,
        "title": view.title,
        "turn": number,
        "run_id": turn.run_id,
        "origin": turn.origin,
        "started": iso_time(turn.ts),
        "ended": iso_time(turn.end_ts),
        "outcome": turn.outcome,
        "error": turn.error,
        "input_ids": " ".join(turn.inputs),
        "input": "\n\n".join(message.text for message in inputs),
        "answer_ids": " ".join(turn.answers),
        "answer": "\n\n".join(message.text for message in answers),
        "tools": " ".join(tools),
    }
    if turn.route is not None:
        row |= {
            "slice": turn.route.slice,
            "intent": turn.route.intent,
            "switched": turn.route.switched,
            "route_reason": turn.route.reason,
        }
    row |= _mode_cells(answers) | _shift_cells(view, turn, answers) | _cost_cells(turn)
    return row


def _mode_cells(answers: Sequence[Message]) -> dict[str, Any]:
    readings = [message.reading for message in answers if message.reading is not None]
    if not readings:
        return {}
    last = readings[-1]
    raw = last.raw or {}
    return {
        "mode": last.mode,
        "genre": last.genre,
        "mode_observed": last.observed,
        **{f"p_{mode}": last.probabilities.get(mode) for mode in MODES},
        **{f"raw_{mode}": raw.get(mode) for mode in MODES},
    }


def shift_of(view: SessionView, answers: Iterable[Message]) -> ShiftFact | None:
    """The shift whose alarm one of `answers` raised."""
    seqs = {message.seq for message in answers}
    return next((shift for shift in view.shifts if shift.value.alarm_seq in seqs), None)


def onset_message(view: SessionView, shift: ShiftFact) -> Message | None:
    """The first message in the new mode."""
    return next((message for message in view.answers if message.seq == shift.value.onset_seq), None)


def _shift_cells(view: SessionView, turn: Turn, answers: Sequence[Message]) -> dict[str, Any]:
    shift = shift_of(view, answers)
    if shift is None:
        return {}
    onset = onset_message(view, shift)
    cited = {message.seq: message.message_id for message in view.messages}
    return {
        "shift_from": shift.value.from_,
        "shift_to": shift.value.to,
        "shift_trigger": shift.value.trigger,
        "shift_onset_message": None if onset is None else onset.message_id,
        "shift_evidence": " ".join(cited.get(seq, f"seq:{seq}") for seq in shift.value.evidence),
    }


def _cost_cells(turn: Turn) -> dict[str, Any]:
    usage, metadata = turn.usage, turn.metadata
    cells: dict[str, Any] = {
        "ttft_ms": metadata.get("ttftMs"),
        "total_ms": metadata.get("totalMs"),
        "tokens_per_second": metadata.get("tokensPerSecond"),
        "stop_reason": metadata.get("stopReason"),
    }
    if usage is not None:
        cells |= {
            "input_tokens": usage.input_tokens,
            "cached_tokens": usage.cached_input_tokens,
            "output_tokens": usage.output_tokens,
        }
    return cells


def csv_text(rows: Sequence[dict[str, Any]], columns: Iterable[str]) -> str:
    """The rows with a header line (RFC 4180); a missing value is an empty cell, and so is NaN."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(columns))
    writer.writeheader()
    writer.writerows({name: "" if _is_nan(value) else value for name, value in row.items()} for row in rows)
    return text.getvalue()


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def write_parquet(rows: Sequence[dict[str, Any]], columns: dict[str, type], path: Path) -> None:
    """The rows as a Parquet file with a typed column each; a missing value is null.

    Raises:
        StudyError: pyarrow is not installed.
    """
    try:
        # 170 MB that only this format needs: the optional extra `study`.
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise StudyError("Parquet needs pyarrow; install it: pip install 'ash-runtime[study]'") from error
    types = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    parquet.write_table(pa.Table.from_pylist([_typed(row, columns) for row in rows], schema), path)


def _typed(row: dict[str, Any], columns: dict[str, type]) -> dict[str, Any]:
    """Whole numbers where a fraction is expected become one; everything else stands as it is."""
    return {
        name: float(row[name]) if kind is float and row.get(name) is not None else row.get(name)
        for name, kind in columns.items()
    }
