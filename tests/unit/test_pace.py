"""Prompt tokens of a step, from what earlier steps took."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash.slices.worker.pace import Pace


def run(pace: Pace, steps: int, *, decode_s: float, token_s: float) -> None:
    """Steps with prompts enough to fill them, beside others."""
    for _ in range(steps):
        tokens = pace.allowance(waited_s=0.0).beside
        pace.observe(decoding=4, prefilled=tokens, seconds=decode_s + tokens * token_s)


@pytest.mark.parametrize(
    ("decode_s", "token_s", "tokens"), [(0.05, 0.002, 100), (0.0, 0.005, 50), (0.2, 0.001, 50)]
)
def test_a_step_beside_others_takes_half_of_the_stall(decode_s: float, token_s: float, tokens: int) -> None:
    pace = Pace(stall_s=0.5, batch=512)
    run(pace, 60, decode_s=decode_s, token_s=token_s)
    assert abs(pace.allowance(waited_s=0.0).beside - tokens) <= 2


def test_prompts_alone_may_take_what_is_left_of_the_stall() -> None:
    pace = Pace(stall_s=0.5, batch=512)
    for _ in range(60):
        pace.observe(decoding=0, prefilled=100, seconds=0.4)
    assert abs(pace.allowance(waited_s=0.0).alone - 125) <= 1
    assert abs(pace.allowance(waited_s=0.4).alone - 25) <= 1
    assert pace.allowance(waited_s=0.6).alone == 0


def test_no_step_that_takes_half_of_the_stall_begins_in_its_second_half() -> None:
    pace = Pace(stall_s=0.5, batch=512)
    assert pace.allowance(waited_s=0.2).beside > 0
    assert pace.allowance(waited_s=0.3).beside == 0


def test_prompts_go_on_where_decoding_alone_takes_longer() -> None:
    pace = Pace(stall_s=0.25, batch=512)
    run(pace, 20, decode_s=0.9, token_s=0.01)
    assert pace.allowance(waited_s=0.0).beside == 16


def test_one_slow_step_is_made_up_for_at_once() -> None:
    pace = Pace(stall_s=0.5, batch=512)
    run(pace, 60, decode_s=0.05, token_s=0.002)
    pace.observe(decoding=4, prefilled=100, seconds=3.0)
    assert abs(pace.allowance(waited_s=0.0).beside - 50) <= 1
    run(pace, 4, decode_s=0.05, token_s=0.002)
    assert pace.allowance(waited_s=0.0).beside >= 90


def test_a_step_that_was_not_full_teaches_nothing_unless_it_was_slow() -> None:
    pace = Pace(stall_s=0.5, batch=512)
    run(pace, 60, decode_s=0.05, token_s=0.002)
    before = pace.allowance(waited_s=0.0)
    pace.observe(decoding=4, prefilled=5, seconds=0.06)
    assert pace.allowance(waited_s=0.0) == before
    pace.observe(decoding=4, prefilled=5, seconds=0.5)
    assert pace.allowance(waited_s=0.0).beside < before.beside


@given(
    st.lists(st.tuples(st.integers(0, 16), st.integers(0, 512), st.floats(0, 100)), max_size=30),
    st.floats(0, 10),
)
def test_it_stays_within_its_limits(steps: list[tuple[int, int, float]], waited_s: float) -> None:
    pace = Pace(stall_s=0.2, batch=512)
    for count, prefilled, seconds in steps:
        pace.observe(decoding=count, prefilled=prefilled, seconds=seconds)
    allowance = pace.allowance(waited_s=waited_s)
    assert allowance.alone >= 0
    assert allowance.beside == 0 or 16 <= allowance.beside <= 512
    assert pace.allowance(waited_s=0.0).beside >= 16
