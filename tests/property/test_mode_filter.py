"""The mode filter over any stream of estimates."""

from __future__ import annotations

import math
from itertools import pairwise

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ash.domain.values import MODES
from ash.modes.filter import FilterState, ModeFilter, Shift

Estimate = dict[str, float]
FILTER = ModeFilter()


@st.composite
def estimates(draw: st.DrawFn) -> Estimate:
    weights = draw(st.lists(st.floats(0, 1), min_size=3, max_size=3))
    assume(sum(weights) > 1e-6)
    return dict(zip(MODES, (weight / sum(weights) for weight in weights), strict=True))


@st.composite
def sure(draw: st.DrawFn, mode: str) -> Estimate:
    """An estimate that is clearly of `mode`."""
    top = draw(st.floats(0.95, 1.0))
    other = draw(st.floats(0, 1)) * (1 - top)
    first, second = (name for name in MODES if name != mode)
    return {mode: top, first: other, second: 1 - top - other}


def run(stream: list[Estimate], mode_filter: ModeFilter = FILTER) -> tuple[FilterState, list[Shift]]:
    """Every message at ten times its place."""
    state = mode_filter.initial()
    shifts = []
    for number, estimate in enumerate(stream):
        state, _, shift = mode_filter.step(state, estimate, 10 * number)
        if shift:
            shifts.append(shift)
    return state, shifts


constants = st.builds(
    ModeFilter,
    stay=st.floats(0.4, 0.999),
    alarm=st.floats(0.51, 0.99),
    noise=st.floats(0.01, 0.9),
    confirm=st.integers(1, 5),
    window=st.integers(6, 20),
)


@given(constants, st.lists(st.none() | estimates(), max_size=40))
def test_the_posterior_is_a_distribution_and_shifts_are_in_order(
    mode_filter: ModeFilter, stream: list[Estimate | None]
) -> None:
    state = mode_filter.initial()
    shifts: list[Shift] = []
    for seq, estimate in enumerate(stream):
        before = state.established
        if estimate is None:
            state, posterior = mode_filter.skip(state)
            shift = None
        else:
            state, posterior, shift = mode_filter.step(state, estimate, seq)
        assert set(posterior) == set(MODES)
        assert math.isclose(sum(posterior.values()), 1, rel_tol=1e-9)
        assert all(p >= 0 for p in posterior.values())
        if shift:
            shifts.append(shift)
            assert (shift.from_mode, shift.to_mode, shift.alarm_seq) == (before, state.established, seq)
            assert shift.onset_seq <= shift.alarm_seq
        else:
            assert before in {None, state.established}
    for earlier, later in pairwise(shifts):
        assert earlier.to_mode == later.from_mode
        assert earlier.onset_seq < later.onset_seq


@given(constants, estimates(), st.integers(1, 60))
def test_a_constant_stream_never_alarms(mode_filter: ModeFilter, estimate: Estimate, length: int) -> None:
    state, shifts = run([estimate] * length, mode_filter)
    assert shifts == []
    if state.established:
        assert estimate[state.established] == max(estimate.values())


@given(st.data(), st.permutations(MODES), st.integers(5, 60))
def test_a_clean_switch_alarms_within_three_and_is_dated_exactly(
    data: st.DataObject, modes: list[str], length: int
) -> None:
    before = [data.draw(sure(modes[0])) for _ in range(length)]
    after = [data.draw(sure(modes[1])) for _ in range(3)]
    _, shifts = run(before + after)
    assert shifts == [Shift(modes[0], modes[1], 10 * length, 10 * (length + 2))]


@given(st.data(), st.permutations(MODES), st.integers(3, 30), estimates())
def test_one_message_out_of_line_never_alarms(
    data: st.DataObject, modes: list[str], length: int, odd: Estimate
) -> None:
    settled = [data.draw(sure(modes[0])) for _ in range(length)]
    back = [data.draw(sure(modes[0])) for _ in range(length)]
    state, shifts = run([*settled, odd, *back])
    assert shifts == []
    assert state.established == modes[0]


