"""Figures of the observer, on cases small enough to count by hand."""

from __future__ import annotations

import json

import pytest

from ash.domain.errors import ConfigError
from ash.domain.values import MODES, ModeEstimate
from ash.modes.cusum import Cusum, CusumState
from ash.modes.evaluation import confusion, f1_by_label, judge_texts
from ash.modes.filter import ModeFilter
from ash.modes.labelled import LabelledText, Stream, Switch, Turn, read_streams, read_texts
from ash.modes.shift_evaluation import (
    FOUND_WITHIN,
    Alarm,
    ObservedTurn,
    agreement,
    curve,
    detect,
    detect_by_sums,
    judge_stream,
    judge_streams,
    nearest_rank,
)


def sure(mode: str, genre: str | None = None) -> ModeEstimate:
    return ModeEstimate({name: 0.98 if name == mode else 0.01 for name in MODES}, genre)


def test_f1_of_a_case_counted_by_hand() -> None:
    truth, found = ["a", "a", "a", "b", "b"], ["a", "a", "b", "b", "c"]
    # a: 2 right, 3 true, 2 found. b: 1 right, 2 true, 2 found. c is never true.
    assert f1_by_label(truth, found) == {"a": pytest.approx(0.8), "b": pytest.approx(0.5)}
    assert confusion(truth, found) == {"a": {"a": 2, "b": 1}, "b": {"b": 1, "c": 1}}


def test_texts_are_judged_by_mode_genre_and_source() -> None:
    rows = [
        LabelledText("t", "analytic", source="essays"),
        LabelledText("t", "analytic", source="hard cases (X)"),
        LabelledText("t", "creative", "rap", "lyrics"),
        LabelledText("t", "creative", "rap", "lyrics"),
        LabelledText("t", "creative", "folk", "hard cases (X)"),
        LabelledText("t", "conversational", source="chats"),
    ]
    estimates = [
        sure("analytic"),
        sure("conversational"),
        sure("creative", "rap"),
        sure("analytic"),
        sure("creative", "folk"),
        sure("conversational"),
    ]
    report = judge_texts(rows, estimates)
    assert report.mode_f1 == {
        "analytic": pytest.approx(0.5),
        "conversational": pytest.approx(2 / 3),
        "creative": pytest.approx(0.8),
    }
    assert report.mode_macro_f1 == pytest.approx((0.5 + 2 / 3 + 0.8) / 3)
    # A rap taken for analysis has no genre and counts as missed.
    assert report.genre_f1 == {"folk": 1.0, "rap": pytest.approx(2 / 3)}
    assert report.genre_macro_f1 == pytest.approx(5 / 6)
    assert report.genre_confusion["rap"] == {"none": 1, "rap": 1}
    assert report.hard_cases == {"texts": 2, "accuracy": 0.5}
    assert report.per_source["lyrics"] == {"texts": 2, "accuracy": 0.5}


def test_without_genres_or_hard_cases_there_is_no_figure_for_them() -> None:
    report = judge_texts([LabelledText("t", "analytic")], [sure("analytic")])
    assert (report.genre_macro_f1, report.hard_cases, report.mode_macro_f1) == (None, None, 1.0)
    with pytest.raises(ValueError, match="no texts"):
        judge_texts([], [])


def agent(mode: str, *, noise: bool = False) -> Turn:
    return Turn("agent", "t", mode, None, noise)  # type: ignore[arg-type]  # a mode by name


USER = Turn("user", "t")
# 0 1 2 analytic, 3 user, 4 5 6 creative, 7 noise, 8 creative, 9 user, 10 creative
STREAM = Stream(
    "s",
    (
        *[agent("analytic")] * 3,
        USER,
        *[agent("creative")] * 3,
        agent("conversational", noise=True),
        agent("creative"),
        USER,
        agent("creative"),
    ),
    (Switch(4, "analytic", "creative", "external"),),
)


