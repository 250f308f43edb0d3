"""How late the event loop runs what is due: the delay that everything on it suffers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

INTERVAL_S: Final = 0.05
"""Time between two measurements: 20 wake-ups a second cost nothing, and a second of load gives 20 samples."""


class LoopLag:
    """Measures the lag of one event loop until it is stopped.

    A callback is scheduled and compares the time at which it runs with the time at which it was due. Work
    that never yields delays it by exactly as long as it delays every client.

    Args:
        observe: takes each lag in seconds.
        interval_s: seconds between two measurements.
    """

    def __init__(self, observe: Callable[[float], None], *, interval_s: float = INTERVAL_S) -> None:
        self._observe = observe
        self._interval_s = interval_s
        self._handle: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Begin to measure `loop`, or the running one."""
        self._schedule(loop or asyncio.get_running_loop())

    def stop(self) -> None:
        """Measure no more; idempotent."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + self._interval_s

        def run() -> None:
            # A loop may run a callback early by the resolution of its clock.
            self._observe(max(0.0, loop.time() - due))
            self._schedule(loop)

        self._handle = loop.call_at(due, run)
