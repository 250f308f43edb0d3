"""Carries out the policy of residency: runs wait here until their slice is loaded, and leave when done."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import structlog

from ash.domain.errors import SliceError, SliceTooLarge, SliceUnavailable
from ash.domain.ports import Engine
from ash.domain.values import SliceNotice
from ash.slices.cancellation import unless
from ash.slices.measurement import SizeTracker
from ash.slices.rates import RateMeter
from ash.slices.residency import Arrival, Eviction, Phase, Refusal, Residency, ResidencyLimits, Resident
from ash.slices.sizes import SizeSource
from ash.slices.spec import SliceSpec

_log = structlog.get_logger(__name__)


class SliceAdmission:
    """Lets runs in, loads and evicts, as `Residency` decides; everything happens on one event loop.

    Args:
        engines: by slice name.
        specs: the catalogue. Remote slices have no size: they wait for no room and are never evicted.
        limits: budget and times.
        sizes: expected sizes; None: slices take no room.
        measure: by slice name, the bytes that it takes now. May block for some milliseconds.
        clock: seconds, monotonic.

    Attributes:
        meters: measured rates by slice name.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        specs: Sequence[SliceSpec],
        *,
        limits: ResidencyLimits,
        sizes: SizeSource | None,
        measure: Mapping[str, Callable[[], int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engines = engines
        self._clock = clock
        self._residency = Residency(
            limits, [Resident(spec.name, slots=spec.slots, pinned=spec.pinned) for spec in specs]
        )
        self._tracker = SizeTracker(self._residency, specs, sizes, measure, clock, on_change=self._step)
        self.meters = {spec.name: RateMeter() for spec in specs}
        self._arrivals = 0
        self._turns: dict[Arrival, asyncio.Future[None]] = {}
        self._notices: defaultdict[str, list[SliceNotice]] = defaultdict(list)
        self._loads: set[asyncio.Task[None]] = set()
        self._evictions: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def arrive(self) -> Arrival:
        """The place of a new run among all runs; it keeps it when it has to ask for a slice again."""
        self._arrivals += 1
        return Arrival(self._arrivals, self._clock())

    def bytes_of(self, name: str) -> int | None:
        """What the slice takes or will take; None while that is unknown, or for a remote one."""
        return self._residency[name].bytes or None

    def is_waiting(self, name: str) -> bool:
        """True while runs wait for the slice."""
        return bool(self._residency[name].waiting)

    async def measured(self) -> None:
        """Wait until every measurement that has begun counts and is remembered."""
        await self._tracker.settled()

    @asynccontextmanager
    async def place(
        self, name: str, arrival: Arrival, cancelled: asyncio.Event
    ) -> AsyncIterator[list[SliceNotice] | None]:
        """Wait until the run may use the slice, which then stays loaded to the end of the block.

        Gives what happened on the way that nobody was told yet; None if `cancelled` came first.

        Raises:
            ModelFileError, SliceUnavailable: the slice cannot be loaded.
            SliceTooLarge: it exceeds the budget, whatever is evicted.
        """
        await unless(cancelled, self._tracker.expect(name))
        if cancelled.is_set():
            yield None
            return
        if self._is_closed:
            raise SliceUnavailable(f"slice {name} is not available: the server is stopping")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns[arrival] = turn
        self._residency.request(name, arrival)
        try:
            self._step()
            await unless(cancelled, turn)
            yield None if cancelled.is_set() else self._notices.pop(name, [])
        finally:
            # Whoever was turned away has left already.
            if self._turns.pop(arrival, None) is not None:
                self._residency.leave(name, arrival, self._clock())
                self._tracker.refresh(name)
                self._step()

    async def close(self) -> None:
        """Turn away who waits, and stop loading. The engines are the caller's to close."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for name in self._engines:
            self._turn_away(name, SliceUnavailable(f"slice {name} is not available: the server is stopping"))
        await self._tracker.close()
        for task in self._loads:
            task.cancel()
        # Evictions go on to their end: a worker that is being stopped must not be left half-way.
        if pending := self._loads | self._evictions:
            await asyncio.wait(pending)

    def _step(self) -> None:
        """Do what is to be done now."""
        if self._is_closed:
            return
        self._notice_engines()
        actions = self._residency.step(self._clock())
        for admission in actions.admit:
            self._turns[admission.arrival].set_result(None)
        for refusal in actions.refuse:
            self._turns.pop(refusal.arrival).set_exception(_too_large(refusal))
        for eviction in actions.evict:
            self._start_eviction(eviction)
        for name in actions.load:
            self._start_load(name)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if actions.wake_at is not None:
            delay = max(0.0, actions.wake_at - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._step)

    def _notice_engines(self) -> None:
        """A worker can crash, and an engine starts a fresh one for a generation that it holds already."""
        for name, engine in self._engines.items():
            match self._residency[name].phase:
                case Phase.READY if not engine.loaded:
                    self._residency.unloaded(name)
                case Phase.OUT if engine.loaded:
                    self._residency.loaded(name, self._clock())

    def _start_load(self, name: str) -> None:
        began = self._clock()
        task = asyncio.create_task(self._engines[name].open(), name=f"load slice {name}")
        self._loads.add(task)
        task.add_done_callback(lambda task: self._end_load(name, began, task))

    def _end_load(self, name: str, began: float, task: asyncio.Task[None]) -> None:
        self._loads.discard(task)
        if task.cancelled():
            # Only `close` does that.
            return
        error = task.exception()
        if error is None:
            seconds = self._clock() - began
            self._residency.loaded(name, self._clock())
            self._tracker.restart(name)
            self.meters[name].loaded(seconds)
            self._notices[name].append(SliceNotice(name, "loaded", f"{seconds:.1f} s"))
        else:
            self._residency.unloaded(name)
            self._turn_away(name, _as_slice_error(error, f"slice {name} cannot be loaded"))
        self._step()

    def _start_eviction(self, eviction: Eviction) -> None:
        size = self._residency[eviction.slice].bytes
        _log.info("evicting a slice", slice=eviction.slice, bytes=size, room_for=eviction.room_for)
        task = asyncio.create_task(self._engines[eviction.slice].close(), name=f"evict {eviction.slice}")
        self._evictions.add(task)
        task.add_done_callback(lambda task: self._end_eviction(eviction, size, task))

    def _end_eviction(self, eviction: Eviction, size: int, task: asyncio.Task[None]) -> None:
        self._evictions.discard(task)
        name, room_for = eviction.slice, eviction.room_for
        self._residency.unloaded(name)
        # What nobody was admitted to hear is over.
        self._notices.pop(name, None)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            # No step here: it would try the same again at once. The next run that comes or goes does.
            failure = _as_slice_error(error, f"slice {name} cannot be evicted")
            _log.error("a slice cannot be evicted", slice=name, reason=str(failure))
            if room_for is not None:
                self._turn_away(room_for, failure)
            return
        if room_for is not None:
            reason = f"{_megabytes(size)} of memory for {room_for}"
            self._notices[room_for].append(SliceNotice(name, "evicted", reason))
        self._step()

    def _turn_away(self, name: str, error: SliceError) -> None:
        for arrival in self._residency.fail_waiting(name):
            self._turns.pop(arrival).set_exception(error)


def _too_large(refusal: Refusal) -> SliceTooLarge:
    return SliceTooLarge(
        f"slice {refusal.slice} needs {_megabytes(refusal.needed_bytes)} of memory and "
        f"{_megabytes(refusal.available_bytes)} of the budget can be freed for it; raise "
        "residency.budget_bytes, unpin others, or lower its slots or context",
        needed_bytes=refusal.needed_bytes,
        available_bytes=refusal.available_bytes,
    )


def _as_slice_error(error: BaseException, what: str) -> SliceError:
    """`error`, or for one that no engine should raise a SliceUnavailable that names it."""
    if isinstance(error, SliceError):
        return error
    failure = SliceUnavailable(f"{what}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
