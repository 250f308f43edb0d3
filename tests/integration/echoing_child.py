"""A child process for test_child_process.py: echoes, and misbehaves when it is told to."""

import os
import sys
import time

from ash.ipc.parent import ParentConnection, die_with_parent


def main() -> None:
    die_with_parent()
    parent = ParentConnection[str](int(sys.argv[1]), str)
    parent.send("ready")
    for message in parent.messages():
        match message:
            case "garbage":
                os.write(int(sys.argv[1]), b"\xff\xff\xff\xff")
            case "abort":
                sys.stderr.write("about to abort\n")
                sys.stderr.flush()
                os.abort()
            case "close":
                parent.close()
                while True:
                    time.sleep(60)
            case "stay":
                while True:
                    time.sleep(60)
            case "variable":
                parent.send(os.environ["ECHO_VARIABLE"])
            case _:
                parent.send(message)
    parent.send("bye")


if __name__ == "__main__":
    main()