@given(st.lists(st.none() | estimates(), max_size=40), st.integers(0, 40))
def test_a_folded_log_gives_the_state_of_the_running_session(stream: list[Estimate | None], cut: int) -> None:
    messages = list(enumerate(stream))
    state = FILTER.initial()
    for seq, estimate in messages:
        state = FILTER.skip(state)[0] if estimate is None else FILTER.step(state, estimate, seq)[0]
    assert FILTER.fold(messages) == state

    # A state that was kept on disk goes on where it was.
    kept = msgspec.json.decode(msgspec.json.encode(FILTER.fold(messages[:cut])), type=FilterState)
    for seq, estimate in messages[cut:]:
        kept = FILTER.skip(kept)[0] if estimate is None else FILTER.step(kept, estimate, seq)[0]
    assert kept == state
    assert len(state.recent) <= 24


def only(mode: str) -> Estimate:
    return {name: float(name == mode) for name in MODES}


def test_an_alarm_waits_for_the_messages_that_confirm_it() -> None:
    # So quick a filter would believe every single message.
    quick = ModeFilter(stay=0.5, alarm=0.6, noise=0.01, confirm=3)
    stream = [only("analytic")] * 5 + [only("creative")] * 2 + [only("analytic")] * 5
    assert run(stream, quick)[1] == []
    assert run([*stream, *[only("creative")] * 3], quick)[1] == [Shift("analytic", "creative", 120, 140)]


def test_a_later_look_does_not_take_back_an_onset() -> None:
    # On the path over the last two messages both are analytic; but the first was announced as a shift.
    hasty = ModeFilter(stay=0.875, alarm=0.75, noise=0.125, confirm=1, window=5)
    doubtful = {"analytic": 0.06, "creative": 0.0, "conversational": 0.94}
    state = hasty.step(hasty.initial(), only("creative"), 0)[0]
    state = hasty.skip(hasty.skip(state)[0])[0]
    state, _, first = hasty.step(state, doubtful, 3)
    state, _, second = hasty.step(state, only("analytic"), 4)
    assert first == Shift("creative", "conversational", 3, 3)
    assert second == Shift("conversational", "analytic", 4, 4)


def test_the_first_mode_is_no_shift() -> None:
    state, shifts = run([{"analytic": 1.0, "creative": 0.0, "conversational": 0.0}] * 3)
    assert state.established == "analytic"
    assert shifts == []


def test_what_was_not_observed_blurs_the_posterior() -> None:
    state, _ = run([{"analytic": 1.0, "creative": 0.0, "conversational": 0.0}] * 9)
    blurred, posterior = FILTER.skip(state)
    assert 1 / 3 < posterior["analytic"] < state.probabilities["analytic"]
    for _ in range(2000):
        blurred, posterior = FILTER.skip(blurred)
    assert posterior["analytic"] == pytest.approx(1 / 3, abs=1e-3)
    assert blurred.established == "analytic"


def test_an_estimate_is_held_against_how_common_its_mode_was_in_training() -> None:
    estimate = {"analytic": 0.5, "creative": 0.25, "conversational": 0.25}
    skewed = ModeFilter(prior={"analytic": 0.8, "creative": 0.1, "conversational": 0.1})
    _, posterior, _ = skewed.step(skewed.initial(), estimate, 0)
    assert posterior["analytic"] < posterior["creative"]


@pytest.mark.parametrize(
    "values",
    [
        {"stay": 0.3},
        {"stay": 1.0},
        {"alarm": 0.5},
        {"alarm": 1.0},
        {"noise": 0.0},
        {"noise": 1.0},
        {"confirm": 0},
        {"confirm": 8, "window": 8},
        {"prior": {"analytic": 1.0}},
        {"prior": {"analytic": 1.0, "creative": 0.0, "conversational": 0.0}},
    ],
)
def test_constants_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        ModeFilter(**values)  # type: ignore[arg-type]  # faulty on purpose


@pytest.mark.parametrize(
    "estimate",
    [
        {},
        {"analytic": 1.0},
        dict.fromkeys(MODES, 0.0),
        dict.fromkeys(MODES, math.nan),
        dict.fromkeys(MODES, -1.0),
    ],
)
def test_what_is_no_distribution_is_refused(estimate: Estimate) -> None:
    with pytest.raises(ValueError, match="no distribution"):
        FILTER.step(FILTER.initial(), estimate, 0)
