"""How well shifts are found: recall, precision, delay and triggers on labelled streams. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from ash.domain.values import ModeEstimate
from ash.modes.attribution import InputEvidence, attribute, window
from ash.modes.cusum import Cusum, CusumState
from ash.modes.evaluation import confusion
from ash.modes.filter import ModeFilter
from ash.modes.labelled import Stream

FOUND_WITHIN = 12
"""Turns, of agent and user, behind a true shift within which an alarm counts as having found it."""

CURVE_ALARMS = (0.55, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999)
"""Alarm thresholds of the curve of delay against false alarms."""

_TRIGGERS = {"external": "external", "self": "self_directed"}


class ObservedTurn(Struct, frozen=True):
    """One turn as the instrument sees it: an agent's has an `estimate`, an input a `pull`."""

    estimate: ModeEstimate | None = None
    pull: Mapping[str, float] | None = None


class Alarm(Struct, frozen=True):
    """A detected shift, in indices of turns."""

    onset: int
    turn: int
    to: str
    trigger: str


class Outcome(Struct, frozen=True):
    """One stream judged.

    Attributes:
        delays: agent turns from each shift that was found to its alarm, 0 at the first message itself.
        onset_errors: agent turns from each such shift to the onset that was dated.
        shifts: true ones.
        alarms: raised ones.
        noise_false_alarms: alarms for no shift with a noise turn between onset and alarm.
        agent_turns: of the stream.
        triggers: (true, found) of each shift that was found.
    """

    delays: tuple[int, ...]
    onset_errors: tuple[int, ...]
    shifts: int
    alarms: int
    noise_false_alarms: int
    agent_turns: int
    triggers: tuple[tuple[str, str], ...]


class StreamReport(Struct, frozen=True):
    """Results on streams; a rate without anything to count is None.

    Attributes:
        streams: how many.
        shifts: true shifts in all of them.
        precision: share of alarms that found a shift.
        recall: share of shifts found: the right mode alarmed within FOUND_WITHIN turns.
        delay_median: agent turns from a shift to its alarm; 0 is the first message in the new mode.
        delay_p90: 90th percentile of the same, by nearest rank.
        onset_error_median: agent turns between the true and the dated onset, without sign.
        noise_false_alarms: false alarms with a noise turn between onset and alarm.
        false_alarms: all false alarms.
        false_alarms_per_1000: of agent turns.
        trigger_accuracy: share of the shifts found whose trigger is right.
        trigger_confusion: by true trigger and found trigger, how many.
    """

    streams: int
    shifts: int
    precision: float | None
    recall: float | None
    delay_median: float | None
    delay_p90: float | None
    onset_error_median: float | None
    noise_false_alarms: int
    false_alarms: int
    false_alarms_per_1000: float | None
    trigger_accuracy: float | None
    trigger_confusion: dict[str, dict[str, int]]


class CurvePoint(Struct, frozen=True):
    """What one alarm threshold gives."""

    alarm: float
    report: StreamReport


def detect(turns: Sequence[ObservedTurn], mode_filter: ModeFilter) -> list[Alarm]:
    """Run filter and attribution over a session, turn by turn, as the server does.

    The index of a turn stands for its place in the log.
    """
    state = mode_filter.initial()
    inputs: list[InputEvidence] = []
    answers: list[int] = []
    alarms = []
    for number, turn in enumerate(turns):
        if turn.estimate is None:
            inputs.append(InputEvidence(number, "user", turn.pull))
            continue
        answers.append(number)
        state, _, shift = mode_filter.step(state, turn.estimate.probabilities, number)
        if shift is not None:
            found = attribute(shift.to_mode, window(inputs, answers, shift.onset_seq), complete=True)
            alarms.append(Alarm(shift.onset_seq, number, shift.to_mode, found.trigger))
    return alarms


def detect_by_sums(turns: Sequence[ObservedTurn], cusum: Cusum) -> list[Alarm]:
    """Run the cross-check alone over a session; it judges no trigger, so its alarms name none."""
    state = CusumState()
    alarms = []
    for number, turn in enumerate(turns):
        if turn.estimate is None:
            continue
        state, shift = cusum.step(state, turn.estimate.probabilities, number)
        if shift is not None:
            alarms.append(Alarm(shift.onset_seq, number, shift.to_mode, "undetermined"))
    return alarms


