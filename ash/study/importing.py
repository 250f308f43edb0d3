"""A log that was exported, made ready to enter a store again as a session that only can be read. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from ash.domain.errors import StudyError
from ash.domain.events import (
    Custom,
    Draft,
    Event,
    ModeShiftValue,
    QueueValue,
    Record,
    RunFinished,
    RunStarted,
    StateSnapshot,
)
from ash.session.session import Session, created

READ_ONLY_KEY = "readOnly"
"""Key of the first snapshot that marks a session which takes no input."""


class TimedDraft(Struct, frozen=True):
    """A draft and the time at which the log shall say it happened, in milliseconds since the Unix epoch."""

    ts: int
    draft: Draft


def imported(records: Sequence[Record], session_id: str) -> list[TimedDraft]:
    """The drafts that bring a session back under `session_id`, in order.

    A store numbers its events without gaps, so that seqs change where the export had some; shifts are made
    to refer to the new ones. The first event marks the session as read-only. What was still open when the
    session was exported is ended, for a server would otherwise answer it at its next start.

    Raises:
        StudyError: there are no records, or they are no session's log.
    """
    if not records:
        raise StudyError(f"session {session_id} has no events; there is nothing to import")
    renumbered = _renumbered(records, session_id)
    session = Session(session_id)
    try:
        for record in renumbered:
            session.apply(record)
    except (msgspec.ValidationError, AssertionError, ValueError, KeyError) as error:
        raise StudyError(f"session {session_id} is not a log that Ash can hold: {error}") from error
    closing = session.recover(resume=False, run_id="")
    if session.queue:
        closing.append(Draft(QueueValue(queue=[], removed=list(session.queue)).event()))
    drafts = [
        TimedDraft(record.ts, Draft(record.event, run_id=record.run_id, origin=record.origin))
        for record in renumbered
    ]
    return drafts + [TimedDraft(records[-1].ts, draft) for draft in closing]


def _renumbered(records: Sequence[Record], session_id: str) -> list[Record]:
    """The records from seq 1 on without gaps, the first one a read-only snapshot."""
    first = records[0].event
    if isinstance(first, StateSnapshot):
        head = Draft(StateSnapshot(snapshot={**first.snapshot, READ_ONLY_KEY: True}))
        rest = records[1:]
    else:
        plain = created(session_id, title="", owner="", persona=None, pinned_slice=None, goals={})
        assert isinstance(plain.event, StateSnapshot)
        head = Draft(StateSnapshot(snapshot={**plain.event.snapshot, READ_ONLY_KEY: True}))
        rest = records
    new_seqs = {record.seq: number for number, record in enumerate(rest, start=2)}
    if len(rest) < len(records):
        new_seqs[records[0].seq] = 1
    opening = Record(session_id, 1, records[0].ts, None, None, head.event)
    return [
        opening,
        *(
            Record(
                session_id,
                new_seqs[record.seq],
                record.ts,
                record.run_id,
                record.origin,
                _moved(record.event, new_seqs, session_id),
            )
            for record in rest
        ),
    ]


def _moved(event: Event, new_seqs: dict[int, int], session_id: str) -> Event:
    """An event that refers to seqs or to its session, after both changed."""
    if isinstance(event, RunStarted | RunFinished):
        return msgspec.structs.replace(event, thread_id=session_id)
    if not isinstance(event, Custom) or event.name != ModeShiftValue.event_name:
        return event
    value = ModeShiftValue.of(event)
    return msgspec.structs.replace(
        value,
        onset_seq=_nearest(value.onset_seq, new_seqs),
        alarm_seq=_nearest(value.alarm_seq, new_seqs),
        evidence=[_nearest(seq, new_seqs) for seq in value.evidence],
    ).event()


def _nearest(seq: int, new_seqs: dict[int, int]) -> int:
    """The new seq of `seq`; of the next event where that one is missing, of the last one at the end."""
    if seq in new_seqs:
        return new_seqs[seq]
    later = [old for old in new_seqs if old > seq]
    return new_seqs[min(later)] if later else max(new_seqs.values())
