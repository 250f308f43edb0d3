"""The mode of a session over time: turns observations into `ash.mode` and `ash.mode_shift` events.

Folds its own events, so that a restarted server goes on with the same filter.
"""

from __future__ import annotations

from collections import deque

from ash.domain.events import Custom, Event, InputValue, ModeShiftValue, ModeValue, Record, TextMessageStart
from ash.domain.values import ModeEstimate
from ash.modes.attribution import InputEvidence, attribute, window
from ash.modes.filter import FilterState, ModeFilter, Shift

EVIDENCE_KEPT = 64
"""Inputs and answers kept for attribution; older ones cannot lie in the window before an onset."""


class ModeTracker:
    """Filter state and evidence of one session."""

    def __init__(self, mode_filter: ModeFilter) -> None:
        self._filter = mode_filter
        self._state = FilterState()
        self._inputs: deque[InputEvidence] = deque(maxlen=EVIDENCE_KEPT)
        self._answers: deque[int] = deque(maxlen=EVIDENCE_KEPT)
        self._answer_seqs: dict[str, int] = {}
        self._input_seqs: dict[str, int] = {}

    def observe(self, message_id: str, seq: int, estimate: ModeEstimate | None) -> list[Event]:
        """The events for an answer that began at `seq`; `estimate` None: nobody could observe it.

        Nothing changes until the events come back through `apply`.
        """
        if estimate is None:
            _, posterior = self._filter.skip(self._state)
            shift, genre = None, None
        else:
            _, posterior, shift = self._filter.step(self._state, estimate.probabilities, seq)
            genre = estimate.genre
        mode = max(posterior, key=posterior.__getitem__)
        value = ModeValue(
            message_id=message_id,
            probabilities=posterior,
            mode=mode,
            genre=genre if mode == "creative" else None,
            observed=estimate is not None,
            raw=None if estimate is None else estimate.probabilities,
        )
        return [value.event(), *([self._shift(shift, genre)] if shift else [])]

    def _shift(self, shift: Shift, genre: str | None) -> Event:
        inputs = window(tuple(self._inputs), tuple(self._answers), shift.onset_seq)
        found = attribute(shift.to_mode, inputs, complete=True)
        return ModeShiftValue(
            from_=shift.from_mode,
            to=shift.to_mode,
            genre=genre if shift.to_mode == "creative" else None,
            onset_seq=shift.onset_seq,
            alarm_seq=shift.alarm_seq,
            trigger=found.trigger,
            evidence=list(found.evidence),
        ).event()

    def apply(self, record: Record) -> None:
        """Fold one committed record."""
        event = record.event
        if isinstance(event, TextMessageStart):
            self._answers.append(record.seq)
            self._answer_seqs = {event.message_id: record.seq}
        elif isinstance(event, Custom) and event.name == InputValue.event_name:
            value = InputValue.of(event)
            kind = "user" if value.principal != "ash" else "tick"
            self._input_seqs[value.message_id] = record.seq
            self._inputs.append(InputEvidence(record.seq, kind, None))
        elif isinstance(event, Custom) and event.name == ModeValue.event_name:
            self._apply_mode(ModeValue.of(event))

    def _apply_mode(self, value: ModeValue) -> None:
        if value.role == "user":
            seq = self._input_seqs.pop(value.message_id, None)
            for index, evidence in enumerate(self._inputs):
                if evidence.seq == seq:
                    self._inputs[index] = InputEvidence(evidence.seq, evidence.kind, value.raw)
            return
        seq = self._answer_seqs.get(value.message_id)
        if value.raw is None or seq is None:
            self._state, _ = self._filter.skip(self._state)
        else:
            self._state, _, _ = self._filter.step(self._state, value.raw, seq)
