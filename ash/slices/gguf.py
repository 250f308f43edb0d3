"""The header of a GGUF file: read and checked before llama.cpp sees the file. Pure but for `read_header`.

llama.cpp aborts the process on some damaged files; whatever is told here is told by name instead. Format:
docs/gguf.md of ggml, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from math import prod
from pathlib import Path
from typing import Final

from msgspec import Struct

from ash.domain.errors import ModelFileError

MAGIC: Final = b"GGUF"
_MAX_TENSORS: Final = 1_000_000
_MAX_KEYS: Final = 100_000
_DEFAULT_ALIGNMENT: Final = 32

_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""gguf_type -> struct format."""

_TENSOR_TYPES: Final = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
"""ggml_type -> name, elements of a block, bytes of a block (ggml_blck_size, ggml_type_size)."""

Scalar = int | float | bool | str
Buffer = bytes | mmap.mmap


class GgufTensor(Struct, frozen=True):
    """One tensor: `shape` innermost first, `offset` in bytes from the start of the tensor data."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size: int


class GgufHeader(Struct, frozen=True):
    """What the header says. `metadata` has the scalars and strings; of arrays only their lengths."""

    version: int
    metadata: dict[str, Scalar]
    array_lengths: dict[str, int]
    tensors: tuple[GgufTensor, ...]
    data_start: int

    @property
    def architecture(self) -> str:
        """Such as `llama` or `gemma3`; empty if the file does not say."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def context_length(self) -> int | None:
        """Tokens of context the model was trained for."""
        value = self.metadata.get(f"{self.architecture}.context_length")
        return value if isinstance(value, int) else None

    def tensor_types(self) -> dict[str, int]:
        """How many tensors have each type, most frequent first."""
        return dict(Counter(tensor.type for tensor in self.tensors).most_common())


def read_header(path: Path) -> GgufHeader:
    """The header of the file at `path`.

    Raises:
        ModelFileError: it cannot be read, is no GGUF file, or is cut off.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise ModelFileError(f"{path} is empty; fetch the model file again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return parse_header(data, name=str(path))
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_header(data: Buffer, *, name: str) -> GgufHeader:
    """The header of the whole file `data`.

    Raises:
        ModelFileError: naming `name` and what is wrong.
    """
    reader = _Reader(data, name)
    if data[:4] != MAGIC:
        raise ModelFileError(
            f"{name} is not a GGUF file: it begins with {bytes(data[:4])!r} instead of {MAGIC!r}"
        )
    reader.position = 4
    version = reader.number("I")
    if version not in {2, 3}:
        raise ModelFileError(
            f"{name} has GGUF version {version}; versions 2 and 3 (little-endian) can be loaded"
        )
    tensor_count = reader.count("tensors", _MAX_TENSORS, least_bytes=24)
    key_count = reader.count("metadata keys", _MAX_KEYS, least_bytes=13)
    metadata: dict[str, Scalar] = {}
    array_lengths: dict[str, int] = {}
    for _ in range(key_count):
        key = reader.string()
        kind = reader.number("I")
        if kind == _ARRAY:
            array_lengths[key] = reader.skip_array(key)
        elif kind == _STRING:
            metadata[key] = reader.string()
        elif kind in _SCALARS:
            metadata[key] = reader.scalar(_SCALARS[kind])
        else:
            raise reader.wrong(f"metadata key {key!r} has the unknown type {kind}")
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise reader.wrong(f"general.alignment is {alignment!r}, it has to be a power of two")
    tensors = tuple(reader.tensor(alignment) for _ in range(tensor_count))
    data_start = -(-reader.position // alignment) * alignment
    for tensor in tensors:
        end = data_start + tensor.offset + tensor.size
        if end > len(data):
            raise ModelFileError(
                f"{name} is cut off: tensor {tensor.name!r} ends at byte {end}, the file at {len(data)}; "
                "fetch the model file again"
            )
    return GgufHeader(version, metadata, array_lengths, tensors, data_start)


class _Reader:
    """Reads values one behind the other and names the place where the data end or make no sense."""

    def __init__(self, data: Buffer, name: str) -> None:
        self.position = 0
        self._data = data
        self._name = name

    def wrong(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._name} has a damaged header at byte {self.position}: {what}")

    def scalar(self, form: str) -> Scalar:
        size = struct.calcsize("<" + form)
        if self.position + size > len(self._data):
            raise self.wrong("the file ends inside the header")
        (value,) = struct.unpack_from("<" + form, self._data, self.position)
        self.position += size
        assert isinstance(value, int | float | bool)
        return value

    def number(self, form: str) -> int:
        return int(self.scalar(form))

    def count(self, what: str, limit: int, *, least_bytes: int) -> int:
        """A count that the rest of the file has room for."""
        count = self.number("Q")
        if count > limit or count * least_bytes > len(self._data) - self.position:
            raise self.wrong(f"it announces {count} {what}")
        return count

    def string(self) -> str:
        length = self._string_length()
        text = self._data[self.position : self.position + length]
        self.position += length
        return bytes(text).decode("utf-8", "replace")

    def skip_array(self, key: str) -> int:
        """Pass over an array; returns its length."""
        kind = self.number("I")
        if kind == _STRING:
            length = self.count(f"elements of {key!r}", 2**63, least_bytes=8)
            for _ in range(length):
                string_bytes = self._string_length()
                self.position += string_bytes
            return length
        if kind not in _SCALARS:
            raise self.wrong(f"array {key!r} has elements of the unknown type {kind}")
        size = struct.calcsize("<" + _SCALARS[kind])
        length = self.count(f"elements of {key!r}", 2**63, least_bytes=size)
        self.position += length * size
        return length

    def tensor(self, alignment: int) -> GgufTensor:
        name = self.string()
        dimensions = self.number("I")
        if not 1 <= dimensions <= 4:
            raise self.wrong(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        kind = self.number("I")
        offset = self.number("Q")
        if kind not in _TENSOR_TYPES:
            raise self.wrong(f"tensor {name!r} has the unknown type {kind}; a newer llama.cpp may know it")
        type_name, block, block_bytes = _TENSOR_TYPES[kind]
        if shape[0] % block:
            raise self.wrong(
                f"tensor {name!r} of type {type_name} has rows of {shape[0]}, no multiple of {block}"
            )
        if offset % alignment:
            raise self.wrong(f"tensor {name!r} is not aligned to {alignment} bytes")
        return GgufTensor(name, shape, type_name, offset, prod(shape) // block * block_bytes)

    def _string_length(self) -> int:
        length = self.number("Q")
        if length > len(self._data) - self.position:
            raise self.wrong(f"a string of {length} bytes does not fit the file")
        return length
