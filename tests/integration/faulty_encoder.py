"""An encoder process for test_encoder_faults.py: no model, and it fails when a text tells it to.

The vector of a text is (its length, 1), so that a test can tell them apart.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np

from ash.encoders.frames import Encoded, LoadModel, Ready, ToWorker
from ash.ipc.parent import ParentConnection, die_with_parent


def obey(text: str) -> None:
    command, _, argument = text.partition(" ")
    match command:
        case "die":
            sys.stderr.write("out of luck\n")
            sys.stderr.flush()
            os._exit(7)
        case "die-once":
            if not Path(argument).exists():
                Path(argument).touch()
                os._exit(7)
        case "hang":
            while True:
                time.sleep(60)
        case "count":
            with Path(argument).open("a") as file:
                file.write("batch\n")


def main() -> None:
    die_with_parent()
    parent = ParentConnection[ToWorker](int(sys.argv[1]), ToWorker)
    for message in parent.messages():
        if isinstance(message, LoadModel):
            if (Path(message.folder) / "broken").exists():
                raise SystemExit("the weights are broken")
            parent.send(Ready(dimensions=2))
            continue
        for text in message.texts:
            obey(text)
        rows = np.array([[len(text), 1] for text in message.texts], dtype="<f4")
        parent.send(Encoded(message.number, rows.tobytes()))


if __name__ == "__main__":
    main()
