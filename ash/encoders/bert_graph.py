"""A BERT encoder as an ONNX graph, written from its weights; no PyTorch is needed to write or to run it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from msgspec import Struct
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from ash.encoders.light import MASK, TOKEN_IDS, VECTORS

Weights = Mapping[str, NDArray[np.float32]]

# Gelu has an operator of its own from this version on.
_OPERATOR_SET = 20
_FORMAT = 9
# Behind the softmax this is a probability of 0.
_MASKED = np.float32(1e9)


class BertShape(Struct, frozen=True):
    """Sizes of the model, as its config.json names them."""

    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    layer_norm_eps: float


def write_quantised(weights: Weights, shape: BertShape, path: Path) -> None:
    """Write the model with int8 weights for the ONNX runtime.

    Activations are quantised while it runs. Source: dynamic quantisation of onnxruntime, per channel.

    Args:
        weights: by the names of Hugging Face's BertModel, float32, layers from 0 on.
        shape: of the model; layers beyond `num_hidden_layers` are left out.
        path: of the file; written whole or not at all.

    Raises:
        KeyError: a weight is missing.
        OSError: the file cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        plain, quantised = Path(folder) / "plain.onnx", Path(folder) / "quantised.onnx"
        onnx.save(bert_model(weights, shape), plain)
        quantize_dynamic(plain, quantised, weight_type=QuantType.QInt8, per_channel=True)
        quantised.replace(path)


def bert_model(weights: Weights, shape: BertShape) -> onnx.ModelProto:
    """The model as it is, in float32; it computes what `transformers.BertModel` with mean pooling does.

    Raises:
        KeyError: a weight is missing.
    """
    return _Graph(weights, shape).model()


