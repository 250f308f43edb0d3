"""Entry of the worker process: `python -m ash.slices.worker FD`."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys

from ash.ipc.parent import ParentConnection, die_with_parent
from ash.slices.worker.messages import ToWorker
from ash.slices.worker.service import WorkerService


def main() -> None:
    """Serve the model until the server closes the channel."""
    # A crash inside llama.cpp then says on stderr which call it was in.
    faulthandler.enable()
    # Ctrl-C in a terminal reaches the whole process group; the server decides what ends when.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    parent: ParentConnection[ToWorker] = ParentConnection(int(sys.argv[1]), ToWorker)
    WorkerService(parent).run()
    # The decode thread may be inside llama.cpp: tearing the interpreter down around it would crash.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
