"""Writes GGUF files as a stream: no more than one piece of one tensor is ever in memory.

Format: docs/gguf.md of ggml, version 3, little-endian. Types and sizes are those of ash/slices/gguf.py, which
reads what this writes.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Final

from msgspec import Struct

from ash.slices.gguf import MAGIC, TENSOR_TYPES

ALIGNMENT: Final = 32
"""What readers take when `general.alignment` is absent."""

_VERSION: Final = 3
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9  # gguf_type

TensorData = Callable[[], Iterable[bytes]]


class TensorPlan(Struct, frozen=True):
    """One tensor to write: `shape` innermost first; `data` yields its bytes, in pieces of any length."""

    name: str
    shape: tuple[int, ...]
    type: str
    data: TensorData

    @property
    def size(self) -> int:
        """Bytes of its data."""
        _, block, block_bytes = _type(self.type)
        if self.shape[0] % block:
            raise ValueError(
                f"tensor {self.name}: rows of {self.shape[0]} are no multiple of the {block} elements of a "
                f"{self.type} block"
            )
        return prod(self.shape) // block * block_bytes


def uint32(value: int) -> bytes:
    """A metadata value, its type in front, as `write_gguf` takes it."""
    return struct.pack("<II", _UINT32, value)


def float32(value: float) -> bytes:
    return struct.pack("<If", _FLOAT32, value)


def boolean(value: bool) -> bytes:
    return struct.pack("<I?", _BOOL, value)


def string(value: str) -> bytes:
    return struct.pack("<I", _STRING) + _text(value)


def uint32_array(values: Sequence[int]) -> bytes:
    return struct.pack(f"<IIQ{len(values)}I", _ARRAY, _UINT32, len(values), *values)


def boolean_array(values: Sequence[bool]) -> bytes:
    return struct.pack(f"<IIQ{len(values)}?", _ARRAY, _BOOL, len(values), *values)


def write_gguf(path: Path, metadata: Mapping[str, bytes], tensors: Sequence[TensorPlan]) -> int:
    """Write the file whole or not at all; returns its size in bytes.

    Args:
        path: replaced if it exists.
        metadata: key -> value with its type in front, from the functions above or copied from another file.
        tensors: in the order in which they are to stand in the file.

    Raises:
        ValueError: a tensor's rows do not fit its type, or its data have another length than its shape says.
        OSError: the file cannot be written.
    """
    header = bytearray(MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _text(key) + value
    offset = 0
    for tensor in tensors:
        number = _type(tensor.type)[0]
        header += _text(tensor.name) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, number, offset)
        offset += _padded(tensor.size)
    header += bytes(_padded(len(header)) - len(header))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(header)
            for tensor in tensors:
                written = sum(file.write(piece) for piece in tensor.data())
                if written != tensor.size:
                    raise ValueError(
                        f"tensor {tensor.name}: {written} bytes of data instead of {tensor.size}"
                    )
                file.write(bytes(_padded(written) - written))
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink()
        raise
    return len(header) + offset


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _type(name: str) -> tuple[int, int, int]:
    """Number, elements of a block and bytes of a block of a tensor type."""
    for number, (known, block, block_bytes) in TENSOR_TYPES.items():
        if known == name:
            return number, block, block_bytes
    raise ValueError(
        f"there is no tensor type {name!r}; write one of {[each[0] for each in TENSOR_TYPES.values()]}"
    )


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
