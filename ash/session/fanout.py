"""From the log to everyone who is attached: replay after a cursor, then live, with no gap between."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

import msgspec

from ash.domain.errors import SlowConsumer
from ash.domain.events import Record
from ash.domain.ports import EventStore

REPLAY_PAGE = 500
"""Records per read while a subscriber catches up: bounds what one slow consumer keeps in memory."""


class Published:
    """A committed record with its envelope, encoded once for all subscribers."""

    __slots__ = ("_params_json", "record")

    def __init__(self, record: Record) -> None:
        self.record = record
        self._params_json: bytes | None = None

    @property
    def params_json(self) -> bytes:
        """`session/event` params as JSON: sessionId, seq, ts, runId, origin, event."""
        if self._params_json is None:
            record = self.record
            self._params_json = msgspec.json.encode(
                {
                    "sessionId": record.session_id,
                    "seq": record.seq,
                    "ts": record.ts,
                    "runId": record.run_id,
                    "origin": record.origin,
                    "event": record.event,
                }
            )
        return self._params_json


class Subscription:
    """One consumer's view of a session: every record after its cursor, in order, exactly once.

    While it catches up it reads the store page by page and holds nothing; once level with the head it
    holds at most `max_buffered` bytes of live records, beyond which iteration raises SlowConsumer.
    """

    def __init__(
        self,
        hub: Hub,
        store: EventStore,
        *,
        after_seq: int,
        max_buffered: int,
        state: str,
        queue: list[str],
    ) -> None:
        self.head_seq = hub.head_seq
        self.min_seq = 1
        self.state = state
        self.queue = queue
        self._hub = hub
        self._store = store
        self._cursor = after_seq
        self._max_buffered = max_buffered
        self._live: deque[Published] | None = None
        self._buffered = 0
        self._overflow = asyncio.Event()
        self._closed = asyncio.Event()
        self._wake = asyncio.Event()

    def offer(self, published: Published) -> None:
        """Hand over a live record; a subscriber that still catches up will find it in the store."""
        if self._live is not None and not self._overflow.is_set() and published.record.seq > self._cursor:
            self._buffered += len(published.params_json)
            if self._buffered > self._max_buffered and self._live:
                self._overflow.set()
                self._live.clear()
            else:
                self._live.append(published)
        self._wake.set()

    async def overflowed(self) -> None:
        """Return once too much waits: a consumer that is stuck in a send does not iterate."""
        await self._overflow.wait()

    def close(self) -> None:
        """End the iteration; idempotent."""
        self._closed.set()
        self._hub.remove(self)
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[Published]:
        try:
            async for published in self._replay():
                yield published
            while not self._closed.is_set():
                # Cleared first: what arrives, or a close, while the consumer holds a record wakes again.
                self._wake.clear()
                async for published in self._drain():
                    yield published
                await self._wake.wait()
        finally:
            self.close()

    async def _replay(self) -> AsyncIterator[Published]:
        while not self._closed.is_set():
            page = await self._store.read(self._hub.session_id, self._cursor, REPLAY_PAGE)
            for record in page:
                self._cursor = record.seq
                yield Published(record)
                if self._closed.is_set():
                    return
            # No await between this test and going live, so no record can slip in between.
            if not page and self._hub.head_seq <= self._cursor:
                self._live = deque()
                return

    async def _drain(self) -> AsyncIterator[Published]:
        assert self._live is not None
        while not self._closed.is_set():
            if self._overflow.is_set():
                raise SlowConsumer(
                    f"more than {self._max_buffered} bytes wait for this consumer of session "
                    f"{self._hub.session_id}; attach again with afterSeq={self._cursor}"
                )
            if not self._live:
                return
            published = self._live.popleft()
            self._buffered -= len(published.params_json)
            self._cursor = published.record.seq
            yield published


class Hub:
    """The subscribers of one session and the seq of the last record that was published."""

    def __init__(self, session_id: str, head_seq: int) -> None:
        self.session_id = session_id
        self.head_seq = head_seq
        self._subscriptions: set[Subscription] = set()

    def __len__(self) -> int:
        return len(self._subscriptions)

    def add(self, subscription: Subscription) -> None:
        """Let `subscription` see what is published from now on."""
        self._subscriptions.add(subscription)

    def remove(self, subscription: Subscription) -> None:
        """Forget a subscriber; idempotent."""
        self._subscriptions.discard(subscription)

    def publish(self, records: Sequence[Record]) -> None:
        """Tell everyone about committed records."""
        if records:
            self.head_seq = records[-1].seq
        for record in records:
            published = Published(record)
            for subscription in self._subscriptions:
                subscription.offer(published)

    def close(self) -> None:
        """End every subscription: the session is gone."""
        for subscription in list(self._subscriptions):
            subscription.close()
