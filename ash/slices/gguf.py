"""The header of a GGUF file: read and checked before llama.cpp sees the file. Pure but for `read_header`.

llama.cpp aborts the process on some damaged files; whatever is told here is told by name instead. Nothing is
allocated because a header claims it: what is kept has a limit, whatever the size of the file. Format:
docs/gguf.md of ggml, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from collections import Counter
from math import prod
from pathlib import Path
from typing import BinaryIO, Final

from msgspec import Struct

from ash.domain.errors import ModelFileError

MAGIC: Final = b"GGUF"
_BUFFER_BYTES: Final = 256 * 1024
_MAX_TENSORS: Final = 65_536  # the largest models have a few thousand
_MAX_KEYS: Final = 65_536  # and a few hundred keys
_MAX_NAME_BYTES: Final = 65_535  # of a key; the names of tensors are shorter
_MAX_TEXT_BYTES: Final = 1024 * 1024
"""What is kept of one string; chat templates are far shorter, an embedded tokeniser may be longer."""
_MAX_KEPT_BYTES: Final = 16 * 1024 * 1024
"""What is kept of all names and strings together."""
_MAX_ARRAY_STRINGS: Final = 4_000_000
"""Strings in arrays: they have to be passed over one by one; vocabularies have up to 300,000."""
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

TENSOR_TYPES: Final = {
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


class GgufTensor(Struct, frozen=True):
    """One tensor: `shape` innermost first, `offset` in bytes from the start of the tensor data."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size: int


