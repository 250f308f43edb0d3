"""From drafts to records: encoding, sequence numbers and timestamps. Pure; shared by both stores."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ash.domain.errors import StoreError
from ash.domain.events import (
    Draft,
    Event,
    Origin,
    Record,
    TextMessageEnd,
    decode_event,
    encode_event,
    event_type,
)
from ash.store.projections import Change, OpenMessage, SessionState, apply


class EncodedDraft(Struct, frozen=True):
    """A draft that is known to survive the way to the disk and back; `event` has made that way."""

    event: Event
    body: str
    run_id: str | None
    origin: Origin | None


def encode(session_id: str, drafts: Sequence[Draft]) -> list[EncodedDraft]:
    """Encode and decode again, so that nothing enters the log that could not be read from it.

    Raises:
        StoreError: a draft cannot be encoded, or what it encodes to is not an event.
    """
    encoded = []
    for number, draft in enumerate(drafts, start=1):
        try:
            _check_unicode(session_id)
            _check_unicode(draft.run_id or "")
            body = encode_event(draft.event)
            encoded.append(EncodedDraft(decode_event(body), body.decode(), draft.run_id, draft.origin))
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise StoreError(
                f"draft {number} of {len(drafts)} ({event_type(draft.event)}) for session {session_id!r} "
                f"cannot be stored: {error}; nothing of the call was written"
            ) from error
    return encoded


def _check_unicode(text: str) -> None:
    # Lone surrogates are text to Python and to nobody else.
    text.encode()


class Sequenced(Struct, frozen=True):
    """Numbered drafts: the records, the state behind them, the rows to change, the messages that ended."""

    records: list[Record]
    state: SessionState
    changes: list[Change]
    ended: list[OpenMessage]


def sequence(state: SessionState, session_id: str, drafts: Sequence[EncodedDraft], now: int) -> Sequenced:
    """Number the drafts behind `state` and fold them into it.

    Args:
        state: the session before these drafts.
        session_id: the session; also of a `state` that has no event yet.
        drafts: what to append.
        now: milliseconds since the Unix epoch; a clock that ran backwards is held at the last ts.

    Raises:
        StoreError: an event does not have the shape that the projections need.
    """
    ts = max(now, state.updated_at)
    records: list[Record] = []
    changes: list[Change] = []
    ended: list[OpenMessage] = []
    for seq, draft in enumerate(drafts, start=state.head_seq + 1):
        record = Record(session_id, seq, ts, draft.run_id, draft.origin, draft.event)
        if isinstance(draft.event, TextMessageEnd):
            message = state.open_messages.get(draft.event.message_id)
            if message is not None:
                ended.append(message)
        try:
            state, changed = apply(state, record)
        except ValueError as error:
            raise StoreError(
                f"draft {len(records) + 1} of {len(drafts)} ({event_type(draft.event)}) for session "
                f"{session_id} does not have the shape that the log needs: {error}; nothing of the call "
                "was written"
            ) from error
        records.append(record)
        changes.extend(changed)
    return Sequenced(records, state, changes, ended)
