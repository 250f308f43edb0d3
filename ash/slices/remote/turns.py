"""Who may send a request now: one per session, so many in all, in the order they came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class _Session:
    """The requests of one session: how many there are, and whose turn it is."""

    def __init__(self) -> None:
        self.requests = 0
        self.turn = asyncio.Lock()


class SessionTurns:
    """Lets `limit` requests run at a time, at most one of each session.

    A request waits for its session first and for its place second, so that a session with many requests
    stands in the queue with one of them and keeps nobody waiting. Both queues are first come, first served.
    """

    def __init__(self, limit: int) -> None:
        self._places = asyncio.Semaphore(limit)
        self._sessions: dict[str, _Session] = {}

    @asynccontextmanager
    async def turn(self, session_id: str) -> AsyncIterator[None]:
        """Wait for the turn of a request of this session; its place is free again at the end of the block."""
        session = self._sessions.setdefault(session_id, _Session())
        session.requests += 1
        try:
            async with session.turn, self._places:
                yield
        finally:
            session.requests -= 1
            if not session.requests:
                del self._sessions[session_id]
