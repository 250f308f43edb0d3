"""Waiting for something that a cancellation may overtake."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")


async def unless(cancelled: asyncio.Event, work: Awaitable[Result]) -> Result | None:
    """The result of `work`, or None if `cancelled` is set first; `work` is cancelled then."""
    working = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(cancelled.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        waiting.cancel()
        working.cancel()