class _Graph:
    """Builds the graph node by node; every method returns the name of its result."""

    def __init__(self, weights: Weights, shape: BertShape) -> None:
        self._weights = weights
        self._shape = shape
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def model(self) -> onnx.ModelProto:
        hidden = self._embedded()
        bias = self._attention_bias()
        for number in range(self._shape.num_hidden_layers):
            hidden = self._layer(f"encoder.layer.{number}", hidden, bias)
        self._mean(hidden)
        inputs = [
            helper.make_tensor_value_info(TOKEN_IDS, TensorProto.INT64, ["texts", "tokens"]),
            helper.make_tensor_value_info(MASK, TensorProto.FLOAT, ["texts", "tokens"]),
        ]
        width = self._shape.hidden_size
        output = helper.make_tensor_value_info(VECTORS, TensorProto.FLOAT, ["texts", width])
        graph = helper.make_graph(self._nodes, "bert", inputs, [output], list(self._constants.values()))
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", _OPERATOR_SET)], ir_version=_FORMAT
        )

    def _node(self, operator: str, inputs: list[str], result: str, **attributes: object) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [result], **attributes))
        return result

    def _constant(self, name: str, value: NDArray[np.float32] | NDArray[np.int64]) -> str:
        self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def _numbers(self, name: str, *values: int) -> str:
        return self._constant(name, np.asarray(values, dtype=np.int64))

    def _weight(self, name: str) -> NDArray[np.float32]:
        return self._weights[name].astype(np.float32)

    def _embedded(self) -> str:
        words = self._constant("words", self._weight("embeddings.word_embeddings.weight"))
        # All tokens are of the first segment, so its vector is part of every position's.
        positions = self._constant(
            "positions",
            self._weight("embeddings.position_embeddings.weight")
            + self._weight("embeddings.token_type_embeddings.weight")[0],
        )
        shape = self._node("Shape", [TOKEN_IDS], "shape")
        length = self._node("Slice", [shape, self._numbers("one", 1), self._numbers("two", 2)], "length")
        used = self._node("Slice", [positions, self._numbers("zero", 0), length], "used_positions")
        found = self._node("Gather", [words, TOKEN_IDS], "word_vectors")
        return self._normalised("embeddings.LayerNorm", self._node("Add", [found, used], "embedded"))

    def _attention_bias(self) -> str:
        """0 where a token stands and a large negative number where padding does."""
        shifted = self._node("Sub", [MASK, self._constant("unit", np.asarray(1, dtype=np.float32))], "m")
        scaled = self._node("Mul", [shifted, self._constant("masked", np.asarray(_MASKED))], "scaled_mask")
        return self._node("Unsqueeze", [scaled, self._numbers("axes", 1, 2)], "attention_bias")

    def _layer(self, name: str, hidden: str, bias: str) -> str:
        attended = self._attention(f"{name}.attention", hidden, bias)
        wide = self._dense(f"{name}.intermediate.dense", attended)
        activated = self._node("Gelu", [wide], f"{name}.gelu")
        narrow = self._dense(f"{name}.output.dense", activated)
        total = self._node("Add", [narrow, attended], f"{name}.residual")
        return self._normalised(f"{name}.output.LayerNorm", total)

    def _attention(self, name: str, hidden: str, bias: str) -> str:
        heads = self._shape.num_attention_heads
        width = self._shape.hidden_size // heads
        split = self._numbers("split", 0, 0, heads, width)
        join = self._numbers("join", 0, 0, self._shape.hidden_size)
        parts = self._queries_keys_values(f"{name}.self", hidden, np.float32(width**-0.5))
        # Keys come out transposed for the product with the queries.
        orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        queries, keys, values = (
            self._node(
                "Transpose", [self._node("Reshape", [part, split], f"{part}.heads")], f"{part}.t", perm=order
            )
            for part, order in zip(parts, orders, strict=True)
        )
        products = self._node("MatMul", [queries, keys], f"{name}.products")
        biased = self._node("Add", [products, bias], f"{name}.biased")
        shares = self._node("Softmax", [biased], f"{name}.shares", axis=-1)
        mixed = self._node("MatMul", [shares, values], f"{name}.mixed")
        back = self._node("Transpose", [mixed], f"{name}.back", perm=[0, 2, 1, 3])
        joined = self._node("Reshape", [back, join], f"{name}.joined")
        total = self._node("Add", [self._dense(f"{name}.output.dense", joined), hidden], f"{name}.residual")
        return self._normalised(f"{name}.output.LayerNorm", total)

    def _queries_keys_values(self, name: str, hidden: str, scale: np.float32) -> list[str]:
        """The three projections in one product; the scale of the softmax is part of the first."""
        kinds = ("query", "key", "value")
        scales = (scale, np.float32(1), np.float32(1))
        weight = np.concatenate(
            [
                self._weight(f"{name}.{kind}.weight") * factor
                for kind, factor in zip(kinds, scales, strict=True)
            ]
        )
        bias = np.concatenate(
            [self._weight(f"{name}.{kind}.bias") * factor for kind, factor in zip(kinds, scales, strict=True)]
        )
        product = self._affine(f"{name}.qkv", hidden, weight, bias)
        names = [f"{name}.{kind}" for kind in kinds]
        self._nodes.append(helper.make_node("Split", [product], names, axis=-1, num_outputs=3))
        return names

    def _dense(self, name: str, hidden: str) -> str:
        return self._affine(name, hidden, self._weight(f"{name}.weight"), self._weight(f"{name}.bias"))

    def _affine(self, name: str, hidden: str, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> str:
        product = self._node("MatMul", [hidden, self._constant(f"{name}.w", weight.T)], f"{name}.product")
        return self._node("Add", [product, self._constant(f"{name}.b", bias)], name)

    def _normalised(self, name: str, hidden: str) -> str:
        scale = self._constant(f"{name}.scale", self._weight(f"{name}.weight"))
        shift = self._constant(f"{name}.shift", self._weight(f"{name}.bias"))
        epsilon = self._shape.layer_norm_eps
        return self._node("LayerNormalization", [hidden, scale, shift], name, axis=-1, epsilon=epsilon)

    def _mean(self, hidden: str) -> str:
        """The mean over the tokens of each text."""
        mask = self._node("Unsqueeze", [MASK, self._numbers("last", 2)], "wide_mask")
        kept = self._node("Mul", [hidden, mask], "kept")
        axis = self._numbers("tokens_axis", 1)
        total = self._node("ReduceSum", [kept, axis], "total", keepdims=0)
        count = self._node("ReduceSum", [MASK, axis], "count", keepdims=1)
        return self._node("Div", [total, count], VECTORS)