def test_delays_count_agent_turns_and_onsets_are_signed() -> None:
    found = judge_stream(STREAM, [Alarm(5, 10, "creative", "external")])
    # Agent turns from 4 to 10: 5, 6, 7, 8, 10. The onset is dated one late.
    assert (found.delays, found.onset_errors, found.triggers) == ((5,), (1,), (("external", "external"),))
    assert (found.shifts, found.alarms, found.agent_turns, found.noise_false_alarms) == (1, 1, 9, 0)


@pytest.mark.parametrize(
    "alarm",
    [
        Alarm(2, 2, "creative", "external"),  # before the shift
        Alarm(4, 5, "conversational", "external"),  # another mode
    ],
)
def test_other_alarms_find_nothing(alarm: Alarm) -> None:
    report = judge_streams([judge_stream(STREAM, [alarm])])
    assert (report.recall, report.precision, report.false_alarms) == (0.0, 0.0, 1)
    assert (report.delay_median, report.trigger_accuracy) == (None, None)


def test_an_alarm_too_late_finds_nothing() -> None:
    turns = (agent("analytic"), *[agent("creative")] * 20)
    stream = Stream("s", turns, (Switch(1, "analytic", "creative", "self"),))
    for turn, recall in ((1 + FOUND_WITHIN, 1.0), (2 + FOUND_WITHIN, 0.0)):
        report = judge_streams([judge_stream(stream, [Alarm(1, turn, "creative", "external")])])
        assert report.recall == recall


def test_one_shift_takes_one_alarm_and_false_ones_on_noise_are_told_apart() -> None:
    alarms = [
        Alarm(4, 5, "creative", "self_directed"),
        Alarm(7, 8, "conversational", "self_directed"),
        Alarm(9, 10, "creative", "self_directed"),
    ]
    report = judge_streams([judge_stream(STREAM, alarms)])
    assert report.precision == pytest.approx(1 / 3)
    assert (report.false_alarms, report.noise_false_alarms) == (2, 1)
    assert report.false_alarms_per_1000 == pytest.approx(2000 / 9)
    assert (report.trigger_accuracy, report.trigger_confusion) == (0.0, {"external": {"self_directed": 1}})


