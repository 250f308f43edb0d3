"""KV state of sessions that have no slot: in RAM under a budget, and on disk, where it survives a restart.

Everything that is saved goes to disk behind the decode thread's back, so RAM can drop what it has no room for
and a killed process loses at most the turn that it was in.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

from ash.slices.worker.state_files import SavedState, StateFolder

_PATIENCE_S: Final = 2.0
"""How long saving waits for the disk when the process ends."""

_UNWRITTEN_BYTES: Final = 64 * 1024 * 1024
"""How much may wait for the disk before saving ahead of need pauses."""


class StateStore:
    """Saved states by session. All methods but `close` may be called from any thread.

    Args:
        ram_bytes: budget for states in RAM; the least recently saved leave first.
        folder: where states are written; None keeps them in RAM only.
        on_written: called from the writing thread after each file.
    """

    def __init__(
        self, *, ram_bytes: int, folder: StateFolder | None, on_written: Callable[[], None] = lambda: None
    ) -> None:
        self._ram_limit = ram_bytes
        self._folder = folder
        self._on_written = on_written
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._ram: OrderedDict[str, SavedState] = OrderedDict()
        self._ram_bytes = 0
        self._unwritten: dict[str, SavedState] = {}
        self._unwritten_bytes = 0
        self._jobs: SimpleQueue[str | None] = SimpleQueue()
        self._writer: threading.Thread | None = None
        if folder is not None:
            self._writer = threading.Thread(target=self._write, name="kv states", daemon=True)
            self._writer.start()

    # Read without the lock, which is held while a file is read: a slow disk must not delay a sign of life.

    @property
    def ram_sessions(self) -> int:
        """Sessions whose state is kept in RAM."""
        return len(self._ram)

    @property
    def ram_bytes(self) -> int:
        """Bytes of these states."""
        return self._ram_bytes

    @property
    def unwritten_sessions(self) -> int:
        """Sessions whose state waits for the disk."""
        return len(self._unwritten)

    @property
    def disk_sessions(self) -> int:
        """Sessions whose state is on disk."""
        return self._folder.count if self._folder is not None else 0

    @property
    def disk_bytes(self) -> int:
        """Bytes of the files."""
        return self._folder.total_bytes if self._folder is not None else 0

    def accepts(self, size: int, *, wait: bool = False) -> bool:
        """True when a state of `size` bytes can be saved ahead of need: there is a disk and it keeps up.

        One state of any size may wait. `wait` for the disk until there is room.
        """
        if self._folder is None:
            return False
        with self._room:
            if wait:
                self._room.wait_for(lambda: self._has_room(size), timeout=_PATIENCE_S)
            return self._has_room(size)

    def _has_room(self, size: int) -> bool:
        return not self._unwritten or self._unwritten_bytes + size <= _UNWRITTEN_BYTES

    def put(self, session: str, saved: SavedState, *, keep: bool, is_saved: bool = False) -> None:
        """Save a state; `keep` it in RAM too, for a session that has no slot any more.

        One that `is_saved` was put before and has not changed: it is not written again. What fits neither RAM
        nor the queue to the disk is dropped: it is computed again.
        """
        size = saved.size
        with self._lock:
            self._forget_ram(session)
            if keep and size <= self._ram_limit:
                self._ram[session] = saved
                self._ram_bytes += size
                while self._ram_bytes > self._ram_limit:
                    _, oldest = self._ram.popitem(last=False)
                    self._ram_bytes -= oldest.size
            if self._folder is None or (is_saved and self._is_on_its_way(session)):
                return
            self._drop_unwritten(session)
            if self._has_room(size):
                self._unwritten[session] = saved
                self._unwritten_bytes += size
                self._jobs.put(session)

    def _is_on_its_way(self, session: str) -> bool:
        assert self._folder is not None
        return session in self._unwritten or self._folder.holds(session)

    def take(self, session: str) -> SavedState | None:
        """The latest state of `session`, wherever it is; RAM gives it up. None if there is none."""
        with self._lock:
            saved = self._ram.get(session) or self._unwritten.get(session)
            self._forget_ram(session)
            if saved is None and self._folder is not None:
                saved = self._folder.read(session)
            return saved

    def forget(self, session: str) -> None:
        """Remove every trace of `session`."""
        with self._lock:
            self._forget_ram(session)
            self._drop_unwritten(session)
            if self._folder is not None:
                self._folder.remove(session)

    def close(self, timeout_s: float) -> None:
        """Write what waits, for `timeout_s` at most. Idempotent."""
        if self._writer is not None:
            self._jobs.put(None)
            self._writer.join(timeout_s)

    def _forget_ram(self, session: str) -> None:
        saved = self._ram.pop(session, None)
        if saved is not None:
            self._ram_bytes -= saved.size

    def _drop_unwritten(self, session: str) -> None:
        saved = self._unwritten.pop(session, None)
        if saved is not None:
            self._unwritten_bytes -= saved.size
            self._room.notify_all()

    def _write(self) -> None:
        assert self._folder is not None
        while (session := self._jobs.get()) is not None:
            with self._lock:
                saved = self._unwritten.get(session)
            if saved is None:
                continue
            written = self._folder.write(session, saved)
            with self._lock:
                # Meanwhile the session may have been forgotten, or saved anew.
                if self._unwritten.get(session) is saved:
                    self._drop_unwritten(session)
                    if written is not None:
                        self._folder.publish(session, written)
                elif written is not None:
                    self._folder.discard(written)
            self._on_written()
