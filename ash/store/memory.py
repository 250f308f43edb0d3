"""The shipped fake of the port EventStore: the same semantics in dictionaries, gone with the process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ash.domain.errors import InvalidRequest, NotFound, StoreError
from ash.domain.events import Draft, Record
from ash.domain.ports import Clock
from ash.domain.values import Match, MessageRow, RunRow, SessionRow
from ash.store.cursors import check_page_limit, decode_cursor, encode_cursor
from ash.store.drafts import encode, sequence
from ash.store.projections import Change, SessionState, apply
from ash.store.search import hits, snippet, words


class _Session:
    """One session: its log, the state of the fold behind it, and its rows."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.records: list[Record] = []
        self.state = SessionState()
        self.runs: dict[str, RunRow] = {}
        self.messages: dict[str, MessageRow] = {}
        for record in records:
            state, changes = apply(self.state, record)
            self.extend([record], state, changes)

    def extend(self, records: list[Record], state: SessionState, changes: list[Change]) -> None:
        self.records.extend(records)
        self.state = state
        for change in changes:
            if isinstance(change.row, RunRow):
                self.runs[change.row.run_id] = change.row
            elif isinstance(change.row, MessageRow):
                self.messages[change.row.message_id] = change.row

    @property
    def row(self) -> SessionRow:
        assert self.state.session is not None
        return self.state.session


class MemoryEventStore:
    """EventStore without a file. What was appended is still there after close and open."""

    def __init__(self, *, clock: Clock) -> None:
        self._clock = clock
        self._sessions: dict[str, _Session] = {}
        self._open = False

    async def open(self) -> None:
        """See ash.domain.ports.EventStore.open."""
        self._open = True

    async def close(self) -> None:
        """See ash.domain.ports.EventStore.close."""
        self._open = False

    def _check_open(self) -> None:
        if not self._open:
            raise StoreError("the store in memory is not open")

    def _find(self, session_id: str) -> _Session | None:
        self._check_open()
        return self._sessions.get(session_id)

    async def append(self, session_id: str, drafts: Sequence[Draft]) -> list[Record]:
        """See ash.domain.ports.EventStore.append."""
        encoded = encode(session_id, drafts)
        session = self._find(session_id) or _Session()
        if not encoded:
            return []
        sequenced = sequence(session.state, session_id, encoded, self._clock())
        session.extend(sequenced.records, sequenced.state, sequenced.changes)
        self._sessions[session_id] = session
        return sequenced.records

    async def read(self, session_id: str, after_seq: int = 0, limit: int | None = None) -> list[Record]:
        """See ash.domain.ports.EventStore.read."""
        session = self._find(session_id)
        if session is None or (limit is not None and limit <= 0):
            return []
        return [record for record in session.records if record.seq > after_seq][:limit]

    async def head(self, session_id: str) -> int | None:
        """See ash.domain.ports.EventStore.head."""
        session = self._find(session_id)
        return None if session is None else session.state.head_seq

    async def session(self, session_id: str) -> SessionRow | None:
        """See ash.domain.ports.EventStore.session."""
        session = self._find(session_id)
        return None if session is None else session.row

    async def sessions(
        self, *, owner: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> tuple[list[SessionRow], str | None]:
        """See ash.domain.ports.EventStore.sessions."""
        self._check_open()
        check_page_limit(limit)
        rows = [session.row for session in self._sessions.values() if owner in (None, session.row.owner)]
        rows.sort(key=lambda row: (-row.updated_at, row.session_id))
        if cursor is not None:
            updated_at, session_id = decode_cursor(cursor)
            rows = [row for row in rows if (-row.updated_at, row.session_id) > (-updated_at, session_id)]
        page = rows[:limit]
        return page, encode_cursor(page[-1]) if len(rows) > limit else None

    async def unfinished(self) -> list[str]:
        """See ash.domain.ports.EventStore.unfinished."""
        self._check_open()
        return sorted(key for key, session in self._sessions.items() if session.row.state != "idle")

    async def run(self, session_id: str, run_id: str) -> RunRow | None:
        """See ash.domain.ports.EventStore.run."""
        session = self._find(session_id)
        return None if session is None else session.runs.get(run_id)

    async def runs(self, session_id: str) -> list[RunRow]:
        """See ash.domain.ports.EventStore.runs."""
        session = self._find(session_id)
        return [] if session is None else sorted(session.runs.values(), key=lambda run: run.started_seq)

    async def messages(self, session_id: str, after_seq: int = 0) -> list[MessageRow]:
        """See ash.domain.ports.EventStore.messages."""
        session = self._find(session_id)
        found = [] if session is None else session.messages.values()
        return sorted((row for row in found if row.seq > after_seq), key=lambda row: row.seq)

    async def search(self, query: str, *, session_id: str, limit: int = 10) -> list[Match]:
        """See ash.domain.ports.EventStore.search. The score only counts the matching words."""
        matches: list[Match] = []
        for row in await self.messages(session_id):
            text_words = words(row.text)
            matched = hits(query, text_words)
            if matched is None:
                continue
            shown, score = snippet(row.text, text_words, matched), -len(matched) / len(text_words)
            matches.append(Match(session_id, row.message_id, row.role, row.seq, row.ts, shown, score))
        matches.sort(key=lambda match: (match.score, match.seq))
        return matches[: max(limit, 0)]

    async def fork(self, session_id: str, new_id: str, at_seq: int) -> int:
        """See ash.domain.ports.EventStore.fork.

        Raises:
            InvalidRequest: there is a session `new_id` already.
        """
        source = self._find(session_id)
        if new_id in self._sessions:
            raise InvalidRequest(f"session {session_id} cannot be forked as {new_id}, which exists already")
        records = [] if source is None else [record for record in source.records if record.seq <= at_seq]
        if not records:
            raise NotFound(f"there is no session {session_id} with an event at or before seq {at_seq}")
        self._sessions[new_id] = _Session(
            Record(new_id, record.seq, record.ts, record.run_id, record.origin, record.event)
            for record in records
        )
        return len(records)

    async def delete(self, session_id: str) -> None:
        """See ash.domain.ports.EventStore.delete."""
        if self._find(session_id) is None:
            raise NotFound(f"there is no session {session_id}")
        del self._sessions[session_id]

    async def rebuild(self) -> int:
        """See ash.domain.ports.EventStore.rebuild."""
        self._check_open()
        self._sessions = {key: _Session(session.records) for key, session in self._sessions.items()}
        return sum(len(session.records) for session in self._sessions.values())
