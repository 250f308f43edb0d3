"""The bytes of one file over HTTP, continued where they broke off.

`hf_hub_download` of huggingface_hub keeps nothing of a download that was interrupted, and gives up when a
connection is reset; this does neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import BinaryIO, Final

import httpx2
from huggingface_hub import constants
from huggingface_hub.utils import (  # type: ignore[attr-defined] # documented there, not marked as exported
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from ash.domain.errors import ModelFileError

_BLOCK_BYTES: Final = 1024 * 1024
_RETRIES: Final = 5  # in a row without a new byte, as huggingface_hub does


def fetch_rest(
    url: str, output: BinaryIO, *, size: int, progress: Callable[[int], None], retry_wait_s: float
) -> None:
    """Append to `output`, opened for appending, what it lacks of the `size` bytes at `url`.

    Args:
        url: of the Hub; it must go on standing for the same content.
        output: what is there already; it is kept whatever happens, unless it cannot be continued.
        size: of the whole file.
        progress: takes how many bytes are there; less than before when the server starts again.
        retry_wait_s: before the first retry; doubles each time. Any new byte makes the next one the first.

    Raises:
        httpx2.HTTPError: the connection broke too often, or the server refuses (HfHubHTTPError).
        ModelFileError: the server sends more than it should.
        OSError: the disk.
    """
    if output.tell() > size:
        _empty(output)
    failures = 0
    while (before := output.tell()) < size:
        progress(before)
        broken: httpx2.TransportError | None = None
        try:
            _continue(url, output, size=size, progress=progress, retry_wait_s=retry_wait_s)
        except httpx2.TransportError as error:
            broken = error
        if output.tell() >= size:
            break
        failures = 1 if output.tell() > before else failures + 1
        if failures > _RETRIES:
            raise broken or httpx2.RemoteProtocolError("the server ends the file too early again and again")
        time.sleep(retry_wait_s * 2 ** (failures - 1))
    progress(size)


def _continue(
    url: str, output: BinaryIO, *, size: int, progress: Callable[[int], None], retry_wait_s: float
) -> None:
    """One request for the rest of the file."""
    position = output.tell()
    # Compressed bytes could not be counted.
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if position:
        headers["Range"] = f"bytes={position}-"
    with http_stream_backoff(
        "GET",
        url,
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        max_retries=_RETRIES,
        base_wait_time=retry_wait_s,
        retry_on_exceptions=(),  # the caller continues where it broke off
    ) as response:
        hf_raise_for_status(response)
        if position and not response.headers.get("Content-Range", "").startswith(f"bytes {position}-"):
            # The server does not continue: this is the file from its beginning.
            _empty(output)
            position = 0
        try:
            for block in response.iter_bytes(_BLOCK_BYTES):
                position += len(block)
                if position > size:
                    _empty(output)
                    raise ModelFileError(
                        f"{url} has more than the {size} bytes that were announced; what was downloaded is "
                        "removed: run this again later"
                    )
                output.write(block)
                progress(position)
        finally:
            output.flush()


def _empty(output: BinaryIO) -> None:
    output.seek(0)
    output.truncate()
