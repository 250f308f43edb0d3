"""Keeps the sizes in the policy of residency true: expected before a load, measured while a slice is used."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from ash.domain.errors import SliceUnavailable
from ash.slices.residency import Phase, Residency
from ash.slices.sizes import SizeSource
from ash.slices.spec import SliceSpec

_EVERY_S: Final = 5.0
"""To tell the PSS of a process the kernel walks its page tables: milliseconds for each gigabyte."""
_WORTH_REMEMBERING: Final = 0.02
"""A measurement is written down when it differs by this share from the last one that was."""


class SizeTracker:
    """Looks sizes up and measures them, off the event loop.

    Args:
        residency: whose sizes are kept.
        specs: the catalogue; remote slices have no size.
        sizes: expected sizes; None: slices take no room.
        measure: by slice name, the bytes that it takes now; 0 when its process has ended.
        clock: seconds, monotonic.
        on_change: called when a size has changed.
    """

    def __init__(
        self,
        residency: Residency,
        specs: Sequence[SliceSpec],
        sizes: SizeSource | None,
        measure: Mapping[str, Callable[[], int]],
        clock: Callable[[], float],
        *,
        on_change: Callable[[], None],
    ) -> None:
        self._residency = residency
        self._specs = {spec.name: spec for spec in specs}
        self._sizes = sizes
        self._measure = measure
        self._clock = clock
        self._on_change = on_change
        self._known: set[str] = set()
        self._lookups: dict[str, asyncio.Task[None]] = {}
        self._measurements: set[asyncio.Task[None]] = set()
        self._measured_at: dict[str, float] = {}
        self._remembered: dict[str, int] = {}
        self._is_closed = False

    async def expect(self, name: str) -> None:
        """Make sure that the policy knows what the slice will take; it is looked up once, for all who ask.

        Raises:
            ModelFileError: its model file cannot be used.
            SliceUnavailable: the server is stopping.
        """
        spec = self._specs[name]
        if self._sizes is None or spec.remote is not None or name in self._known:
            return
        lookup = self._lookups.get(name)
        if lookup is None:
            lookup = asyncio.create_task(self._look_up(spec, self._sizes), name=f"size of {name}")
            self._lookups[name] = lookup
            lookup.add_done_callback(lambda task: self._end_lookup(name, task))
        try:
            # A run that is cancelled leaves the look to the others.
            await asyncio.shield(lookup)
        except asyncio.CancelledError:
            if lookup.cancelled():
                raise SliceUnavailable(f"slice {name} is not available: the server is stopping") from None
            raise

    def restart(self, name: str) -> None:
        """The slice was loaded anew: measure it after its next use."""
        self._measured_at.pop(name, None)

    def refresh(self, name: str) -> None:
        """Measure the slice unless that was done lately; called after a run, when its buffers were in use."""
        if self._is_closed or name not in self._measure or self._residency[name].phase is not Phase.READY:
            return
        now = self._clock()
        if now < self._measured_at.get(name, float("-inf")) + _EVERY_S:
            return
        self._measured_at[name] = now
        task = asyncio.create_task(self._take(name), name=f"measure {name}")
        self._measurements.add(task)
        task.add_done_callback(self._measurements.discard)

    async def settled(self) -> None:
        """Wait until everything that is being measured is, and is written down."""
        if self._measurements:
            await asyncio.wait(self._measurements)

    async def close(self) -> None:
        """Stop looking sizes up, and finish what is being measured."""
        self._is_closed = True
        for task in self._lookups.values():
            task.cancel()
        if self._lookups:
            await asyncio.wait(self._lookups.values())
        await self.settled()

    async def _look_up(self, spec: SliceSpec, sizes: SizeSource) -> None:
        size = await asyncio.to_thread(sizes.expected, spec)
        self._residency.expect(spec.name, size.bytes)
        # From now on the policy keeps the size itself: reading the header of a large vocabulary takes 0.2 s.
        self._known.add(spec.name)

    def _end_lookup(self, name: str, task: asyncio.Task[None]) -> None:
        self._lookups.pop(name, None)
        if not task.cancelled():
            # Marks a failure as seen, should every run have gone by then.
            task.exception()

    async def _take(self, name: str) -> None:
        measured = await asyncio.to_thread(self._measure[name])
        if measured == 0:
            return
        self._residency.measured(name, measured)
        self._on_change()
        size = self._residency[name].bytes
        before = self._remembered.get(name, 0)
        if self._sizes is not None and abs(size - before) > _WORTH_REMEMBERING * before:
            self._remembered[name] = size
            await asyncio.to_thread(self._sizes.remember, self._specs[name], size)
