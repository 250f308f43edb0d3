"""The files that benchmarks write: read back by the reader of the project, refused when a plan is wrong."""

from pathlib import Path

import numpy as np
import pytest

from ash.slices.gguf import TENSOR_TYPES, parse_header, read_header
from benchmarks.gguf_writer import (
    TensorPlan,
    boolean,
    boolean_array,
    float32,
    string,
    uint32,
    uint32_array,
    write_gguf,
)
from benchmarks.random_blocks import TYPES, random_weights
from benchmarks.shape_true_model import SIZES, write_model

METADATA = {
    "general.architecture": string("gemma4"),
    "a.count": uint32(7),
    "a.scale": float32(0.5),
    "a.flag": boolean(True),
    "a.pattern": boolean_array([True, False, True]),
    "a.widths": uint32_array([1, 2]),
}


def plan(name: str, shape: tuple[int, ...], kind: str, *pieces: bytes) -> TensorPlan:
    return TensorPlan(name, shape, kind, lambda: pieces)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "model.gguf"
    tensors = [
        plan("first", (3,), "F32", b"\1" * 5, b"\2" * 7),
        plan("second", (64, 2), "Q4_0", b"\3" * 72),
    ]
    assert write_gguf(path, METADATA, tensors) == path.stat().st_size
    header = read_header(path)
    assert header.metadata == {
        "general.architecture": "gemma4",
        "a.count": 7,
        "a.scale": 0.5,
        "a.flag": True,
    }
    assert header.array_lengths == {"a.pattern": 3, "a.widths": 2}
    assert [(each.name, each.shape, each.type, each.size) for each in header.tensors] == [
        ("first", (3,), "F32", 12),
        ("second", (64, 2), "Q4_0", 72),
    ]
    data = path.read_bytes()
    for tensor, content in zip(header.tensors, (b"\1" * 5 + b"\2" * 7, b"\3" * 72), strict=True):
        start = header.data_start + tensor.offset
        assert data[start : start + tensor.size] == content
    for key, value in METADATA.items():
        start, end = header.spans[key]
        assert data[start:end] == value


def test_a_plan_with_the_wrong_data_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"what was there")
    with pytest.raises(ValueError, match="tensor short: 3 bytes of data instead of 12"):
        write_gguf(path, METADATA, [plan("short", (3,), "F32", b"abc")])
    with pytest.raises(ValueError, match="rows of 48 are no multiple of the 32"):
        write_gguf(path, METADATA, [plan("odd", (48,), "Q4_0", b"")])
    with pytest.raises(ValueError, match="no tensor type 'Q9'"):
        write_gguf(path, METADATA, [plan("odd", (48,), "Q9", b"")])
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"what was there"]


@pytest.mark.parametrize("kind", TYPES)
def test_random_weights_fill_their_tensor_and_repeat(kind: str) -> None:
    block, block_bytes = next(each[1:] for each in TENSOR_TYPES.values() if each[0] == kind)
    shape = (256, 40)

    def made(seed: int) -> bytes:
        return b"".join(random_weights(shape, kind, 0.05, np.random.default_rng(seed)))

    assert len(made(0)) == 256 * 40 // block * block_bytes
    assert made(0) == made(0)
    assert made(0) != made(1)


@pytest.mark.parametrize("size", sorted(SIZES))
def test_shapes_have_both_kinds_of_attention_before_the_shared_layers(size: str) -> None:
    shape = SIZES[size]
    own = [layer for layer in range(shape.layers) if not shape.is_shared(layer)]
    assert {shape.is_full(layer) for layer in own} == {True, False}
    assert shape.is_full(shape.layers - 1)


def test_a_model_takes_the_tokenizer_of_another_file(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocabulary.gguf"
    write_gguf(
        vocabulary,
        {
            "general.architecture": string("gemma3"),
            "tokenizer.ggml.model": string("llama"),
            "tokenizer.ggml.tokens": uint32_array(range(10)),
        },
        [plan("a", (1,), "F32", bytes(4))],
    )
    path = tmp_path / "model.gguf"
    write_model(path, "tiny", vocabulary_file=vocabulary)
    header = parse_header(path.read_bytes(), name="model")
    assert header.architecture == "gemma4"
    assert header.metadata["tokenizer.ggml.model"] == "llama"
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    assert shapes["token_embd.weight"] == (256, 10)
    assert shapes["per_layer_token_embd.weight"] == (8 * 32, 10)
    assert "blk.3.attn_k.weight" in shapes
    assert "blk.4.attn_k.weight" not in shapes
    assert shapes["blk.3.attn_q.weight"] == (256, 4 * 128)
    assert shapes["blk.4.ffn_up.weight"] == (256, 1024)
