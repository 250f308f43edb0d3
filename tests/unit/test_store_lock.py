"""One server per data folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ash.domain.errors import DataFolderInUse, StoreError
from ash.store.lock import DataFolderLock

_HOLDS_FOREVER = """
import signal, sys
from pathlib import Path
from ash.store.lock import DataFolderLock
with DataFolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


def test_a_second_holder_learns_who_the_first_is(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with DataFolderLock(folder) as first:
        first.acquire()  # holding it twice is holding it
        with pytest.raises(DataFolderInUse, match=f"in use by process {os.getpid()}"):
            DataFolderLock(folder).acquire()
    with DataFolderLock(folder):
        pass


def test_the_kernel_releases_it_at_sigkill(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDS_FOREVER, str(tmp_path)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DataFolderInUse, match=str(holder.pid)):
            DataFolderLock(tmp_path).acquire()
        holder.send_signal(signal.SIGKILL)
    with DataFolderLock(tmp_path):
        assert (tmp_path / "ash.lock").read_text() == f"{os.getpid()}\n"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file/data"):
        DataFolderLock(tmp_path / "file" / "data").acquire()
