"""Carries the events of one subscription to one socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import structlog
from websockets.exceptions import ConnectionClosed

from ash.domain.errors import AshError, SlowConsumer
from ash.gateway.service_port import Published, Subscription

log = structlog.get_logger(__name__)


class Delivery:
    """One subscription on its way to one client, in tasks of its own.

    Each event is awaited until the socket took it, so a replay runs at the pace of the client and is
    never buffered here. What waits of the live events is bounded by the subscription; `overflow` is
    called when that is full, also while the client blocks a send.

    Args:
        subscription: what to carry; closed when the delivery ends.
        send: gives one event to the client; may block.
        overflow: the client is too slow.
        failed: the subscription broke; the error is logged already.
        ended: the subscription is over, because the session was deleted.
    """

    def __init__(
        self,
        subscription: Subscription,
        *,
        send: Callable[[Published], Awaitable[None]],
        overflow: Callable[[], Awaitable[None]],
        failed: Callable[[], Awaitable[None]],
        ended: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._subscription = subscription
        self._send = send
        self._overflow = overflow
        self._failed = failed
        self._ended = ended
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    @property
    def running(self) -> bool:
        """Whether events may still be delivered."""
        return any(not task.done() for task in self._tasks[:1])

    def start(self) -> None:
        """Begin to deliver."""
        self._tasks = (asyncio.create_task(self._carry()), asyncio.create_task(self._watch()))

    async def stop(self) -> None:
        """Deliver nothing more; after this returns no event is on its way. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._subscription.close()

    async def _carry(self) -> None:
        events = aiter(self._subscription)
        try:
            async for published in events:
                await self._send(published)
        except ConnectionClosed:
            return
        except SlowConsumer:
            await self._overflow()
        except AshError as error:
            log.warning("delivery.failed", error=str(error), kind=error.kind)
            await self._failed()
        except Exception:
            log.exception("delivery.failed")
            await self._failed()
        else:
            self._tasks[1].cancel()
            if self._ended is not None:
                await self._ended()
        finally:
            if isinstance(events, AsyncGenerator):
                await events.aclose()
            self._subscription.close()

    async def _watch(self) -> None:
        await self._subscription.overflowed()
        await self._overflow()
