"""The light encoder: a small BERT in the server's own process, on one core, beside the event loop."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ash.domain.errors import ConfigError, EncoderUnavailable
from ash.encoders.tokens import RequestTokens, padded

if TYPE_CHECKING:
    import onnxruntime

GRAPH_FILE = "encoder.onnx"
TOKENIZER_FILE = "tokenizer.json"

TOKEN_IDS, MASK, VECTORS = "ids", "mask", "vectors"
"""Inputs of the graph, int64 and float32 of shape (texts, tokens), and its output, float32 of shape
(texts, width)."""

# A call with more texts lets others in between.
_TEXTS_IN_A_ROW = 16


class LightEncoder:
    """Implements the Encoder port with an ONNX model; its one thread leaves the interpreter free.

    Each text is encoded alone: activations are quantised over a whole batch, so that neighbours would change
    a vector, and on one core a batch saves next to nothing.
    """

    def __init__(self, folder: Path) -> None:
        """Take the model in `folder`; nothing is loaded before `open`.

        Args:
            folder: holds GRAPH_FILE and TOKENIZER_FILE, made by ash.encoders.tuning.

        Raises:
            ConfigError: one of them is missing.
        """
        for name in (GRAPH_FILE, TOKENIZER_FILE):
            if not (folder / name).is_file():
                raise ConfigError(f"light encoder: {folder} holds no {name}; make it with `ash router fit`")
        self._folder = folder
        self._identity: str | None = None
        self._session: onnxruntime.InferenceSession | None = None
        self._tokens: RequestTokens | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._dimensions: int | None = None

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
        """`light@sha256:...`, over the model's file."""
        if self._identity is None:
            with (self._folder / GRAPH_FILE).open("rb") as file:
                self._identity = f"light@sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        return self._identity

    async def open(self) -> None:
        """Load the model. Idempotent.

        Raises:
            EncoderUnavailable: the files are damaged.
        """
        if self._thread is not None:
            return
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="light-encoder")
        try:
            await asyncio.get_running_loop().run_in_executor(thread, self._load)
        except BaseException:
            thread.shutdown(wait=False)
            raise
        self._thread = thread

    async def close(self) -> None:
        """Free the model; later calls raise EncoderUnavailable."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.to_thread(thread.shutdown)
            self._session = None

    async def encode(self, texts: Sequence[str]) -> list[list[float]]:
        """See the port. A text counts by its first 64 and last 32 tokens."""
        vectors: list[list[float]] = []
        for start in range(0, max(1, len(texts)), _TEXTS_IN_A_ROW):
            # Asked anew each time: the encoder may be closed meanwhile.
            if self._thread is None:
                raise EncoderUnavailable("the encoder is closed; open it first")
            part = texts[start : start + _TEXTS_IN_A_ROW]
            vectors += await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, part)
        return vectors

    def _load(self) -> None:
        # 40 MB that only a server with a light encoder shall pay for.
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # The other cores are decoding; a second thread here would slow both down.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(
                str(self._folder / GRAPH_FILE), options, providers=["CPUExecutionProvider"]
            )
            self._tokens = RequestTokens(self._folder / TOKENIZER_FILE)
        # The runtime's errors have no common base but Exception.
        except Exception as error:
            raise EncoderUnavailable(
                f"the light encoder in {self._folder} cannot be loaded: {error}; "
                "remove the folder and make it anew with `ash router fit`"
            ) from error
        self._dimensions = int(self._session.get_outputs()[0].shape[1])

    def _encode(self, texts: Sequence[str]) -> list[list[float]]:
        assert self._session is not None
        assert self._tokens is not None
        vectors: list[list[float]] = []
        for text in texts:
            tokens, mask = padded([self._tokens.ids(text)])
            (found,) = self._session.run([VECTORS], {TOKEN_IDS: tokens, MASK: mask})
            vector = np.asarray(found[0], dtype=np.float64)
            # Means over tokens have any length; the port promises unit vectors.
            vectors.append((vector / np.linalg.norm(vector)).tolist())
        return vectors
