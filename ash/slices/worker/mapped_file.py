"""Gives back the pages of a mapped model file that nothing needs any more.

llama.cpp maps a model file once and keeps the mapping as long as the model lives. Weights that its CPU back
end repacked are copies: the pages that they came from stay resident although nothing reads them again.
madvise(MADV_DONTNEED) takes such pages out of this process; what is read later comes back from the file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Final

from msgspec import Struct

from ash.slices.gguf import GgufHeader, GgufTensor, read_header

LAZY_TENSORS: Final = frozenset({"per_layer_token_embd.weight"})
"""What llama.cpp reads row by row from the file if it is asked to; its other tensor marked TENSOR_READ_LAZY
belongs to an experimental model."""

_SHARED_READ_ONLY: Final = "r--s"
_FOLIO_BYTES: Final = 2 * 1024 * 1024
_SMALL_TENSOR_BYTES: Final = 1024 * 1024
"""Norms and the like. They stand between the matrices of their layer, so each is a place of its own."""
_RELEASE_EVERY: Final = 1 / 32
"""Share of a load between two releases."""


class MappedRange(Struct, frozen=True):
    """Addresses from `start` up to, but without, `end`."""

    start: int
    end: int


def mapped_ranges(maps: str, path: str) -> list[MappedRange]:
    """Where a file is mapped shared and read-only. Pure.

    Other mappings are left out: a private one may hold changes that are nowhere else, and dropping its pages
    would lose them.

    Args:
        maps: text of /proc/PID/maps (proc_pid_maps(5)).
        path: absolute path of the file, without symbolic links.
    """
    # The only character that the kernel escapes there.
    shown = path.replace("\n", "\\012")
    ranges = []
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[1] == _SHARED_READ_ONLY and fields[5] == shown:
            start, end = (int(address, 16) for address in fields[0].split("-"))
            ranges.append(MappedRange(start, end))
    return ranges


def release_pages(path: Path) -> int:
    """Take the pages of the file at `path` out of this process; returns the bytes of its mappings.

    Safe at any time, from any thread: the mappings stay, and a page that is read again comes back unchanged.

    Raises:
        OSError: the kernel refused, such as for pages that are locked in memory.
    """
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    libc = ctypes.CDLL(None, use_errno=True)
    released = 0
    for mapped in mapped_ranges(maps, os.path.realpath(path)):
        size = mapped.end - mapped.start
        if libc.madvise(ctypes.c_void_p(mapped.start), ctypes.c_size_t(size), mmap.MADV_DONTNEED) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"madvise(MADV_DONTNEED) on the mapping of {path}: {os.strerror(code)}")
        released += size
    return released


def forget_cached(path: Path, spans: Iterable[tuple[int, int]]) -> None:
    """Ask the kernel to drop its cached copies of parts of a file; pages that are mapped anywhere stay.

    What is read of them later then comes in small pieces. Linux keeps a file that was read from end to end in
    pieces (folios) of up to 2 MiB, and maps a piece as a whole when one byte of it is read: on Linux 6.18
    each place that was touched made 2,048 KiB resident, and 4 to 64 KiB after this call.

    Args:
        path: the file.
        spans: first byte and first byte behind; widened to whole pieces.

    Raises:
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for start, end in spans:
            first = start // _FOLIO_BYTES * _FOLIO_BYTES
            length = -(-end // _FOLIO_BYTES) * _FOLIO_BYTES - first
            os.posix_fadvise(descriptor, first, length, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


class FilePages:
    """Keeps pages of a model file that nothing needs out of this process, before, during and after its load.

    A refusal of the kernel costs memory and nothing else: it is kept, and nothing is tried again.

    Args:
        path: the file.
        release: give back the pages of weights that were copied.
        lazy: tensors are read row by row from the map.

    Attributes:
        failure: why the kernel refused; None if it did not.
    """

    def __init__(self, path: Path, *, release: bool, lazy: bool) -> None:
        self._path = path
        self._release = release
        self._lazy = lazy
        self._next_release = _RELEASE_EVERY
        self.failure: OSError | None = None

    def before_load(self) -> None:
        """Forget cached rows of tensors that will be read row by row; a load does not need them.

        Raises:
            ModelFileError: the header of the file is damaged.
        """
        if self._lazy:
            self._forget(lambda tensor: tensor.name in LAZY_TENSORS)

    def while_loading(self, progress: float) -> None:
        """Release every so often, so that pages do not pile up. `progress` is what was loaded, 0 to 1."""
        if self._release and progress >= self._next_release:
            # A release costs the kernel a walk over the mapping, so not after every tensor.
            self._next_release = progress + _RELEASE_EVERY
            self._try(lambda: release_pages(self._path))

    def after_load(self) -> None:
        """Release what is left, and forget where small tensors stand: they are read again at every step.

        Raises:
            ModelFileError: the header of the file is damaged.
        """
        if self._release:
            self._try(lambda: release_pages(self._path))
            self._forget(lambda tensor: tensor.size < _SMALL_TENSOR_BYTES)

    @cached_property
    def _header(self) -> GgufHeader:
        # With a large vocabulary this takes half a second.
        return read_header(self._path)

    def _forget(self, chosen: Callable[[GgufTensor], bool]) -> None:
        header = self._header
        spans = [
            (header.data_start + tensor.offset, header.data_start + tensor.offset + tensor.size)
            for tensor in header.tensors
            if chosen(tensor)
        ]
        self._try(lambda: forget_cached(self._path, spans))

    def _try(self, action: Callable[[], object]) -> None:
        if self.failure is None:
            try:
                action()
            except OSError as error:
                self.failure = error
