"""Compaction alone: what a compacted row gives back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ash.domain.events import Origin, Record, TextMessageContent
from ash.store.compaction import COMPACTED_TEXT, LogRow, StoredRow, compact, expand

parts = st.lists(
    st.tuples(st.integers(1, 5), st.integers(0, 9), st.text(max_size=8)), min_size=2, max_size=20
)


def deltas(cut: list[tuple[int, int, str]], run_id: str | None, origin: Origin | None) -> list[Record]:
    seq, ts, records = 0, 1_000, []
    for step, wait, text in cut:
        seq, ts = seq + step, ts + wait
        records.append(Record("s", seq, ts, run_id, origin, TextMessageContent("m", text)))
    return records


def log_row(row: StoredRow) -> LogRow:
    return row.seq, row.ts, row.run_id, row.origin, row.type, row.first_seq, row.body


@given(parts, st.none() | st.text(max_size=3), st.none() | st.sampled_from(Origin), st.integers(0, 100))
def test_a_compacted_row_gives_back_its_records(
    cut: list[tuple[int, int, str]], run_id: str | None, origin: Origin | None, after_seq: int
) -> None:
    records = deltas(cut, run_id, origin)
    row = compact(records)
    assert row is not None
    assert (row.type, row.first_seq, row.seq) == (COMPACTED_TEXT, records[0].seq, records[-1].seq)
    expected = [record for record in records if record.seq > after_seq]
    assert expand("s", [log_row(row)], after_seq, None) == expected
    assert expand("s", [log_row(row)], after_seq, 2) == expected[:2]


@given(parts)
def test_deltas_that_one_row_cannot_give_back_stay_as_they_are(cut: list[tuple[int, int, str]]) -> None:
    one_run = deltas(cut, "r1", Origin.USER)
    assert compact(one_run[:1]) is None
    assert compact([]) is None
    assert compact([*one_run[:-1], deltas(cut, "r2", Origin.USER)[-1]]) is None
    assert compact([*one_run[:-1], deltas(cut, "r1", Origin.RESUME)[-1]]) is None
