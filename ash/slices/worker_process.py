"""One worker process as the server sees it: its load, its generations, its heartbeat and its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
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
)
from ash.domain.values import GenerateRequest
from ash.ipc.child import ChildExit, ChildProcess
from ash.slices.spec import SliceSpec
from ash.slices.templates import template_source
from ash.slices.worker.messages import (
    UNACKNOWLEDGED_TOKENS,
    Acknowledge,
    Cancel,
    Configure,
    Ended,
    Forget,
    FromWorker,
    Generate,
    LoadFailed,
    Ping,
    Pong,
    Ready,
    Refused,
    Step,
    ToWorker,
    Update,
    WorkerStatistics,
)

_QUEUED_UPDATES: Final = 2 * UNACKNOWLEDGED_TOKENS
"""The worker pauses a generation long before this many updates wait, so a full queue is a fault of it."""

_log = structlog.get_logger(__name__)


class WorkerProcess:
    """One worker process, from its start to its end, and the generations that run on it.

    An object starts one process; after its end a new object takes its place.

    Args:
        spec: what it runs.
        heartbeat_limit_s: a worker that does not answer for so long is killed.
        step_limit_s: so is one whose decode step takes longer.
        load_limit_s: a load that takes longer fails.

    Attributes:
        statistics: the worker's counters as of its last sign of life.
        ended: how it ended; None while it runs.
    """

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
            # Without it ggml starts a debugger on the process that it is about to abort: seconds, and no use.
            environment={"GGML_NO_BACKTRACE": "1", **_thread_environment()},
        )
        self._loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._queues: dict[int, asyncio.Queue[Update | EngineCrashed]] = {}
        self._next_id = 0
        self._pongs = asyncio.Event()
        self._heartbeat: asyncio.Task[None] | None = None
        self.statistics = WorkerStatistics()
        self.ended: ChildExit | None = None
        self._path: Path | None = None

    @property
    def pid(self) -> int | None:
        """Process id; None while it does not run."""
        return self._process.pid

    @property
    def ready(self) -> Ready | None:
        """What the worker said of itself once it had loaded the model; None before, and after its end."""
        if self.ended is not None or not self._loaded.done() or self._loaded.exception() is not None:
            return None
        return self._loaded.result()

    async def load(self, path: Path, states_folder: Path | None = None) -> Ready:
        """Start the process and load the model; a failure ends the process.

        KV states are kept in `states_folder`.

        Raises:
            ModelFileError: llama.cpp refuses the file.
            SliceUnavailable: anything else that keeps it from loading.
        """
        self._path = path
        source = template_source(self._spec.template) if self._spec.template is not None else None
        try:
            await self._process.start()
            self._heartbeat = asyncio.create_task(self._watch(), name=f"heartbeat of {self._spec.name}")
            folder = str(states_folder) if states_folder is not None else None
            self._tell(Configure(self._spec, str(path), source, folder))
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
        """Start a generation; its updates come out of the queue, after a crash the error behind them.

        Raises:
            EngineCrashed: the worker has ended already.
            PromptTooLong: the request does not even fit a frame.
        """
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
        except asyncio.CancelledError:
            # It may be sent already, and nobody would take what it writes.
            self.leave(number)
            raise
        except ChildExited:
            # The queue tells how it died as soon as that is known.
            return number, queue
        return number, queue

    def cancel(self, number: int) -> None:
        """Ask a generation to end; harmless when it has."""
        self._tell(Cancel(number))

    def acknowledge(self, number: int, tokens: int) -> None:
        """Say that the consumer has taken `tokens` more tokens."""
        self._tell(Acknowledge(number, tokens))

    def forget(self, session_id: str) -> None:
        """Remove what the worker has of a session that was deleted."""
        self._tell(Forget(session_id))

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
        self._fail_load(
            SliceUnavailable(
                f"{description} while it loaded the model {self._path}; if it happens again, memory is too "
                "small, or the file is none that llama.cpp can take"
            )
        )
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


def _thread_environment() -> dict[str, str]:
    """How the decoding threads wait for each other; what the user has set stands.

    By default libgomp's threads spin for as long as it takes. Beside one busy process that starves the thread
    that they wait for: from 196 tokens a second to 4. A short spin, then sleep, costs nothing on an idle
    machine and keeps 60 to 80 (docs/decisions/).
    """
    if any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")):
        return {}
    return {"GOMP_SPINCOUNT": "1000"}


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