class GgufHeader(Struct, frozen=True):
    """What the header says. `metadata` has the scalars and strings (up to a MiB); of arrays the lengths.

    `spans` says where each metadata value stands in the file: first byte of its type, first byte behind it.
    """

    version: int
    metadata: dict[str, Scalar]
    array_lengths: dict[str, int]
    spans: dict[str, tuple[int, int]]
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

    The file is read, not mapped: one that is cut off meanwhile must not end the process with SIGBUS.

    Raises:
        ModelFileError: it cannot be read, is no GGUF file, or is cut off.
    """
    try:
        # Not blocking: to open a named pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", _BUFFER_BYTES) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ModelFileError(f"{path} is no regular file; name the model file itself")
            if status.st_size == 0:
                raise ModelFileError(f"{path} is empty; fetch the model file again")
            return _parse(_Reader(file, status.st_size, str(path)))
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_header(data: bytes, *, name: str) -> GgufHeader:
    """The header of the whole file `data`.

    Raises:
        ModelFileError: naming `name` and what is wrong.
    """
    return _parse(_Reader(io.BytesIO(data), len(data), name))


def _parse(reader: _Reader) -> GgufHeader:
    name = reader.name
    magic = reader.start()
    if magic != MAGIC:
        raise ModelFileError(f"{name} is not a GGUF file: it begins with {magic!r} instead of {MAGIC!r}")
    version = reader.number("I")
    if version not in {2, 3}:
        raise ModelFileError(
            f"{name} has GGUF version {version}; versions 2 and 3 (little-endian) can be loaded"
        )
    tensor_count = reader.count("tensors", _MAX_TENSORS, least_bytes=24)
    key_count = reader.count("metadata keys", _MAX_KEYS, least_bytes=13)
    metadata: dict[str, Scalar] = {}
    array_lengths: dict[str, int] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(key_count):
        key = reader.label()
        start = reader.position
        kind = reader.number("I")
        if kind == _ARRAY:
            array_lengths[key] = reader.skip_array(key)
        elif kind == _STRING:
            metadata[key] = reader.text()
        elif kind in _SCALARS:
            metadata[key] = reader.scalar(_SCALARS[kind])
        else:
            raise reader.wrong(f"metadata key {key!r} has the unknown type {kind}")
        spans[key] = (start, reader.position)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise reader.wrong(f"general.alignment is {alignment!r}, it has to be a power of two")
    tensors = tuple(reader.tensor(alignment) for _ in range(tensor_count))
    data_start = -(-reader.position // alignment) * alignment
    for tensor in tensors:
        end = data_start + tensor.offset + tensor.size
        if end > reader.size:
            raise ModelFileError(
                f"{name} is cut off: tensor {tensor.name!r} ends at byte {end}, the file at {reader.size}; "
                "fetch the model file again"
            )
    return GgufHeader(version, metadata, array_lengths, spans, tensors, data_start)


class _Reader:
    """Reads values one behind the other and names the place where the data end or make no sense."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.position = 0
        self.size = size
        self.name = name
        self._file = file
        self._kept_bytes = 0
        self._array_strings = 0

    def wrong(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.name} has a damaged header at byte {self.position}: {what}")

    def start(self) -> bytes:
        """The first four bytes, fewer of a shorter file."""
        return self._take(min(4, self.size))

    def scalar(self, form: str) -> Scalar:
        (value,) = struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))
        assert isinstance(value, int | float | bool)
        return value

    def number(self, form: str) -> int:
        return int(self.scalar(form))

    def count(self, what: str, limit: int, *, least_bytes: int) -> int:
        """A count that the rest of the file has room for."""
        count = self.number("Q")
        if count * least_bytes > self.size - self.position:
            raise self.wrong(f"it announces {count} {what}, and the file has no room for them")
        if count > limit:
            raise self.wrong(f"it announces {count} {what}; at most {limit} are read")
        return count

    def label(self) -> str:
        """A name."""
        length = self._string_length()
        if length > _MAX_NAME_BYTES:
            raise self.wrong(f"a name has {length} bytes; at most {_MAX_NAME_BYTES} are allowed")
        return self._kept(length)

    def text(self) -> str:
        """A string, cut to what is kept of it."""
        length = self._string_length()
        kept = self._kept(min(length, _MAX_TEXT_BYTES))
        self._skip(length - min(length, _MAX_TEXT_BYTES))
        return kept

    def skip_array(self, key: str) -> int:
        """Pass over an array; returns its length."""
        kind = self.number("I")
        if kind == _STRING:
            length = self.count(
                f"elements of {key!r}", _MAX_ARRAY_STRINGS - self._array_strings, least_bytes=8
            )
            self._array_strings += length
            for _ in range(length):
                self._skip(self._string_length())
            return length
        if kind not in _SCALARS:
            raise self.wrong(f"array {key!r} has elements of the unknown type {kind}")
        size = struct.calcsize("<" + _SCALARS[kind])
        length = self.count(f"elements of {key!r}", self.size, least_bytes=size)
        self._skip(length * size)
        return length

    def tensor(self, alignment: int) -> GgufTensor:
        name = self.label()
        dimensions = self.number("I")
        if not 1 <= dimensions <= 4:
            raise self.wrong(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        kind = self.number("I")
        offset = self.number("Q")
        if kind not in TENSOR_TYPES:
            raise self.wrong(f"tensor {name!r} has the unknown type {kind}; a newer llama.cpp may know it")
        type_name, block, block_bytes = TENSOR_TYPES[kind]
        if shape[0] % block:
            raise self.wrong(
                f"tensor {name!r} of type {type_name} has rows of {shape[0]}, no multiple of {block}"
            )
        if offset % alignment:
            raise self.wrong(f"tensor {name!r} is not aligned to {alignment} bytes")
        return GgufTensor(name, shape, type_name, offset, prod(shape) // block * block_bytes)

    def _string_length(self) -> int:
        length = self.number("Q")
        if length > self.size - self.position:
            raise self.wrong(f"a string of {length} bytes does not fit the file")
        return length

    def _kept(self, length: int) -> str:
        self._kept_bytes += length
        if self._kept_bytes > _MAX_KEPT_BYTES:
            raise self.wrong(f"its names and strings have more than {_MAX_KEPT_BYTES} bytes")
        return self._take(length).decode("utf-8", "replace")

    def _take(self, length: int) -> bytes:
        data = self._file.read(length) if length <= self.size - self.position else b""
        if len(data) < length:
            raise self.wrong("the file ends inside the header")
        self.position += length
        return data

    def _skip(self, length: int) -> None:
        self.position += length
        self._file.seek(self.position)
