"""How the log is stored: one row for each record, and one row for all deltas of a finished message.

Pure. A compacted row stands at the seq of the message's last delta; its body holds the joined text and how it
was cut, so that reading gives back the very records that were appended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec
from msgspec import Struct

from ash.domain.events import Origin, Record, TextMessageContent, decode_event, event_type
from ash.store.projections import delta_text

COMPACTED_TEXT = "ash.compacted_text"
"""The `type` of a compacted row; not an event type, so no client ever sees it."""

LogRow = tuple[int, int, str | None, str | None, str, int | None, str]
"""As selected from `events`: seq, ts, run_id, origin, type, first_seq, body."""


class StoredRow(Struct, frozen=True):
    """One row of table `events`, its fields in the order of the columns."""

    session_id: str
    seq: int
    ts: int
    run_id: str | None
    origin: str | None
    type: str
    first_seq: int | None
    body: str


class CompactedText(Struct, frozen=True):
    """The body of a compacted row. `parts` are (seq, ts, characters) of the deltas, in order."""

    message_id: str
    text: str
    parts: list[tuple[int, int, int]]


_ORIGINS = {str(origin): origin for origin in Origin}
_compacted_decoder = msgspec.json.Decoder(CompactedText)


def store(record: Record, body: str) -> StoredRow:
    """The row of `record`, whose event in JSON is `body`."""
    return StoredRow(
        session_id=record.session_id,
        seq=record.seq,
        ts=record.ts,
        run_id=record.run_id,
        origin=None if record.origin is None else str(record.origin),
        type=event_type(record.event),
        first_seq=None,
        body=body,
    )


def compact(deltas: Sequence[Record]) -> StoredRow | None:
    """One row for the TEXT_MESSAGE_CONTENT records of one message, in order.

    None when there is nothing to gain (fewer than two deltas) or when the row could not give back what it
    replaces (deltas of one message under several runs or origins, which no run of ours writes).
    """
    if len(deltas) < 2:
        return None
    first, last = deltas[0], deltas[-1]
    if any((record.run_id, record.origin) != (first.run_id, first.origin) for record in deltas):
        return None
    assert isinstance(last.event, TextMessageContent)
    texts = [delta_text(record) for record in deltas]
    body = CompactedText(
        message_id=last.event.message_id,
        text="".join(texts),
        parts=[(record.seq, record.ts, len(text)) for record, text in zip(deltas, texts, strict=True)],
    )
    return StoredRow(
        session_id=last.session_id,
        seq=last.seq,
        ts=last.ts,
        run_id=last.run_id,
        origin=None if last.origin is None else str(last.origin),
        type=COMPACTED_TEXT,
        first_seq=first.seq,
        body=msgspec.json.encode(body).decode(),
    )


def expand(session_id: str, rows: Iterable[LogRow], after_seq: int, limit: int | None) -> list[Record]:
    """The first `limit` records with seq > after_seq that `rows` stand for, in order of seq.

    Args:
        session_id: whose rows they are.
        rows: every row that may hold one of those records, in any order (see ash.store.queries).
        after_seq: records up to and including this one are left out.
        limit: the most records to return; None returns all.
    """
    records: list[Record] = []
    last_seq = after_seq
    for seq, ts, run_id, origin, kind, first_seq, body in sorted(rows, key=_first_seq):
        begins = seq if first_seq is None else first_seq
        if limit is not None and len(records) >= limit and begins > last_seq:
            # All that is left lies behind the page. Without this a page would decode every message after it.
            break
        last_seq = max(last_seq, seq)
        cause = None if origin is None else _ORIGINS[origin]
        if kind == COMPACTED_TEXT:
            parts = _parts(session_id, run_id, cause, body)
            records.extend(record for record in parts if record.seq > after_seq)
        else:
            records.append(Record(session_id, seq, ts, run_id, cause, decode_event(body)))
    # Almost in order already, except where messages were written side by side.
    records.sort(key=lambda record: record.seq)
    return records if limit is None else records[:limit]


def _first_seq(row: LogRow) -> int:
    seq, _, _, _, _, first_seq, _ = row
    return seq if first_seq is None else first_seq


def _parts(session_id: str, run_id: str | None, origin: Origin | None, body: str) -> Iterator[Record]:
    compacted = _compacted_decoder.decode(body)
    start = 0
    for seq, ts, characters in compacted.parts:
        text = compacted.text[start : start + characters]
        start += characters
        yield Record(session_id, seq, ts, run_id, origin, TextMessageContent(compacted.message_id, text))
