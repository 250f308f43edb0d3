"""A short series of benchmarks/worker_kills.py: workers die under load, runs end, the log is sound."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.worker_kills import series

pytestmark = [pytest.mark.slices, pytest.mark.slow, pytest.mark.timeout(600)]

SEED = 7


async def test_five_killed_workers_leave_no_session_stuck_and_nothing_twice_in_the_log(
    tmp_path: Path,
) -> None:
    outcome = await series(tmp_path / "data", kills=5, sessions=2, seed=SEED)
    assert outcome.wrong == [], f"seed {SEED}"
    assert outcome.blows.total() == 5
    assert outcome.crashes["crashed"] + outcome.crashes["fell back"] > 0, (
        "the kills hit workers that had runs"
    )
    assert outcome.answered >= 2, "every session answers once the killing is over"
