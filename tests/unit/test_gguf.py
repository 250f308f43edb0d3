"""The GGUF header check: good files pass, and no damage raises anything but ModelFileError."""

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ash.domain.errors import ModelFileError
from ash.slices.gguf import parse_header, read_header


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return (
        string(name)
        + struct.pack("<I", len(shape))
        + b"".join(struct.pack("<Q", size) for size in shape)
        + struct.pack("<IQ", kind, offset)
    )


def gguf(
    tensors: list[bytes], data_bytes: int, *, version: int = 3, keys: list[bytes] | None = None
) -> bytes:
    if keys is None:
        keys = [
            string("general.architecture") + struct.pack("<I", 8) + string("llama"),
            string("llama.context_length") + struct.pack("<II", 4, 8192),
            string("general.license") + struct.pack("<I", 8) + string("mit"),
            string("some.tokens") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("bc"),
            string("some.scores") + struct.pack("<IIQ", 9, 6, 3) + struct.pack("<fff", 1, 2, 3),
            string("some.flag") + struct.pack("<I?", 7, True),
        ]
    header = (
        b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    )
    return header + b"\0" * (-len(header) % 32) + b"\x11" * data_bytes


GOOD = gguf([tensor("blk.0.weight", (64, 2), 3, 0), tensor("norm", (4,), 0, 96)], 96 + 16)


def test_a_good_file() -> None:
    header = parse_header(GOOD, name="good.gguf")
    assert header.architecture == "llama"
    assert header.context_length == 8192
    assert header.metadata["some.flag"] is True
    assert header.array_lengths == {"some.tokens": 2, "some.scores": 3}
    assert [(each.name, each.type, each.shape, each.size) for each in header.tensors] == [
        ("blk.0.weight", "Q4_1", (64, 2), 80),
        ("norm", "F32", (4,), 16),
    ]
    assert header.tensor_types() == {"Q4_1": 1, "F32": 1}
    assert header.data_start % 32 == 0


@settings(deadline=None)  # a slow machine is no fault
@given(st.integers(0, len(GOOD) - 1))
def test_every_truncation_is_noticed(length: int) -> None:
    with pytest.raises(ModelFileError, match=r"short\.gguf"):
        parse_header(GOOD[:length], name="short.gguf")


@settings(deadline=None)  # a slow machine is no fault
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_damage_raises_nothing_else(changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(GOOD)
    for position, value in changes:
        damaged[position] = value
    with contextlib.suppress(ModelFileError):
        header = parse_header(bytes(damaged), name="damaged.gguf")
        assert all(header.data_start + each.offset + each.size <= len(damaged) for each in header.tensors)


@settings(deadline=None)  # a slow machine is no fault
@given(st.binary(max_size=300))
def test_foreign_bytes_behind_the_magic(data: bytes) -> None:
    for version in (b"", struct.pack("<I", 3)):
        with contextlib.suppress(ModelFileError):
            parse_header(b"GGUF" + version + data, name="foreign.gguf")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"PK\x03\x04 a zip file", "not a GGUF file: it begins with"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "version 50331648"),
        (gguf([], 0, version=1), "version 1"),
        (gguf([tensor("t", (64,), 3, 0)], 8), "cut off: tensor 't' ends at byte"),
        (gguf([tensor("t", (33,), 3, 0)], 99), "rows of 33, no multiple of 32"),
        (gguf([tensor("t", (4,), 31, 0)], 99), "unknown type 31"),
        (gguf([tensor("t", (4,), 0, 7)], 99), "not aligned"),
        (gguf([tensor("t", (), 0, 0)], 99), "0 dimensions"),
        (gguf([], 0, keys=[string("general.alignment") + struct.pack("<II", 4, 24)]), "power of two"),
        (gguf([], 0, keys=[string("nested") + struct.pack("<IIQ", 9, 9, 1)]), "unknown type 9"),
        (gguf([], 0, keys=[string("odd") + struct.pack("<IQ", 99, 1)]), "unknown type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0) + bytes(99), f"announces {2**62} tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62) + bytes(99), f"announces {2**62} metadata keys"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, reason: str) -> None:
    with pytest.raises(ModelFileError, match=reason):
        parse_header(data, name="wrong.gguf")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    empty = tmp_path / "empty.gguf"
    empty.touch()
    with pytest.raises(ModelFileError, match="is empty"):
        read_header(empty)
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_header(tmp_path / "missing.gguf")
    whole = tmp_path / "whole.gguf"
    whole.write_bytes(GOOD)
    assert read_header(whole) == parse_header(GOOD, name="x")
