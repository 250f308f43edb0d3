"""LocalEngine: runs one slice in a worker process of its own (port Engine)."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import structlog

from ash.domain.errors import EngineCrashed, FormatError, PromptTooLong, SliceUnavailable, TemplateError
from ash.domain.values import Admitted, Delta, EngineItem, Finished, GenerateRequest
from ash.slices.cancellation import unless
from ash.slices.models import prepare_model
from ash.slices.spec import SliceSpec
from ash.slices.state_folders import forget_states, model_states_folder
from ash.slices.worker.messages import (
    UNACKNOWLEDGED_TOKENS,
    Begun,
    Ended,
    Progress,
    Ready,
    Refused,
    Update,
    WorkerStatistics,
)
from ash.slices.worker_process import WorkerProcess

_ACKNOWLEDGE_EVERY: Final = UNACKNOWLEDGED_TOKENS // 4

_log = structlog.get_logger(__name__)


class LocalGeneration:
    """A generation of a LocalEngine (port Generation); it starts when it is iterated, once."""

    def __init__(self, engine: LocalEngine, request: GenerateRequest) -> None:
        self._engine = engine
        self._request = request
        self._cancelled = asyncio.Event()
        self._cancel_running: Callable[[], None] | None = None

    def cancel(self) -> None:
        """Stop, at the latest one step of the worker from now; also while the model still loads."""
        self._cancelled.set()
        if self._cancel_running is not None:
            self._cancel_running()

    async def __aiter__(self) -> AsyncIterator[EngineItem]:
        if self._cancelled.is_set():
            yield Finished("cancelled", 0)
            return
        worker = await unless(self._cancelled, self._engine.ensure_worker())
        if worker is None:
            yield Finished("cancelled", 0)
            return
        number, queue = await worker.begin(self._request)
        self._cancel_running = lambda: worker.cancel(number)
        if self._cancelled.is_set():
            worker.cancel(number)
        unacknowledged = 0
        try:
            while True:
                item = _item(await queue.get(), self._engine.name)
                match item:
                    case Progress():
                        yield Delta(item.text)
                        unacknowledged += item.tokens
                        if unacknowledged >= _ACKNOWLEDGE_EVERY:
                            worker.acknowledge(number, unacknowledged)
                            unacknowledged = 0
                    case Finished():
                        yield item
                        return
                    case _:
                        yield item
        finally:
            self._cancel_running = None
            worker.leave(number)


class LocalEngine:
    """Runs the slice of `spec` in a worker process (port Engine).

    Args:
        spec: what to run.
        cache_folder: where a model that comes in parts is put together.
        states_folder: where sessions' KV states outlive the worker; None keeps them in its RAM only.
        step_limit_s: a decode step that takes longer counts as a crash.
        heartbeat_limit_s: so does a worker that does not answer for so long.
        load_limit_s: a load that takes longer fails.
    """

    def __init__(
        self,
        spec: SliceSpec,
        *,
        cache_folder: Path,
        states_folder: Path | None = None,
        step_limit_s: float = 120.0,
        heartbeat_limit_s: float = 10.0,
        load_limit_s: float = 600.0,
    ) -> None:
        self._spec = spec
        self._cache_folder = cache_folder
        self._states_folder = states_folder / spec.name if states_folder is not None else None
        self._step_limit_s = step_limit_s
        self._heartbeat_limit_s = heartbeat_limit_s
        self._load_limit_s = load_limit_s
        self._worker: WorkerProcess | None = None
        self._loading: asyncio.Task[WorkerProcess] | None = None
        self._closed = False

    @property
    def name(self) -> str:
        """The slice's name."""
        return self._spec.name

    @property
    def loaded(self) -> bool:
        """True while the model is in memory and ready."""
        return self.ready is not None

    @property
    def ready(self) -> Ready | None:
        """Sizes and context of the loaded model; None while it is not loaded."""
        return self._worker.ready if self._worker is not None else None

    @property
    def pid(self) -> int | None:
        """Process id of the worker, also while it loads; None while it does not run."""
        return self._worker.pid if self._worker is not None else None

    def statistics(self) -> WorkerStatistics:
        """The worker's counters as of its last sign of life; zeros while it does not run."""
        return self._worker.statistics if self._worker is not None else WorkerStatistics()

    def resident_bytes(self) -> int:
        """Memory of the worker as proportional set size: pages shared with others count in parts."""
        pid = self.pid
        if pid is None:
            return 0
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
        except (FileNotFoundError, ProcessLookupError):
            # It ended between the question and the answer.
            return 0
        return 0

    async def open(self) -> None:
        """Load the model; callers at the same time share one load. Opens a closed engine again.

        Raises:
            ModelFileError: the model file is missing, damaged or foreign.
            SliceUnavailable: the worker could not load it.
        """
        self._closed = False
        await self.ensure_worker()

    async def close(self) -> None:
        """Free everything. Running generations raise EngineCrashed."""
        self._closed = True
        loading, self._loading = self._loading, None
        if loading is not None and not loading.done():
            loading.cancel()
            await asyncio.wait({loading})
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.stop("the engine was closed")

    def generate(self, request: GenerateRequest) -> LocalGeneration:
        """See the port. The model is loaded if it is not."""
        return LocalGeneration(self, request)

    async def forget(self, session_id: str) -> None:
        """Remove the KV state of a session that was deleted, in memory and on disk."""
        if self._worker is not None:
            self._worker.forget(session_id)
        if self._states_folder is not None:
            await asyncio.to_thread(forget_states, self._states_folder, session_id)

    async def ensure_worker(self) -> WorkerProcess:
        """The running worker, started if there is none.

        Raises:
            ModelFileError, SliceUnavailable: as `open`; also when the engine is closed.
        """
        if self._closed:
            raise SliceUnavailable(f"slice {self.name} is closed; open it first")
        if self._worker is not None and self._worker.ready is not None:
            return self._worker
        if self._loading is None or self._loading.done():
            # A context of its own: the worker outlives the run that happens to start it, also in the log.
            self._loading = asyncio.create_task(
                self._load(), name=f"load {self.name}", context=contextvars.Context()
            )
            # Marks a failure as seen, should every caller have gone by then.
            self._loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        loading = self._loading
        try:
            # A caller that is cancelled leaves the load to the others.
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            if loading.cancelled():
                raise SliceUnavailable(f"slice {self.name} was closed while it was loaded") from None
            raise

    async def _load(self) -> WorkerProcess:
        path = await asyncio.to_thread(prepare_model, self._spec, cache_folder=self._cache_folder)
        folder: Path | None = None
        if self._states_folder is not None:
            folder = await asyncio.to_thread(
                model_states_folder, self._states_folder, self._spec, path, cache_folder=self._cache_folder
            )
        worker = WorkerProcess(
            self._spec,
            heartbeat_limit_s=self._heartbeat_limit_s,
            step_limit_s=self._step_limit_s,
            load_limit_s=self._load_limit_s,
        )
        self._worker = worker
        ready = await worker.load(path, folder)
        _log.info("slice loaded", slice=self.name, model=ready.description, seconds=round(ready.load_s, 2))
        return worker


def _item(update: Update | EngineCrashed, name: str) -> Admitted | Progress | Finished:
    """What an update means to the consumer; raises the errors among them."""
    match update:
        case Begun():
            return Admitted(update.prompt_tokens, update.reused_tokens, update.dropped_messages)
        case Progress():
            return update
        case Ended():
            return Finished(update.reason, update.output_tokens, update.prefill_s, update.decode_s)
        case Refused(kind="too_long"):
            raise PromptTooLong(update.message, limit=update.limit)
        case Refused(kind="template"):
            raise TemplateError(update.message)
        case Refused(kind="format"):
            raise FormatError(update.message)
        case Refused():
            raise EngineCrashed(f"slice {name}: {update.message}")
        case EngineCrashed():
            raise update
