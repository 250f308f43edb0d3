"""The encoder process: `python -m ash.encoders.worker FD`.

A process of its own, because the model and its libraries take half a gigabyte and five seconds to import,
and because the server shall outlive whatever they do.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ash.domain.errors import FrameError
from ash.encoders.frames import Encoded, LoadModel, Ready, ToWorker
from ash.ipc.parent import ParentConnection, die_with_parent


class Model:
    """A sentence-transformers model on one core."""

    def __init__(self, folder: Path) -> None:
        """Load the model in `folder`; nothing is fetched.

        Raises:
            OSError, ValueError: the folder does not hold a model that the library can load.
        """
        # Read when the libraries are imported, which is why they are imported here and not at the top.
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TRANSFORMERS_OFFLINE"] = "1"
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        # stderr belongs to what went wrong.
        logging.disable_progress_bar()
        # The other cores are decoding; a second thread here would slow both down.
        torch.set_num_threads(1)
        self._model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors, shape (texts, dimensions)."""
        vectors = self._model.encode(
            list(texts),
            batch_size=max(1, len(texts)),
            normalize_embeddings=True,
            show_progress_bar=False,
            convert_to_numpy=True,
        )
        return np.asarray(vectors, dtype="<f4")


def serve(connection: ParentConnection[ToWorker]) -> None:
    """Load, then answer requests in order until the server closes the channel. They come in batches.

    Raises:
        FrameError: a request came before a model.
    """
    model: Model | None = None
    for request in connection.messages():
        if isinstance(request, LoadModel):
            model = Model(Path(request.folder))
            connection.send(Ready(dimensions=model.encode(["warm up"]).shape[1]))
        elif model is None:
            raise FrameError("the encoder process got texts before a model; send LoadModel first")
        else:
            connection.send(Encoded(request.number, model.encode(request.texts).tobytes()))


def main() -> None:
    """Run the process; its argument is the channel's file descriptor."""
    # Ctrl-C in a terminal reaches the whole process group; the server decides what ends when.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    serve(ParentConnection(int(sys.argv[1]), ToWorker))


if __name__ == "__main__":
    main()
