"""Coalescing of stream deltas: the first one at once, then at most one every interval."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from ash.domain.values import Delta, SliceItem


async def coalesce(
    items: AsyncIterator[SliceItem], interval_s: float, clock: Callable[[], float]
) -> AsyncGenerator[SliceItem]:
    """Yield `items` with neighbouring deltas joined, none held back longer than `interval_s` seconds.

    The first delta of the stream passes at once (time to first token); anything that is not a delta
    passes at once too, behind the text before it. `clock` gives monotonic seconds.
    """
    held: list[str] = []
    last_flush = float("-inf")
    upcoming: asyncio.Future[SliceItem] | None = None
    try:
        while True:
            if upcoming is None:
                upcoming = asyncio.ensure_future(anext(items))
            wait_s = max(0.0, last_flush + interval_s - clock()) if held else None
            # asyncio.wait leaves the pending read alone when the time is up; wait_for would cancel it.
            await asyncio.wait({upcoming}, timeout=wait_s)
            if upcoming.done():
                try:
                    item = upcoming.result()
                except StopAsyncIteration:
                    break
                finally:
                    upcoming = None
                if not isinstance(item, Delta):
                    if held:
                        yield Delta("".join(held))
                        held.clear()
                    yield item
                    continue
                held.append(item.text)
            if held and clock() - last_flush >= interval_s:
                yield Delta("".join(held))
                held.clear()
                last_flush = clock()
        if held:
            yield Delta("".join(held))
    finally:
        if upcoming is not None:
            upcoming.cancel()
