"""What may be said of a study's figures, in sentences that say no more than their intervals do. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ash.study.analysis import ConditionSummary


def conclusions(conditions: Sequence[ConditionSummary]) -> list[str]:
    """Self-directed shifts of every condition, differences from the first one, errors of the attribution."""
    said = [_self_directed(each) for each in conditions]
    said += [
        _difference(each, conditions[0].condition)
        for each in conditions
        if each.difference is not None and not math.isnan(each.difference.estimate)
    ]
    total = sum(each.shifts for each in conditions)
    if total:
        said.append(
            f"The trigger that was attributed disagrees with the plan in {disagreements(conditions)} of "
            f"{total} shifts; rates of self-directed shifts carry that error too."
        )
    return said


def _self_directed(each: ConditionSummary) -> str:
    interval = each.self_directed_per_100
    if math.isnan(interval.estimate):
        return f"{each.condition}: no answers, so nothing can be said."
    over = f"{each.answers} answers of {each.sessions} sessions"
    if interval.estimate == 0:
        return (
            f"{each.condition}: no self-directed shift in {over}. That does not show that there are none: "
            f"up to {interval.high:.2f} per 100 answers would be compatible with it (95%)."
        )
    return (
        f"{each.condition}: {interval.estimate:.2f} self-directed shifts per 100 answers, 95% interval "
        f"{interval.low:.2f} to {interval.high:.2f} over {over}; false alarms of the detector are among them."
    )


def _difference(each: ConditionSummary, first: str) -> str:
    gap = each.difference
    assert gap is not None
    verdict = "does not tell" if gap.low <= 0 <= gap.high else "tells"
    return (
        f"All shifts, {each.condition} minus {first}: {gap.estimate:+.2f} per 100 answers, 95% interval "
        f"{gap.low:.2f} to {gap.high:.2f}; the study {verdict} the two apart."
    )


def disagreements(conditions: Sequence[ConditionSummary]) -> int:
    """Shifts behind a cue that were not called external, and shifts behind nothing that were."""
    return sum(
        count
        for each in conditions
        for (cause, trigger), count in each.confusion.items()
        if (cause, trigger) in {("cue", "self_directed"), ("none", "external")}
    )
