"""What a study found: per shift, per session, per condition. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from msgspec import Struct

from ash.domain.values import MODES
from ash.study.measures import average, distinct, hours, prevalence, repetition_of_earlier
from ash.study.plan import Plan, Step, schedule, step_of
from ash.study.statistics import Interval, difference, mean, rate, share
from ash.study.tables import onset_message
from ash.study.transcript import SessionView
from ash.study.vectors import PersonaConsistency, Vectors, collapse, dispersion, persona_consistency

CAUSE_REACH = 3
"""Answers, from an event on, within which an onset counts as following it."""

TRIGGERS = ("external", "self_directed", "undetermined")


class StudiedSession(Struct, frozen=True):
    """One session of the study with the vectors of its answers, in order."""

    condition: str
    seed: int
    view: SessionView
    vectors: Vectors = ()


class FoundShift(Struct, frozen=True):
    """One shift. Answers are numbered from 0, the opening's.

    Attributes:
        delay: answers from the onset to the alarm.
        cause: what the plan says set it off, within CAUSE_REACH answers before the onset: `cue`, if one that
            asks for this mode came in, else `opening`, if the session began there, else `none`.
        after_event: whether any event of the plan, cue or remark, came in within that reach.
    """

    condition: str
    seed: int
    session_id: str
    onset_answer: int
    alarm_answer: int
    onset_message: str
    from_mode: str
    to_mode: str
    genre: str | None
    trigger: str
    cause: str
    after_event: bool

    @property
    def delay(self) -> int:
        """Answers between onset and alarm."""
        return self.alarm_answer - self.onset_answer


class SessionSummary(Struct, frozen=True):
    """The figures of one session; NaN where one is undefined."""

    condition: str
    seed: int
    session_id: str
    answers: int
    hours: float
    shifts: int
    external: int
    self_directed: int
    undetermined: int
    events: int
    events_followed: int
    shares: dict[str, float]
    distinct_2: float
    repetition_of_earlier: float
    dispersion: float
    collapse: float
    persona: PersonaConsistency | None


class ConditionSummary(Struct, frozen=True):
    """The figures of one condition with their intervals; sessions are the unit that is resampled.

    Attributes:
        per_hour: shifts per hour of the session; depends on the machine's speed.
        per_100: shifts per 100 answers.
        self_directed_per_100: of them, those with the trigger self_directed.
        difference: per_100 minus that of the first condition of the plan; None for that one.
        delay: answers from onset to alarm, mean over the shifts.
        events_followed: share of the condition's events with an onset within CAUSE_REACH answers.
        confusion: shifts by (cause, trigger).
    """

    condition: str
    sessions: int
    answers: int
    hours: float
    shifts: int
    per_hour: Interval
    per_100: Interval
    self_directed_per_100: Interval
    difference: Interval | None
    delay: float
    shares: dict[str, Interval]
    events: int
    events_followed: Interval
    confusion: dict[tuple[str, str], int]
    distinct_2: Interval
    repetition_of_earlier: Interval
    dispersion: Interval
    collapse: Interval
    persona_distance: Interval
    line_to_line: Interval
    within: Interval
    between: Interval


class StudyResult(Struct, frozen=True):
    """The figures of a study."""

    plan: Plan
    sessions: tuple[SessionSummary, ...]
    shifts: tuple[FoundShift, ...]
    conditions: tuple[ConditionSummary, ...]


def analyse(plan: Plan, sessions: Sequence[StudiedSession], persona: Sequence[float] | None) -> StudyResult:
    """The result of `sessions`; `persona` is the vector of the persona that all of them were given."""
    shifts = [shift for session in sessions for shift in found_shifts(plan, session)]
    consistency = _consistency(sessions, persona)
    summaries = [
        _summary(
            plan,
            session,
            [shift for shift in shifts if shift.session_id == session.view.session_id],
            consistency,
        )
        for session in sessions
    ]
    names = [name for name in plan.conditions if any(each.condition == name for each in summaries)]
    conditions: list[ConditionSummary] = []
    for name in names:
        own = [each for each in summaries if each.condition == name]
        first = [each for each in summaries if each.condition == names[0]]
        conditions.append(_condition(plan, name, own, None if name == names[0] else first, shifts))
    return StudyResult(plan, tuple(summaries), tuple(shifts), tuple(conditions))


def _consistency(
    sessions: Sequence[StudiedSession], persona: Sequence[float] | None
) -> dict[str, PersonaConsistency]:
    """Within each condition, for agents are compared with others that did the same."""
    found: dict[str, PersonaConsistency] = {}
    for condition in dict.fromkeys(session.condition for session in sessions):
        lines = {
            session.view.session_id: session.vectors for session in sessions if session.condition == condition
        }
        found |= persona_consistency(persona, lines)
    return found


def found_shifts(plan: Plan, session: StudiedSession) -> list[FoundShift]:
    """The shifts of a session with what the plan knows of their causes."""
    answers = session.view.answers
    places = {answer.seq: number for number, answer in enumerate(answers)}
    events = events_of(plan, session)
    found = []
    for shift in session.view.shifts:
        onset = onset_message(session.view, shift)
        onset_answer = places.get(shift.value.onset_seq)
        if onset is None or onset_answer is None:
            continue
        before = [step for place, step in events if 0 <= onset_answer - place < CAUSE_REACH]
        asked = any(step.mode == shift.value.to for step in before)
        found.append(
            FoundShift(
                condition=session.condition,
                seed=session.seed,
                session_id=session.view.session_id,
                onset_answer=onset_answer,
                alarm_answer=places.get(shift.value.alarm_seq, onset_answer),
                onset_message=onset.message_id,
                from_mode=shift.value.from_,
                to_mode=shift.value.to,
                genre=shift.value.genre,
                trigger=shift.value.trigger,
                cause="cue" if asked else "opening" if onset_answer < CAUSE_REACH else "none",
                after_event=bool(before),
            )
        )
    return found


def events_of(plan: Plan, session: StudiedSession) -> list[tuple[int, Step]]:
    """The plan's events in a session: the number of the first answer behind each, and the event."""
    steps = schedule(plan, session.condition, session.seed)
    answers = session.view.answers
    found = []
    for message in session.view.inputs:
        step = step_of(steps, message.key)
        if step is not None and step.kind in {"cue", "remark"}:
            behind = next((n for n, answer in enumerate(answers) if answer.seq > message.seq), len(answers))
            found.append((behind, step))
    return found


