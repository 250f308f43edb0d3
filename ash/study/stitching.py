"""The turns of an agent without memory as one session, with modes and shifts found anew. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ash.domain.events import (
    Custom,
    Event,
    ModeShiftValue,
    ModeValue,
    QueueValue,
    Record,
    StateDelta,
    TextMessageStart,
)
from ash.domain.values import ModeEstimate
from ash.session.modes import ModeTracker


def stitch(
    base: Sequence[Record], continuations: Sequence[Sequence[Record]], fork_seq: int, tracker: ModeTracker
) -> list[Record]:
    """The opening of `base` up to `fork_seq`, and behind it the turn that each copy of it went on with.

    Every copy was observed by a filter that knew the opening alone. So the logged opinion of the head on
    every answer goes through `tracker` again, which is fresh, in the order of the turns; the events that it
    gives stand in the place of those of the copies. The genre of an answer that its copy did not hold to be
    creative is not in the log and stays unknown.
    """
    stitched = _Stitched(base[0].session_id, tracker)
    for record in base:
        if record.seq <= fork_seq:
            stitched.add(record)
    for records in continuations:
        for record in records:
            if record.seq > fork_seq and not _of_the_copy(record.event):
                stitched.add(record)
    return stitched.records


def detected_again(records: Sequence[Record], tracker: ModeTracker) -> list[Record]:
    """A whole session after a fresh `tracker`: what `stitch` does, for a session that was never forked."""
    return stitch(records, (), records[-1].seq, tracker)


def _of_the_copy(event: Event) -> bool:
    """Whether an event is about the copy itself: its title, its owner, its emptied queue."""
    return isinstance(event, StateDelta) or (
        isinstance(event, Custom) and event.name == QueueValue.event_name
    )


class _Stitched:
    def __init__(self, session_id: str, tracker: ModeTracker) -> None:
        self._session_id = session_id
        self._tracker = tracker
        self._answer_seqs: dict[str, int] = {}
        self.records: list[Record] = []

    def add(self, record: Record) -> None:
        """Take one record over, with the next seq; a mode or a shift as the tracker finds it."""
        event = record.event
        if isinstance(event, Custom) and event.name == ModeShiftValue.event_name:
            return
        if isinstance(event, Custom) and event.name == ModeValue.event_name:
            value = ModeValue.of(event)
            if value.role != "user":
                for found in self._observed(value):
                    self._append(record, found)
                return
        self._append(record, event)

    def _observed(self, value: ModeValue) -> list[Event]:
        estimate = ModeEstimate(value.raw, value.genre) if value.observed and value.raw is not None else None
        seq = self._answer_seqs.get(value.message_id, len(self.records))
        return self._tracker.observe(value.message_id, seq, estimate)

    def _append(self, like: Record, event: Event) -> None:
        record = msgspec.structs.replace(
            like, session_id=self._session_id, seq=len(self.records) + 1, event=event
        )
        self.records.append(record)
        self._tracker.apply(record)
        if isinstance(event, TextMessageStart):
            self._answer_seqs[event.message_id] = record.seq
