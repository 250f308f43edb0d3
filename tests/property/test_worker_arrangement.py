"""Moves bring the decoding sequences together, and as few of them move as can."""

from hypothesis import given
from hypothesis import strategies as st

from ash.slices.worker.arrangement import next_move


@given(
    st.integers(1, 24).flatmap(lambda slots: st.tuples(st.sets(st.integers(0, slots - 1)), st.just(slots)))
)
def test_moves_end_in_one_run(case: tuple[set[int], int]) -> None:
    active, slots = case
    count = len(active)
    apart = min(
        (
            sum(slot not in range(first, first + count) for slot in active)
            for first in range(slots - count + 1)
        ),
        default=0,
    )
    moves = 0
    while (move := next_move(active, slots)) is not None:
        source, target = move
        assert source in active
        assert target not in active
        assert 0 <= target < slots
        active = active - {source} | {target}
        moves += 1
    assert moves == apart
    assert len(active) == count
    assert not active or max(active) - min(active) + 1 == count