def _summary(
    plan: Plan,
    session: StudiedSession,
    shifts: Sequence[FoundShift],
    consistency: Mapping[str, PersonaConsistency],
) -> SessionSummary:
    view = session.view
    texts = [answer.text for answer in view.answers]
    triggers = Counter(shift.trigger for shift in shifts)
    events = events_of(plan, session)
    followed = sum(
        any(0 <= shift.onset_answer - place < CAUSE_REACH for shift in shifts) for place, _ in events
    )
    return SessionSummary(
        condition=session.condition,
        seed=session.seed,
        session_id=view.session_id,
        answers=len(texts),
        hours=hours(view),
        shifts=len(shifts),
        external=triggers["external"],
        self_directed=triggers["self_directed"],
        undetermined=triggers["undetermined"],
        events=len(events),
        events_followed=followed,
        shares=prevalence(view),
        distinct_2=distinct(texts, 2),
        repetition_of_earlier=average(repetition_of_earlier(texts)),
        dispersion=dispersion(session.vectors),
        collapse=collapse(session.vectors),
        persona=consistency.get(view.session_id) if session.vectors else None,
    )


def _condition(
    plan: Plan,
    name: str,
    sessions: Sequence[SessionSummary],
    reference: Sequence[SessionSummary] | None,
    shifts: Sequence[FoundShift],
) -> ConditionSummary:
    seed = plan.bootstrap_seed
    own = [shift for shift in shifts if shift.condition == name]

    def over(values: Sequence[float]) -> Interval:
        return mean(values, seed=seed)

    def persona(attribute: str) -> Interval:
        return over([getattr(each.persona, attribute) for each in sessions if each.persona is not None])

    counts, hundreds = _per_100(sessions)
    per_100 = rate(counts, hundreds, seed=seed)
    return ConditionSummary(
        condition=name,
        sessions=len(sessions),
        answers=sum(each.answers for each in sessions),
        hours=sum(each.hours for each in sessions),
        shifts=len(own),
        per_hour=rate(counts, [each.hours for each in sessions], seed=seed),
        per_100=per_100,
        self_directed_per_100=rate([each.self_directed for each in sessions], hundreds, seed=seed),
        difference=None if reference is None else difference(per_100, rate(*_per_100(reference), seed=seed)),
        delay=average([float(shift.delay) for shift in own]),
        shares={mode: over([each.shares[mode] for each in sessions]) for mode in MODES},
        events=sum(each.events for each in sessions),
        events_followed=share(
            [float(each.events_followed) for each in sessions],
            [float(each.events) for each in sessions],
            seed=seed,
        ),
        confusion=dict(Counter((shift.cause, shift.trigger) for shift in own)),
        distinct_2=over([each.distinct_2 for each in sessions]),
        repetition_of_earlier=over([each.repetition_of_earlier for each in sessions]),
        dispersion=over([each.dispersion for each in sessions]),
        collapse=over([each.collapse for each in sessions]),
        persona_distance=persona("distance"),
        line_to_line=persona("line_to_line"),
        within=persona("within"),
        between=persona("between"),
    )


def _per_100(sessions: Sequence[SessionSummary]) -> tuple[list[float], list[float]]:
    """Shifts, and hundreds of answers, of each session."""
    return [float(each.shifts) for each in sessions], [each.answers / 100 for each in sessions]
