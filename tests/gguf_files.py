"""Small GGUF files made by hand, byte for byte."""

from __future__ import annotations

import struct

STRING = 8
ARRAY = 9
UINT32 = 4
FLOAT32 = 6
BOOL = 7


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return (
        string(name)
        + struct.pack("<I", len(shape))
        + b"".join(struct.pack("<Q", size) for size in shape)
        + struct.pack("<IQ", kind, offset)
    )


def text_key(name: str, value: str) -> bytes:
    return string(name) + struct.pack("<I", STRING) + string(value)


def number_key(name: str, value: int) -> bytes:
    return string(name) + struct.pack("<II", UINT32, value)


KEYS = [
    text_key("general.architecture", "llama"),
    number_key("llama.context_length", 8192),
    text_key("general.license", "mit"),
    string("some.tokens") + struct.pack("<IIQ", ARRAY, STRING, 2) + string("a") + string("bc"),
    string("some.scores") + struct.pack("<IIQ", ARRAY, FLOAT32, 3) + struct.pack("<fff", 1, 2, 3),
    string("some.flag") + struct.pack("<I?", BOOL, True),
]


def gguf(
    tensors: list[bytes], data_bytes: int, *, version: int = 3, keys: list[bytes] | None = None
) -> bytes:
    keys = KEYS if keys is None else keys
    header = (
        b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    )
    return header + b"\0" * (-len(header) % 32) + b"\x11" * data_bytes


GOOD = gguf([tensor("blk.0.weight", (64, 2), 3, 0), tensor("norm", (4,), 0, 96)], 96 + 16)


def large(data_bytes: int) -> bytes:
    """A whole file with a tensor of `data_bytes` bytes whose content has no period."""
    header = gguf([tensor("weight", (data_bytes,), 24, 0)], 0)
    return header + b"".join(number.to_bytes(4, "little") for number in range(data_bytes // 4))
