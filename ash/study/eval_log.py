"""Sessions as an Inspect AI `.eval` file: a session is a sample, an episode in one mode is a span.

Shifts are info events, measures are scores, message ids are those of the log. inspect-ai is the optional
extra `inspect`; only this module knows it, and it is imported when a file is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ash import __version__
from ash.domain.errors import StudyError
from ash.study.eval_events import SampleEvents
from ash.study.eval_messages import chat, model_usage, output
from ash.study.measures import average, session_measures
from ash.study.tables import iso_time
from ash.study.transcript import SessionView

SCORER = "ash"
"""Name under which Inspect shows the measures."""


def write_eval(views: Sequence[SessionView], path: Path) -> None:
    """Write the sessions as the samples of one log; `path` ends in `.eval`.

    Raises:
        StudyError: inspect-ai is not installed, or there are no sessions.
    """
    if not views:
        raise StudyError("there are no sessions to export; name one or more")
    try:
        # Half a hundred packages that only this format needs: the optional extra `inspect`.
        log = import_module("inspect_ai.log")
    except ImportError as error:
        raise StudyError(
            "the format inspect needs inspect-ai; install it: pip install 'ash-runtime[inspect]'"
        ) from error
    log.write_eval_log(log.EvalLog.model_validate(eval_log(views)), str(path), format="eval")


def eval_log(views: Sequence[SessionView]) -> dict[str, Any]:
    """The log as the plain values of inspect-ai's EvalLog, version 2 of its format."""
    measures = {view.session_id: session_measures(view) for view in views}
    started = min((view.first_ts for view in views if view.first_ts), default=0)
    ended = max(view.last_ts for view in views)
    slices = list(dict.fromkeys(turn.route.slice for view in views for turn in view.turns if turn.route))
    names = [view.session_id for view in views]
    return {
        "version": 2,
        "status": "success",
        "eval": {
            "eval_id": names[0],
            "run_id": names[0],
            "created": iso_time(started),
            "task": "ash",
            "task_id": names[0],
            "dataset": {"name": "ash sessions", "samples": len(views), "sample_ids": names},
            "model": f"ash/{'+'.join(slices) or 'none'}",
            "config": {},
            "packages": {"ash-runtime": __version__},
        },
        "results": {
            "total_samples": len(views),
            "completed_samples": len(views),
            "scores": _results(list(measures.values())),
        },
        "stats": {"started_at": iso_time(started), "completed_at": iso_time(ended)},
        "samples": [_sample(view, measures[view.session_id]) for view in views],
    }


def _results(measures: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Means over the sessions of every measure that at least one of them has."""
    names = dict.fromkeys(name for each in measures for name in each)
    means = {name: average([each.get(name, math.nan) for each in measures]) for name in names}
    return [
        {"name": name, "scorer": SCORER, "metrics": {"mean": {"name": "mean", "value": value}}}
        for name, value in means.items()
        if not math.isnan(value)
    ]


def _sample(view: SessionView, measures: Mapping[str, float]) -> dict[str, Any]:
    entries = chat(view)
    answers = [entry for entry in entries if entry.generated]
    seconds = (view.last_ts - view.first_ts) / 1000
    return {
        "id": view.session_id,
        "epoch": 1,
        # Inspect shows this as the sample's title; without an input there is only the session's own.
        "input": view.inputs[0].text if view.inputs else view.title,
        "target": "",
        "messages": [entry.message for entry in entries],
        "output": output(answers[-1], None) if answers else {},
        "scores": {name: {"value": value} for name, value in measures.items() if not math.isnan(value)},
        "metadata": {
            "title": view.title,
            "owner": view.owner,
            "persona": view.persona,
            "pinned_slice": view.pinned_slice,
            "gaps": view.gaps,
            "unreadable": list(view.unreadable),
        },
        "events": SampleEvents(view, entries).build(),
        "model_usage": _usage_by_model(view),
        "started_at": iso_time(view.first_ts),
        "completed_at": iso_time(view.last_ts),
        "total_time": seconds,
        "working_time": sum(turn.end_ts - turn.ts for turn in view.turns) / 1000,
        "uuid": view.session_id,
    }


def _usage_by_model(view: SessionView) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for turn in view.turns:
        if turn.usage is not None:
            total = found.setdefault(turn.usage.model or "none", dict.fromkeys(model_usage(turn.usage), 0))
            for key, value in model_usage(turn.usage).items():
                total[key] += value
    return found
