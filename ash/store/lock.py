"""One server per data folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from ash.domain.errors import DataFolderInUse, StoreError


class DataFolderLock:
    """An exclusive flock on `ash.lock` in the data folder; a context manager.

    The kernel releases it when the process ends, however it ends. The file stays: removing it would let two
    processes lock two files of the same name.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ash.lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock and write this process's id into the file; the folder is made if it is missing.

        Raises:
            DataFolderInUse: another holder is alive; the message names its process id.
            StoreError: the folder or the file cannot be made.
        """
        if self._descriptor is not None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(
                f"the data folder {self._path.parent} cannot be used: {error}; check its path and permissions"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise DataFolderInUse(
                f"the data folder {self._path.parent} is in use by process {holder}; stop that server or "
                "choose another folder"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise StoreError(f"{self._path} cannot be locked: {error}") from error
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        _exc_type: type[BaseException] | None,
        _exc: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.release()
