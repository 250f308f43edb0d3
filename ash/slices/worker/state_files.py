"""KV states as files: one a session, in a folder that belongs to one model and one set of KV settings.

A file is written under another name and renamed, and carries a checksum: after a power failure a damaged one
is noticed and dropped. Nothing is synced to the disk, since all of it can be computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from ash.slices.worker.sequence import SequenceRecord, TokenSequence

MAGIC: Final = b"ASHKV\x00\x02\n"
SUFFIX: Final = ".kv"
_LENGTH_BYTES: Final = 4


class Checkpoint(Struct, frozen=True):
    """The sliding windows of a sequence when it had `length` tokens in the cache."""

    length: int
    windows: bytearray


class SavedState(Struct, frozen=True):
    """The tokens of a session and the KV state of those that were computed.

    The checkpoint is not written to the disk: it takes nearly as much as the state, and only turns that are
    edited or retried come back to it.
    """

    sequence: SequenceRecord
    state: bytearray
    checkpoint: Checkpoint | None = None

    @property
    def size(self) -> int:
        """Bytes of KV state."""
        return len(self.state) + (len(self.checkpoint.windows) if self.checkpoint is not None else 0)


class _Header(Struct, frozen=True, array_like=True):
    session: str
    sequence: bytes
    state_bytes: int
    crc32: int


def file_name(session: str) -> str:
    """The name of the file of `session`; session ids may hold characters that file names may not."""
    return hashlib.blake2b(session.encode("utf-8", "replace"), digest_size=16).hexdigest() + SUFFIX


class StateFolder:
    """The files of one model under a budget; the least recently used leave first.

    Args:
        path: the folder; made if it does not exist, readable by its owner only.
        limit_bytes: the most bytes of all files.

    Raises:
        OSError: the folder cannot be made or read.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path = path
        self._limit = limit_bytes
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        found: list[tuple[int, str, int]] = []
        for entry in os.scandir(path):
            if entry.name.endswith(SUFFIX):
                status = entry.stat()
                found.append((status.st_mtime_ns, entry.name, status.st_size))
            else:
                # A writer was killed in the middle.
                Path(entry.path).unlink(missing_ok=True)
        self._sizes: OrderedDict[str, int] = OrderedDict((name, size) for _, name, size in sorted(found))
        self.total_bytes = sum(self._sizes.values())
        self._complained = False

    @property
    def count(self) -> int:
        """Number of files."""
        return len(self._sizes)

    def write(self, session: str, saved: SavedState) -> Path | None:
        """Write a file that `publish` makes the session's own; None when the disk refuses it."""
        state = saved.state
        sequence = msgspec.msgpack.encode(saved.sequence)
        crc32 = zlib.crc32(state, zlib.crc32(sequence))
        header = msgspec.msgpack.encode(_Header(session, sequence, len(state), crc32))
        temporary: Path | None = None
        try:
            with tempfile.NamedTemporaryFile(dir=self._path, suffix=".tmp", delete=False) as file:
                temporary = Path(file.name)
                file.write(MAGIC + len(header).to_bytes(_LENGTH_BYTES, "little") + header)
                file.write(state)
        except OSError as error:
            if temporary is not None:
                self.discard(temporary)
            self._complain(f"KV state of a session cannot be written to {self._path}: {error.strerror}")
            return None
        self._complained = False
        return temporary

    def publish(self, session: str, written: Path) -> None:
        """Put a written file in the place of the session's earlier one, and keep to the budget."""
        name = file_name(session)
        try:
            size = written.stat().st_size
            written.replace(self._path / name)
        except OSError as error:
            self._complain(f"KV state cannot be put into {self._path}: {error.strerror}")
            self.discard(written)
            return
        self._forget(name)
        self._sizes[name] = size
        self.total_bytes += size
        while self.total_bytes > self._limit:
            oldest = next(iter(self._sizes))
            self._unlink(oldest)

    def discard(self, written: Path) -> None:
        """Remove a written file that is not wanted any more."""
        try:
            written.unlink(missing_ok=True)
        except OSError as error:
            self._complain(f"KV state {written} cannot be removed: {error.strerror}")

    def read(self, session: str) -> SavedState | None:
        """The state of `session`; None when there is none or its file is damaged, which removes it."""
        name = file_name(session)
        if name not in self._sizes:
            return None
        try:
            saved = _read(self._path / name, session)
            with contextlib.suppress(OSError):
                os.utime(self._path / name)  # a read-only disk can still be read
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            self._complain(f"KV state {name} in {self._path} is of no use and is dropped: {error}")
            self._unlink(name)
            return None
        self._sizes.move_to_end(name)
        return saved

    def holds(self, session: str) -> bool:
        """True when `session` has a file."""
        return file_name(session) in self._sizes

    def remove(self, session: str) -> None:
        """Remove the file of `session`, if there is one."""
        name = file_name(session)
        if name in self._sizes:
            self._unlink(name)

    def _unlink(self, name: str) -> None:
        try:
            (self._path / name).unlink(missing_ok=True)
        except OSError as error:
            self._complain(f"KV state {name} cannot be removed from {self._path}: {error.strerror}")
        self._forget(name)

    def _forget(self, name: str) -> None:
        self.total_bytes -= self._sizes.pop(name, 0)

    def _complain(self, message: str) -> None:
        # Once until it works again: a full disk refuses every turn of every session.
        if not self._complained:
            self._complained = True
            sys.stderr.write(f"{message}; sessions are computed again where their state is missing\n")


def _read(path: Path, session: str) -> SavedState:
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it is not a KV state of this version")
        left = os.fstat(file.fileno()).st_size - len(MAGIC) - _LENGTH_BYTES
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > left:
            raise ValueError("it was cut off")
        header = msgspec.msgpack.decode(file.read(length), type=_Header)
        if header.session != session or header.state_bytes != left - length:
            raise ValueError("it was cut off, or belongs to another session")
        state = bytearray(header.state_bytes)
        file.readinto(state)
    if zlib.crc32(state, zlib.crc32(header.sequence)) != header.crc32:
        raise ValueError("its checksum does not match")
    sequence = msgspec.msgpack.decode(header.sequence, type=SequenceRecord)
    TokenSequence.of(sequence)  # raises ValueError here, where it costs the file only
    return SavedState(sequence, state)
