"""SlicePool: which engine answers, and what happens when it does not (port Slices)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from types import MappingProxyType

import msgspec
import structlog

from ash.domain.errors import EngineCrashed, ModelFileError, SliceError, SliceUnavailable
from ash.domain.ports import Engine, Generation
from ash.domain.values import Admitted, Delta, Finished, GenerateRequest, SliceFacts, SliceItem, SliceNotice
from ash.slices.admission import SliceAdmission
from ash.slices.residency import ResidencyLimits
from ash.slices.sizes import SizeSource
from ash.slices.spec import SliceSpec

_log = structlog.get_logger(__name__)


class PooledGeneration:
    """A generation that survives crashes (port SliceGeneration); it starts when it is iterated, once.

    Every attempt yields an Admitted of its own; the last one counts.
    """

    def __init__(self, pool: SlicePool, slice_name: str, request: GenerateRequest) -> None:
        self._pool = pool
        self._slice_name = slice_name
        self._request = request
        self._cancelled = asyncio.Event()
        self._running: Generation | None = None
        self._arrival = pool.admission.arrive()

    def cancel(self) -> None:
        """Stop soon, also while waiting for a slice."""
        self._cancelled.set()
        if self._running is not None:
            self._running.cancel()

    async def __aiter__(self) -> AsyncIterator[SliceItem]:
        name = self._slice_name
        request = self._request
        crashed_before = fell_back = False
        while True:
            failure: SliceError
            try:
                async with aclosing(self._attempt(name, request)) as attempt:
                    async for item in attempt:
                        if isinstance(item, Delta):
                            shown = request.continuation + item.text
                            request = msgspec.structs.replace(request, continuation=shown)
                        yield item
                return
            except EngineCrashed as error:
                failure = error
                if not crashed_before and not self._pool.is_closed:
                    crashed_before = True
                    _log.warning("retrying a run on a fresh worker", slice=name, run=request.run_id)
                    yield SliceNotice(name, "crashed", str(error))
                    continue
            except (SliceUnavailable, ModelFileError) as error:
                failure = error
            fallback = self._pool.fallback_of(name)
            if fallback is None or fell_back:
                raise failure
            fell_back = crashed_before = True
            _log.warning("a run falls back", slice=name, to=fallback, run=request.run_id, reason=str(failure))
            yield SliceNotice(name, "fell back", str(failure), to=fallback)
            name = fallback

    async def _attempt(self, name: str, request: GenerateRequest) -> AsyncGenerator[SliceItem, None]:
        engine = self._pool.engine(name)
        admission = self._pool.admission
        async with admission.place(name, self._arrival, self._cancelled) as notices:
            if notices is None:
                yield Finished("cancelled", 0)
                return
            for notice in notices:
                yield notice
            admitted: Admitted | None = None
            self._running = engine.generate(request)
            try:
                async for item in self._running:
                    match item:
                        case Admitted():
                            admitted = item
                        case Finished() if admitted is not None:
                            admission.meters[name].answered(admitted, item)
                    yield item
            finally:
                # Ends it when the consumer has left in the middle; harmless when it is over.
                self._running.cancel()
                self._running = None


class SlicePool:
    """All slices (port Slices). When they are loaded and evicted is decided by `residency`.

    Args:
        engines: by slice name.
        specs: the catalogue, checked by `catalog.validate`.
        limits: memory budget and times; the default has no budget, and nothing is evicted.
        sizes: what slices are expected to take; None only without a budget.
        measure: by slice name, the bytes that it takes now; slices without stay at what was expected.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        specs: Sequence[SliceSpec],
        *,
        limits: ResidencyLimits | None = None,
        sizes: SizeSource | None = None,
        measure: Mapping[str, Callable[[], int]] = MappingProxyType({}),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engines = dict(engines)
        self._specs = {spec.name: spec for spec in specs}
        self.admission = SliceAdmission(
            self._engines,
            specs,
            limits=limits or ResidencyLimits(),
            sizes=sizes,
            measure=measure,
            clock=clock,
        )
        self.is_closed = False

    def facts(self) -> tuple[SliceFacts, ...]:
        """Every slice, in the order of the catalogue."""
        return tuple(
            SliceFacts(
                name=spec.name,
                tier=spec.tier,
                context=spec.context,
                vision=spec.vision,
                resident=self._engines[spec.name].loaded,
                rates=self.admission.meters[spec.name].rates(self.admission.bytes_of(spec.name)),
            )
            for spec in self._specs.values()
        )

    def generate(self, slice_name: str, request: GenerateRequest) -> PooledGeneration:
        """See the port."""
        return PooledGeneration(self, slice_name, request)

    async def forget(self, session_id: str) -> None:
        """See the port."""
        await asyncio.gather(*(engine.forget(session_id) for engine in self._engines.values()))

    async def close(self) -> None:
        """Close every engine; what runs ends with EngineCrashed and is not retried."""
        self.is_closed = True
        await self.admission.close()
        await asyncio.gather(*(engine.close() for engine in self._engines.values()))

    def engine(self, name: str) -> Engine:
        """The engine of a slice.

        Raises:
            SliceUnavailable: there is no such slice, or the pool is closed.
        """
        if self.is_closed:
            raise SliceUnavailable(f"slice {name} is not available: the server is stopping")
        engine = self._engines.get(name)
        if engine is None:
            raise SliceUnavailable(
                f"there is no slice {name!r}; the catalogue has {', '.join(self._specs) or 'none'}"
            )
        return engine

    def fallback_of(self, name: str) -> str | None:
        """The slice that answers when `name` keeps failing; None when there is none or all is closed."""
        spec = self._specs.get(name)
        return spec.fallback if spec is not None and not self.is_closed else None
