"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ash.domain.errors import StudyError


@contextmanager
def replacing(paths: Sequence[Path], *, force: bool) -> Iterator[tuple[Path, ...]]:
    """Temporary files to write in the place of `paths`; at the end of the block they take those names.

    Each stands in the folder of its target and has its suffix. All are on the disk before the first is
    renamed, so a full disk or an error inside the block leaves the targets as they were.

    Raises:
        StudyError: a target exists and `force` is false, its folder is missing, or the disk is full.
    """
    for path in paths:
        _refuse(path, force=force)
    temporary: list[Path] = []
    try:
        for path in paths:
            handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
            os.close(handle)
            temporary.append(Path(name))
        yield tuple(temporary)
        for path, written in zip(paths, temporary, strict=True):
            _refuse(path, force=force)
            _flush(written)
        for path, written in zip(paths, temporary, strict=True):
            written.replace(path)
        _flush_folder(paths[0].parent)
    except OSError as error:
        raise StudyError(
            f"{paths[0]} was not written: {error.strerror or error}; nothing is left under that name"
        ) from error
    finally:
        for written in temporary:
            written.unlink(missing_ok=True)


def _refuse(path: Path, *, force: bool) -> None:
    if not path.parent.is_dir():
        raise StudyError(f"there is no folder {path.parent}; make it, or write elsewhere with --out")
    if path.is_dir():
        raise StudyError(f"{path} is a folder; name a file with --out")
    if path.exists() and not force:
        raise StudyError(f"{path} exists; choose another --out, or overwrite it with --force")


def _flush(path: Path) -> None:
    # mkstemp makes files that only their owner may read; an export is an ordinary file.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
