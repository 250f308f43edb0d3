"""LocalEngine: runs one slice in a worker process of its own (port Engine)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import structlog
from msgspec import structs

from ash.domain.errors import (
    ChildExited,
    EngineCrashed,
    FrameError,
    ModelFileError,
    PromptTooLong,
    SliceUnavailable,
    TemplateError,
)
from ash.domain.values import Admitted, Delta, EngineItem, Finished, GenerateRequest
from ash.ipc.child import ChildExit, ChildProcess
from ash.slices.cancellation import unless
from ash.slices.models import prepare_model
from ash.slices.spec import SliceSpec
from ash.slices.templates import template_source
from ash.slices.worker.messages import (
    UNACKNOWLEDGED_TOKENS,
    Acknowledge,
    Begun,
    Cancel,
    Configure,
    Ended,
    FromWorker,
    Generate,
    LoadFailed,
    Ping,
    Pong,
    Progress,
    Ready,
    Refused,
    Step,
    ToWorker,
    Update,
    WorkerStatistics,
)

_ACKNOWLEDGE_EVERY: Final = UNACKNOWLEDGED_TOKENS // 4
_QUEUED_UPDATES: Final = 2 * UNACKNOWLEDGED_TOKENS
"""The worker pauses a generation long before this many updates wait, so a full queue is a fault of it."""

_log = structlog.get_logger(__name__)


class _Worker:
    """One worker process, from its start to its end, and the generations that run on it."""

    def __init__(
        self, spec: SliceSpec, *, heartbeat_limit_s: float, step_limit_s: float, load_limit_s: float
    ) -> None:
        self._spec = spec
        self._heartbeat_limit_s = heartbeat_limit_s
        self._step_limit_s = step_limit_s
        self._load_limit_s = load_limit_s
        self._process = ChildProcess[ToWorker, FromWorker](
            "ash.slices.worker",
            name=f"slice {spec.name}",
            payload_type=FromWorker,
            on_message=self._on_message,
            on_exit=self._on_exit,
        )
        self._loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._queues: dict[int, asyncio.Queue[Update | EngineCrashed]] = {}
        self._next_id = 0
        self._pongs = asyncio.Event()
        self._heartbeat: asyncio.Task[None] | None = None
        self.statistics = WorkerStatistics()
        self.ended: ChildExit | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def ready(self) -> Ready | None:
        """What the worker said of itself once it had loaded the model; None before, and after its end."""
        if self.ended is not None or not self._loaded.done() or self._loaded.exception() is not None:
            return None
        return self._loaded.result()

    async def load(self, path: Path) -> Ready:
        """Start the process and load the model; a failure ends the process.

        Raises:
            ModelFileError: llama.cpp refuses the file.
            SliceUnavailable: anything else that keeps it from loading.
        """
        source = template_source(self._spec.template) if self._spec.template is not None else None
        try:
            await self._process.start()
            self._heartbeat = asyncio.create_task(self._watch(), name=f"heartbeat of {self._spec.name}")
            self._tell(Configure(self._spec, str(path), source))
            async with asyncio.timeout(self._load_limit_s):
                return await asyncio.shield(self._loaded)
        except ChildExited as error:
            raise SliceUnavailable(f"slice {self._spec.name}: {error}") from error
        except TimeoutError as error:
            raise SliceUnavailable(
                f"slice {self._spec.name} was not loaded after {self._load_limit_s:g} s"
            ) from error
        finally:
            if self.ready is None:
                await self.stop("the load failed")

    async def stop(self, cause: str) -> None:
        """End the process; what runs on it raises EngineCrashed."""
        if self._queues:
            self._process.kill(cause)
        await self._process.stop()
        if not self._loaded.done():
            self._loaded.cancel()

    def kill(self, cause: str) -> None:
        """End the process at once."""
        self._process.kill(cause)

    async def begin(self, request: GenerateRequest) -> tuple[int, asyncio.Queue[Update | EngineCrashed]]:
        """Start a generation; its updates come out of the queue, after a crash the error behind them."""
        if self.ended is not None:
            raise EngineCrashed(f"the worker of slice {self._spec.name} {self.ended.describe()}")
        number = self._next_id
        self._next_id += 1
        queue: asyncio.Queue[Update | EngineCrashed] = asyncio.Queue(_QUEUED_UPDATES)
        self._queues[number] = queue
        try:
            await self._process.send(Generate(number, _encodable(request)))
        except FrameError as error:
            del self._queues[number]
            raise PromptTooLong(f"slice {self._spec.name}: {error}", limit=self._spec.context) from error
        except ChildExited:
            # The queue tells how it died as soon as that is known.
            return number, queue
        return number, queue

    def cancel(self, number: int) -> None:
        self._tell(Cancel(number))

    def acknowledge(self, number: int, tokens: int) -> None:
        self._tell(Acknowledge(number, tokens))

    def leave(self, number: int) -> None:
        """The consumer is gone; stop its generation if it still runs."""
        if self._queues.pop(number, None) is not None:
            self.cancel(number)

    def _tell(self, message: ToWorker) -> None:
        # To a worker that has ended there is nothing left to say; its end is reported on its own.
        with contextlib.suppress(ChildExited):
            self._process.post(message)

    def _on_message(self, message: FromWorker) -> None:
        match message:
            case Step():
                for update in message.updates:
                    self._deliver(update)
            case Pong():
                self.statistics = message.statistics
                self._pongs.set()
            case Ready():
                if not self._loaded.done():
                    self._loaded.set_result(message)
            case LoadFailed():
                kind = ModelFileError if message.kind == "model_file" else SliceUnavailable
                self._fail_load(kind(message.reason))

    def _deliver(self, update: Update) -> None:
        queue = self._queues.get(update.id)
        if queue is None:
            return
        if isinstance(update, Ended | Refused):
            del self._queues[update.id]
        queue.put_nowait(update)

    def _on_exit(self, ended: ChildExit) -> None:
        self.ended = ended
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        description = f"the worker of slice {self._spec.name} {ended.describe()}"
        self._fail_load(SliceUnavailable(f"{description} while it loaded the model"))
        if self._queues:
            _log.error("worker ended under its generations", slice=self._spec.name, reason=ended.describe())
        for queue in self._queues.values():
            if queue.full():
                # Only a faulty worker fills a queue; the consumer must learn of the end all the same.
                queue.get_nowait()
            queue.put_nowait(EngineCrashed(description))
        self._queues.clear()

    def _fail_load(self, error: ModelFileError | SliceUnavailable) -> None:
        if not self._loaded.done():
            self._loaded.set_exception(error)
            self._loaded.exception()  # mark it as seen: the caller of load may have been cancelled

    async def _watch(self) -> None:
        """Ask for a sign of life again and again; kill a worker that gives none, or whose step hangs."""
        # The first answer comes once the interpreter and llama.cpp have started, on a busy machine late.
        limit = self._load_limit_s
        for number in itertools.count():
            self._pongs.clear()
            self._tell(Ping(number))
            try:
                await asyncio.wait_for(self._pongs.wait(), limit)
            except TimeoutError:
                self.kill(f"it gave no sign of life for {limit:g} s")
                return
            limit = self._heartbeat_limit_s
            if self.statistics.step_age_s > self._step_limit_s:
                self.kill(f"one step took more than {self._step_limit_s:g} s")
                return
            await asyncio.sleep(self._heartbeat_limit_s / 4)


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
        step_limit_s: a decode step that takes longer counts as a crash.
        heartbeat_limit_s: so does a worker that does not answer for so long.
        load_limit_s: a load that takes longer fails.
    """

    def __init__(
        self,
        spec: SliceSpec,
        *,
        cache_folder: Path,
        step_limit_s: float = 120.0,
        heartbeat_limit_s: float = 10.0,
        load_limit_s: float = 600.0,
    ) -> None:
        self._spec = spec
        self._cache_folder = cache_folder
        self._step_limit_s = step_limit_s
        self._heartbeat_limit_s = heartbeat_limit_s
        self._load_limit_s = load_limit_s
        self._worker: _Worker | None = None
        self._loading: asyncio.Task[_Worker] | None = None
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

    async def ensure_worker(self) -> _Worker:
        """The running worker, started if there is none.

        Raises:
            ModelFileError, SliceUnavailable: as `open`; also when the engine is closed.
        """
        if self._closed:
            raise SliceUnavailable(f"slice {self.name} is closed; open it first")
        if self._worker is not None and self._worker.ready is not None:
            return self._worker
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._load(), name=f"load {self.name}")
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

    async def _load(self) -> _Worker:
        path = await asyncio.to_thread(prepare_model, self._spec, cache_folder=self._cache_folder)
        worker = _Worker(
            self._spec,
            heartbeat_limit_s=self._heartbeat_limit_s,
            step_limit_s=self._step_limit_s,
            load_limit_s=self._load_limit_s,
        )
        self._worker = worker
        ready = await worker.load(path)
        _log.info("slice loaded", slice=self.name, model=ready.description, seconds=round(ready.load_s, 2))
        return worker


def _encodable(request: GenerateRequest) -> GenerateRequest:
    """`request` with `?` for every lone surrogate, which Python strings can hold and UTF-8 cannot."""

    def encodable(text: str) -> str:
        return text.encode("utf-8", "replace").decode()

    return structs.replace(
        request,
        messages=tuple(
            structs.replace(message, text=encodable(message.text)) for message in request.messages
        ),
        continuation=encodable(request.continuation),
    )


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
        case Refused():
            raise EngineCrashed(f"slice {name}: {update.message}")
        case EngineCrashed():
            raise update
