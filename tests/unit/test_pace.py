"""Prompt tokens of a step, from what earlier steps took."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash.slices.worker.pace import Pace


def run(pace: Pace, steps: int, *, decode_s: float, token_s: float) -> None:
    """Steps with prompts enough to fill them."""
    for _ in range(steps):
        tokens = pace.prompt_tokens(decoding=4)
        pace.observe(decoding=4, prefilled=tokens, seconds=decode_s + tokens * token_s)


@pytest.mark.parametrize(
    ("decode_s", "token_s", "tokens"), [(0.05, 0.002, 100), (0.0, 0.005, 50), (0.2, 0.001, 50)]
)
def test_a_step_takes_as_long_as_the_stall_that_is_allowed(
    decode_s: float, token_s: float, tokens: int
) -> None:
    pace = Pace(stall_s=0.25, batch=512)
    run(pace, 60, decode_s=decode_s, token_s=token_s)
    assert abs(pace.prompt_tokens(decoding=4) - tokens) <= 2


def test_nobody_waits_for_a_step_without_answers() -> None:
    pace = Pace(stall_s=0.25, batch=512)
    run(pace, 20, decode_s=0.05, token_s=0.01)
    assert pace.prompt_tokens(decoding=0) == 512


def test_prompts_go_on_where_decoding_alone_takes_longer() -> None:
    pace = Pace(stall_s=0.25, batch=512)
    run(pace, 20, decode_s=0.9, token_s=0.01)
    assert pace.prompt_tokens(decoding=4) == 16


def test_one_slow_step_is_made_up_for_at_once() -> None:
    pace = Pace(stall_s=0.25, batch=512)
    run(pace, 60, decode_s=0.05, token_s=0.002)
    pace.observe(decoding=4, prefilled=100, seconds=3.0)
    assert pace.prompt_tokens(decoding=4) == 50
    run(pace, 4, decode_s=0.05, token_s=0.002)
    assert pace.prompt_tokens(decoding=4) >= 90


def test_a_step_that_was_not_full_teaches_nothing_unless_it_was_slow() -> None:
    pace = Pace(stall_s=0.25, batch=512)
    run(pace, 60, decode_s=0.05, token_s=0.002)
    before = pace.prompt_tokens(decoding=4)
    pace.observe(decoding=4, prefilled=5, seconds=0.06)
    assert pace.prompt_tokens(decoding=4) == before
    pace.observe(decoding=4, prefilled=5, seconds=0.5)
    assert pace.prompt_tokens(decoding=4) < before


@given(
    st.lists(st.tuples(st.integers(0, 16), st.integers(0, 512), st.floats(0, 100)), max_size=30),
    st.integers(0, 16),
)
def test_it_stays_within_its_limits(steps: list[tuple[int, int, float]], decoding: int) -> None:
    pace = Pace(stall_s=0.2, batch=512)
    for count, prefilled, seconds in steps:
        pace.observe(decoding=count, prefilled=prefilled, seconds=seconds)
    assert 16 <= pace.prompt_tokens(decoding=decoding) <= 512
