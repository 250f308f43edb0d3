"""The GGUF header check: good files pass, and no damage raises anything but ModelFileError."""

import contextlib
import os
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ash.domain.errors import ModelFileError
from ash.slices.gguf import parse_header, read_header
from tests.gguf_files import GOOD, gguf, string, tensor


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
        (gguf([], 0, keys=[string("x" * 70_000)]), "a name has 70000 bytes"),
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


def sparse(path: Path, start: bytes, size: int) -> Path:
    """A file of `size` bytes that takes next to no disk: zeros behind `start`."""
    path.write_bytes(start)
    os.truncate(path, size)
    return path


def header_with(key: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key


TERABYTE = 2**40
CLAIMS = {
    "texts": (string("k") + struct.pack("<IIQ", 9, 8, 2**36), f"announces {2**36} elements of 'k'; at most"),
    "a name": (struct.pack("<Q", 2**39), f"a name has {2**39} bytes"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_nothing_is_allocated_because_a_header_claims_it(claim: str, tmp_path: Path) -> None:
    key, reason = CLAIMS[claim]
    path = sparse(tmp_path / "sparse.gguf", header_with(key), TERABYTE)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match=reason):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", ["tensors", "metadata keys"])
def test_counts_have_limits_whatever_the_size_of_the_file(count: str, tmp_path: Path) -> None:
    counts = (2**30, 0) if count == "tensors" else (0, 2**30)
    path = sparse(tmp_path / "sparse.gguf", b"GGUF" + struct.pack("<IQQ", 3, *counts), TERABYTE)
    with pytest.raises(ModelFileError, match=f"announces {2**30} {count}; at most"):
        read_header(path)


def test_arrays_of_numbers_are_passed_over_and_texts_cut(tmp_path: Path) -> None:
    numbers = string("numbers") + struct.pack("<IIQ", 9, 10, 2**36) + bytes(8)
    path = sparse(tmp_path / "numbers.gguf", header_with(numbers), TERABYTE)
    assert read_header(path).array_lengths == {"numbers": 2**36}
    path = sparse(
        tmp_path / "text.gguf", header_with(string("text") + struct.pack("<IQ", 8, 2**39)), TERABYTE
    )
    header = read_header(path)
    assert header.metadata == {"text": "\0" * 2**20}
    assert header.spans["text"][1] > 2**39


def test_what_is_kept_of_all_texts_has_a_limit() -> None:
    keys = [string(f"k{number}") + struct.pack("<I", 8) + string("x" * 2**20) for number in range(20)]
    with pytest.raises(ModelFileError, match="its names and strings have more than"):
        parse_header(gguf([], 0, keys=keys), name="wordy.gguf")


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="no regular file"):
        read_header(tmp_path / "pipe")
