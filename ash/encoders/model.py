"""Where an encoder's model lies, and what it is."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from ash.domain.errors import ConfigError

# Every sentence-transformers model lists its parts in this file.
_MODULES = "modules.json"
_WEIGHTS = "model.safetensors"


def model_folder(reference: str) -> Path:
    """The folder of a sentence-transformers model.

    Args:
        reference: `package:NAME`, the distribution that holds it, or `path:FOLDER`.

    Raises:
        ConfigError: there is no model; says what to do.
    """
    kind, _, name = reference.partition(":")
    if kind == "package":
        folder = _folder_in_package(name)
    elif kind == "path":
        folder = Path(name).expanduser()
    else:
        raise ConfigError(f"encoder model {reference!r}: write package:NAME or path:FOLDER")
    for required in (_MODULES, _WEIGHTS):
        if not (folder / required).is_file():
            raise ConfigError(
                f"encoder model {reference!r}: {folder} holds no {required}; "
                "give a folder that sentence-transformers saved, with safetensors weights"
            )
    return folder


def _folder_in_package(name: str) -> Path:
    try:
        files = metadata.distribution(name).files or []
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise ConfigError(
            f"encoder model: package {name!r} is not installed; install it, or name a folder with path:FOLDER"
        ) from error
    listed = [file for file in files if file.name == _MODULES]
    if len(listed) != 1:
        raise ConfigError(f"encoder model: package {name!r} holds {len(listed)} files {_MODULES}; want one")
    return Path(str(listed[0].locate())).parent


def model_identity(reference: str, folder: Path) -> str:
    """Name and SHA-256 of the weights, such as `package:NAME@sha256:...`; read again only when they changed.

    Raises:
        OSError: the weights cannot be read.
    """
    path = folder / _WEIGHTS
    facts = path.stat()
    return f"{reference}@sha256:{_digest(path, facts.st_size, facts.st_mtime_ns)}"


@lru_cache(maxsize=8)
def _digest(path: Path, size: int, modified_ns: int) -> str:
    """`size` and `modified_ns` are part of the cache's key only."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
