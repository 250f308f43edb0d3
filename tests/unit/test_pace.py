"""Prompt tokens of a step, from the cost of earlier steps."""

from hypothesis import given
from hypothesis import strategies as st

from ash.slices.worker.pace import Pace


def paced(*, decode_s: float, token_s: float, stall_s: float = 0.25) -> Pace:
    pace = Pace(stall_s=stall_s, batch=512)
    for _ in range(40):
        pace.observe(decoding=4, prefilled=0, seconds=decode_s)
        pace.observe(decoding=4, prefilled=50, seconds=decode_s + 50 * token_s)
    return pace


def test_a_step_takes_as_long_as_the_stall_that_is_allowed() -> None:
    assert abs(paced(decode_s=0.05, token_s=0.002).prompt_tokens(decoding=4) - 100) <= 1


def test_nobody_waits_for_a_step_without_answers() -> None:
    assert paced(decode_s=0.05, token_s=0.01).prompt_tokens(decoding=0) == 512


def test_prompts_go_on_where_decoding_alone_takes_longer() -> None:
    assert paced(decode_s=0.9, token_s=0.01).prompt_tokens(decoding=4) == 16


def test_the_first_step_is_careful() -> None:
    assert Pace(stall_s=1.0, batch=512).prompt_tokens(decoding=1) == 16


def test_the_last_crumbs_of_a_prompt_teach_nothing() -> None:
    pace = paced(decode_s=0.05, token_s=0.002)
    before = pace.prompt_tokens(decoding=4)
    pace.observe(decoding=4, prefilled=1, seconds=0.06)
    assert pace.prompt_tokens(decoding=4) == before


def test_it_follows_a_machine_that_becomes_busy() -> None:
    pace = paced(decode_s=0.05, token_s=0.002)
    for _ in range(10):
        pace.observe(decoding=4, prefilled=50, seconds=0.05 + 50 * 0.02)
    assert pace.prompt_tokens(decoding=4) <= 16


@given(
    st.lists(st.tuples(st.integers(0, 16), st.integers(0, 512), st.floats(0, 100)), max_size=30),
    st.integers(0, 16),
)
def test_it_stays_within_its_limits(steps: list[tuple[int, int, float]], decoding: int) -> None:
    pace = Pace(stall_s=0.2, batch=512)
    for count, prefilled, seconds in steps:
        pace.observe(decoding=count, prefilled=prefilled, seconds=seconds)
    assert 16 <= pace.prompt_tokens(decoding=decoding) <= 512