def agreement(alarms: Sequence[Alarm], others: Sequence[Alarm], within: int = FOUND_WITHIN) -> int:
    """How many of `alarms` have one among `others` for the same mode at most `within` turns away."""
    return sum(
        any(alarm.to == other.to and abs(alarm.turn - other.turn) <= within for other in others)
        for alarm in alarms
    )


def judge_stream(stream: Stream, alarms: Sequence[Alarm]) -> Outcome:
    """Match the alarms with the true shifts: each shift takes the first alarm for its mode in reach."""
    agent_turns = [number for number, turn in enumerate(stream.turns) if turn.role == "agent"]
    place = {number: count for count, number in enumerate(agent_turns)}
    left = list(alarms)
    delays, onset_errors, triggers = [], [], []
    for switch in stream.switches:
        reach = range(switch.turn, switch.turn + FOUND_WITHIN + 1)
        first = next((alarm for alarm in left if alarm.turn in reach and alarm.to == switch.to), None)
        if first is not None:
            left.remove(first)
            delays.append(place[first.turn] - place[switch.turn])
            onset_errors.append(place[first.onset] - place[switch.turn])
            triggers.append((_TRIGGERS[switch.trigger], first.trigger))
    noisy = sum(any(turn.noise for turn in stream.turns[alarm.onset : alarm.turn + 1]) for alarm in left)
    return Outcome(
        delays=tuple(delays),
        onset_errors=tuple(onset_errors),
        shifts=len(stream.switches),
        alarms=len(alarms),
        noise_false_alarms=noisy,
        agent_turns=len(agent_turns),
        triggers=tuple(triggers),
    )


def judge_streams(outcomes: Sequence[Outcome]) -> StreamReport:
    """The figures over all streams together."""
    delays = sorted(delay for outcome in outcomes for delay in outcome.delays)
    errors = [abs(error) for outcome in outcomes for error in outcome.onset_errors]
    shifts = sum(outcome.shifts for outcome in outcomes)
    alarms = sum(outcome.alarms for outcome in outcomes)
    agent_turns = sum(outcome.agent_turns for outcome in outcomes)
    triggers = [pair for outcome in outcomes for pair in outcome.triggers]
    false_alarms = alarms - len(delays)
    return StreamReport(
        streams=len(outcomes),
        shifts=shifts,
        precision=len(delays) / alarms if alarms else None,
        recall=len(delays) / shifts if shifts else None,
        delay_median=statistics.median(delays) if delays else None,
        delay_p90=float(nearest_rank(delays, 0.9)) if delays else None,
        onset_error_median=statistics.median(errors) if errors else None,
        noise_false_alarms=sum(outcome.noise_false_alarms for outcome in outcomes),
        false_alarms=false_alarms,
        false_alarms_per_1000=1000 * false_alarms / agent_turns if agent_turns else None,
        trigger_accuracy=sum(true == found for true, found in triggers) / len(triggers) if triggers else None,
        trigger_confusion=confusion([true for true, _ in triggers], [found for _, found in triggers]),
    )


def nearest_rank(values: Sequence[int], share: float) -> int:
    """The smallest of the ascending `values` that at least `share` of them do not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)]


def curve(
    streams: Sequence[tuple[Stream, Sequence[ObservedTurn]]],
    filter_at: Callable[[float], ModeFilter],
    alarms: Sequence[float] = CURVE_ALARMS,
) -> list[CurvePoint]:
    """Delay against false alarms: the figures at every alarm threshold.

    Args:
        streams: each with its turns as observed.
        filter_at: the filter with that alarm threshold.
        alarms: thresholds.
    """
    return [
        CurvePoint(
            alarm,
            judge_streams(
                [judge_stream(stream, detect(turns, filter_at(alarm))) for stream, turns in streams]
            ),
        )
        for alarm in alarms
    ]
