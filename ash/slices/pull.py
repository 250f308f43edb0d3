"""Fetch model files from the Hugging Face Hub into the local Hugging Face cache.

huggingface_hub knows the interface of the Hub and the layout of the cache; the transfer is our own
(hub_transfer), and so is the comparison of digests. A partial file stays as `blobs/<etag>.incomplete` and is
continued by the next call. Files come over plain HTTP, which the Hub offers up to 50 GB; Xet is not used.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from huggingface_hub import (
    HfApi,
    ModelInfo,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.file_download import repo_folder_name
from msgspec import Struct

from ash.domain.errors import ModelFileError
from ash.slices.gguf import read_header
from ash.slices.hub_errors import named_errors
from ash.slices.hub_transfer import fetch_rest
from ash.slices.models import HubReference, sha256_of, split_parts

_RESERVE_BYTES: Final = 256 * 1024 * 1024
"""Free space that a download leaves: the log and the KV state of sessions need some."""
_LISTED_FILES: Final = 40
_TIMEOUT_S: Final = 30.0
_ETAG: Final = re.compile(r"[0-9a-fA-F]{40,64}")
_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}")

Progress = Callable[["HubFile", int], None]
"""Takes a file and how many of its bytes are here; less than before when it had to start again."""


class HubFile(Struct, frozen=True):
    """One file of an offer.

    `sha256` is what the Hub states; None for files outside of LFS. `etag` is its name in the cache.
    """

    name: str
    size: int
    sha256: str | None
    etag: str


class Offer(Struct, frozen=True):
    """What would be downloaded.

    Attributes:
        reference: the model; of a split one the first file.
        commit: what the revision stands for now.
        files: all parts, in order.
        missing_bytes: how much of them is not in the cache.
        licence: as the model card states it.
        licence_url: where its text is.
        gated: the Hub gives it to those only who accepted its conditions.
        page: of the repository.
    """

    reference: HubReference
    commit: str
    files: tuple[HubFile, ...]
    missing_bytes: int
    licence: str | None
    licence_url: str | None
    gated: bool
    page: str


class Pulled(Struct, frozen=True):
    """What lies in the cache: the first file, its digest, and whether that was compared with a given one."""

    path: Path
    sha256: str
    verified: bool


class HubCache:
    """The local cache together with the Hub it is filled from.

    Args:
        folder: the cache; None takes that of huggingface_hub (HF_HOME, HF_HUB_CACHE).
        endpoint: the Hub; None takes that of huggingface_hub (HF_ENDPOINT).
        retry_wait_s: before the first retry; doubles each time.
    """

    def __init__(
        self, folder: Path | None = None, *, endpoint: str | None = None, retry_wait_s: float = 1.0
    ) -> None:
        self._folder = folder or Path(constants.HF_HUB_CACHE)
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._retry_wait_s = retry_wait_s

    def look_up(self, reference: HubReference, *, sha256: str | None = None) -> Offer:
        """Ask the Hub what a download of `reference` would bring; nothing is written.

        Args:
            reference: the file; of a split model any part.
            sha256: the digest that the file (of a split model the first one) has to have, hex.

        Raises:
            ModelFileError: no such repository, revision or file, no access, another digest, no network.
        """
        if sha256 is not None and _SHA256.fullmatch(sha256) is None:
            raise ModelFileError(f"{sha256!r} is no sha256 digest; it has 64 hexadecimal digits")
        with self._named_errors(reference):
            info = HfApi(endpoint=self._endpoint).model_info(
                reference.repository, revision=reference.revision, files_metadata=True, timeout=_TIMEOUT_S
            )
            commit = info.sha or ""
            if _ETAG.fullmatch(commit) is None:
                raise ModelFileError(
                    f"{self._endpoint} names no commit of {reference.repository}; is HF_ENDPOINT right?"
                )
            names = self._parts(reference, info)
            files = tuple(self._file(reference, info, name, commit) for name in names)
        first = files[0]
        if sha256 is not None and first.sha256 is not None and first.sha256 != sha256.lower():
            raise ModelFileError(
                f"{first.name} of {reference.repository} has sha256 {first.sha256} on the Hub instead of "
                f"{sha256.lower()}; nothing was downloaded: correct the digest or the revision"
            )
        licence, licence_url = _licence(info)
        return Offer(
            reference=HubReference(reference.repository, first.name, reference.revision),
            commit=commit,
            files=files,
            missing_bytes=sum(self._missing_bytes(reference, file) for file in files),
            licence=licence,
            licence_url=licence_url,
            gated=bool(info.gated),
            page=f"{self._endpoint}/{reference.repository}",
        )

    def download(self, offer: Offer, *, progress: Progress, sha256: str | None = None) -> Pulled:
        """Bring what is missing of `offer`, check all of it and place it in the cache. Blocks for as long.

        Raises:
            ModelFileError: the disk is too small, the Hub cannot be reached, or a file is not what it should
                be; such a file is removed, and one that is cut off stays and is continued next time.
        """
        self._check_space(offer)
        paths, digests = [], []
        for file in offer.files:
            expected = file.sha256
            if sha256 is not None and file is offer.files[0]:
                expected = sha256.lower()
            with self._named_errors(offer.reference):
                digests.append(self._fetch(offer, file, expected, progress))
                paths.append(self._place(offer, file))
        for path in paths:
            read_header(path)
        return Pulled(
            path=paths[0],
            sha256=digests[0],
            verified=sha256 is not None or all(file.sha256 is not None for file in offer.files),
        )

    def _parts(self, reference: HubReference, info: ModelInfo) -> tuple[str, ...]:
        """The names of all files that belong to the model."""
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if _is_gguf(file.rfilename)}
        folder, slash, name = reference.file.rpartition("/")
        names = tuple(f"{folder}{slash}{part}" for part in split_parts(name))
        missing = [name for name in names if name not in sizes]
        if not missing:
            return names
        listed = [f"  {_printable(name)} ({_megabytes(size)})" for name, size in sorted(sizes.items())]
        if len(listed) > _LISTED_FILES:
            listed[_LISTED_FILES:] = [f"  and {len(listed) - _LISTED_FILES} more"]
        what = "\n".join(["its GGUF files are:", *listed]) if listed else "it has no GGUF files"
        raise ModelFileError(f"there is no {missing[0]} in {reference.repository}; {what}")

    def _file(self, reference: HubReference, info: ModelInfo, name: str, commit: str) -> HubFile:
        (sibling,) = [file for file in info.siblings or () if file.rfilename == name]
        # This request is also the first one that the Hub refuses if the repository is gated.
        metadata = get_hf_file_metadata(self._url(reference, name, commit), endpoint=self._endpoint)
        etag, size = metadata.etag or "", metadata.size
        if _ETAG.fullmatch(etag) is None or size is None:
            raise ModelFileError(
                f"{self._endpoint} does not state size and etag of {name}; is HF_ENDPOINT right?"
            )
        if size > constants.MAX_HTTP_DOWNLOAD_SIZE:
            raise ModelFileError(
                f"{name} has {_megabytes(size)}, and the Hub gives files over "
                f"{_megabytes(constants.MAX_HTTP_DOWNLOAD_SIZE)} by Xet only; fetch it with: "
                f"hf download {reference.repository} {name}"
            )
        return HubFile(name, size, sibling.lfs.sha256.lower() if sibling.lfs else None, etag.lower())

    def _fetch(self, offer: Offer, file: HubFile, expected: str | None, progress: Progress) -> str:
        """Have `file` among the blobs of the cache; returns its sha256."""
        blob = self._blob(offer.reference, file)
        if blob.exists():
            progress(file, file.size)
            return _checked_digest(blob, file, expected)
        blob.parent.mkdir(parents=True, exist_ok=True)
        partial = blob.with_name(blob.name + ".incomplete")
        with partial.open("ab") as output:
            try:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ModelFileError(f"another process downloads {file.name}; wait for it") from error
            fetch_rest(
                self._url(offer.reference, file.name, offer.commit),
                output,
                size=file.size,
                progress=functools.partial(progress, file),
                retry_wait_s=self._retry_wait_s,
            )
            os.fsync(output.fileno())
            digest = _checked_digest(partial, file, expected)
            partial.replace(blob)
        return digest

    def _place(self, offer: Offer, file: HubFile) -> Path:
        """Let the cache know that the blob is this file of this revision; returns its path there."""
        reference = offer.reference
        path = hf_hub_download(
            reference.repository,
            file.name,
            revision=offer.commit,
            cache_dir=self._folder,
            endpoint=self._endpoint,
        )
        revision = reference.revision or constants.DEFAULT_REVISION
        if revision != offer.commit:
            name = self._repository_folder(reference) / "refs" / revision
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_text(offer.commit)
        return Path(path)

    def _check_space(self, offer: Offer) -> None:
        existing = self._folder
        while not existing.exists():
            existing = existing.parent
        free = shutil.disk_usage(existing).free
        if offer.missing_bytes and offer.missing_bytes + _RESERVE_BYTES > free:
            raise ModelFileError(
                f"{self._folder} has {_megabytes(free)} free; {_megabytes(offer.missing_bytes)} are to come, "
                f"and {_megabytes(_RESERVE_BYTES)} have to stay free: free some, or set HF_HOME to a "
                "folder on another disk"
            )

    def _missing_bytes(self, reference: HubReference, file: HubFile) -> int:
        blob = self._blob(reference, file)
        if blob.exists():
            return 0
        partial = blob.with_name(blob.name + ".incomplete")
        present = partial.stat().st_size if partial.exists() else 0
        return file.size - present if present <= file.size else file.size

    def _blob(self, reference: HubReference, file: HubFile) -> Path:
        return self._repository_folder(reference) / "blobs" / file.etag

    def _repository_folder(self, reference: HubReference) -> Path:
        return self._folder / repo_folder_name(repo_id=reference.repository, repo_type="model")

    def _url(self, reference: HubReference, name: str, commit: str) -> str:
        return hf_hub_url(reference.repository, name, revision=commit, endpoint=self._endpoint)

    def _named_errors(self, reference: HubReference) -> AbstractContextManager[None]:
        return named_errors(reference, endpoint=self._endpoint, folder=self._folder)


def _checked_digest(path: Path, file: HubFile, expected: str | None) -> str:
    """The sha256 of `path`, which is removed if that is not the expected one."""
    digest = sha256_of(path)
    if expected is not None and digest != expected:
        path.unlink()
        raise ModelFileError(
            f"{file.name} has sha256 {digest} instead of {expected}; it was removed from the cache: run this "
            "again, and if it fails again, do not trust the source"
        )
    return digest


def _licence(info: ModelInfo) -> tuple[str | None, str | None]:
    """Name and address of the licence, as the model card states them."""
    card = info.card_data
    name = card.license if card is not None else None
    if card is not None and name in {None, "other"}:
        name = card.license_name or name
    if name is None:
        stated = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
        name = stated[0] if stated else None
    url = card.license_link if card is not None else None
    return None if name is None else _printable(str(name)), None if url is None else _printable(str(url))


def _is_gguf(name: str) -> bool:
    return name.endswith(".gguf")


def _printable(text: str) -> str:
    """Text of the Hub without what would control a terminal."""
    return "".join(character for character in text if character.isprintable())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