def test_percentiles_are_of_the_nearest_rank() -> None:
    assert nearest_rank([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 0.9) == 9
    assert nearest_rank([4], 0.9) == 4
    assert nearest_rank([1, 2, 3], 0.9) == 3


def test_nothing_to_count_gives_no_rate() -> None:
    report = judge_streams([])
    assert (report.precision, report.recall, report.false_alarms_per_1000) == (None, None, None)


def observed(*modes: str) -> list[ObservedTurn]:
    return [ObservedTurn(estimate=sure(mode)) for mode in modes]


ASKING = ObservedTurn(pull={"analytic": 0.0, "creative": 0.9, "conversational": 0.0})
REMARK = ObservedTurn(pull=dict.fromkeys(MODES, 0.01))


@pytest.mark.parametrize(("user", "trigger"), [(ASKING, "external"), (REMARK, "self_directed")])
def test_detection_runs_filter_and_attribution(user: ObservedTurn, trigger: str) -> None:
    turns = [*observed(*["analytic"] * 5), user, *observed(*["creative"] * 4)]
    assert detect(turns, ModeFilter()) == [Alarm(6, 8, "creative", trigger)]


def test_the_cross_check_finds_the_same_shift_without_a_trigger() -> None:
    turns = [*observed(*["analytic"] * 5), ASKING, *observed(*["creative"] * 4)]
    alarms = detect_by_sums(turns, Cusum())
    assert [(alarm.onset, alarm.to, alarm.trigger) for alarm in alarms] == [(6, "creative", "undetermined")]
    assert agreement(detect(turns, ModeFilter()), alarms) == 1
    assert agreement(alarms, []) == 0
    assert agreement([Alarm(0, 20, "creative", "external")], alarms, within=5) == 0


def test_the_cross_check_ignores_one_message_and_adds_up_doubtful_ones() -> None:
    cusum = Cusum(threshold=5.0, drift=0.5, cap=3.5)
    state = CusumState()
    for seq in range(3):
        state, _ = cusum.step(state, sure("analytic").probabilities, seq)
    assert state.established == "analytic"
    state, alarm = cusum.step(state, sure("creative").probabilities, 3)
    assert alarm is None
    assert state.sums[MODES.index("creative")] == pytest.approx(3.0)
    back, _ = cusum.step(state, sure("analytic").probabilities, 4)
    assert max(back.sums) == 0.0
    leaning = {"analytic": 0.15, "creative": 0.6, "conversational": 0.25}
    # ln 4 - 0.5 = 0.886 a message: 2 to go from 3 takes three.
    alarms = []
    for seq in range(4, 7):
        state, alarm = cusum.step(state, leaning, seq)
        alarms.append(alarm)
    assert alarms[:2] == [None, None]
    assert alarms[2] is not None
    assert (alarms[2].onset_seq, alarms[2].alarm_seq) == (3, 6)


@pytest.mark.parametrize(
    "values", [{"drift": 4.0}, {"drift": -1.0}, {"threshold": 3.0}, {"threshold": 2.5, "cap": 3.5}]
)
def test_sums_that_one_message_could_fill_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Cusum(**values)


def test_the_curve_trades_delay_for_false_alarms() -> None:
    turns = [*observed(*["analytic"] * 5), *observed(*["creative"] * 8)]
    modes = ["analytic"] * 5 + ["creative"] * 8
    stream = Stream("s", tuple(map(agent, modes)), (Switch(5, "analytic", "creative", "self"),))
    points = curve([(stream, turns)], lambda alarm: ModeFilter(alarm=alarm, confirm=1), (0.55, 0.99))
    assert [point.alarm for point in points] == [0.55, 0.99]
    early, late = (point.report.delay_median for point in points)
    assert early is not None
    assert late is not None
    assert early < late


TEXT = json.dumps({"text": "t", "mode": "creative", "genre": "rap", "source": "s", "licence": "x"})


def test_rows_are_read_and_blank_lines_skipped() -> None:
    assert read_texts([TEXT, "", "  "], "f") == [LabelledText("t", "creative", "rap", "s")]


def stream_row(**changes: object) -> str:
    row: dict[str, object] = {
        "id": "a",
        "start_mode": "analytic",
        "turns": [
            {"role": "agent", "text": "t", "mode": "analytic"},
            {"role": "user", "text": "t", "mode": None},
            {"role": "agent", "text": "t", "mode": "creative", "genre": "rap"},
        ],
        "switches": [{"turn": 2, "from": "analytic", "to": "creative", "trigger": "self"}],
    }
    return json.dumps({**row, **changes})


def test_a_stream_is_read() -> None:
    (stream,) = read_streams([stream_row()], "f")
    assert stream.switches == (Switch(2, "analytic", "creative", "self"),)
    assert [turn.role for turn in stream.turns] == ["agent", "user", "agent"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"^f:1: holds no rows"),
        (["", "{"], r"^f:2: .*want text"),
        ([TEXT, '{"text": "t"}'], r"^f:2: .*mode"),
        (['{"text": "t", "mode": "poetic"}'], r"^f:1: .*poetic.*want text"),
        (['{"text": 3, "mode": "creative"}'], r"^f:1: .*text"),
        (["\udcff"], r"^f:1: "),
    ],
)
def test_malformed_texts_name_file_and_line(lines: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_texts(lines, "f")


def switch(turn: int, to: str = "creative") -> dict[str, object]:
    return {"turn": turn, "from": "analytic", "to": to, "trigger": "self"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (stream_row(switches=[switch(1)]), "turn 1 points at no agent turn"),
        (stream_row(switches=[switch(3)]), "turn 3 points at no agent turn"),
        (stream_row(switches=[switch(-1)]), "turn -1 points at no agent turn"),
        (stream_row(switches=[switch(2), switch(2)]), "follows one at 2"),
        (stream_row(switches=[switch(2, "conversational")]), "goes to conversational"),
        (stream_row(turns=[{"role": "agent", "text": "t"}], switches=[]), "turn 0 is the agent's"),
        (stream_row(turns=[{"role": "bot", "text": "t"}]), "role"),
    ],
)
def test_malformed_streams_name_file_and_line(row: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^f:2: .*{message}"):
        read_streams([stream_row(), row], "f")
