"""Tune the first layers of a sentence encoder on labelled requests: `python -m ash.encoders.trainer FOLDER`.

A process of its own, because PyTorch takes half a gigabyte that is wanted back when the work is done. FOLDER
holds JOB_FILE; the encoder is written beside it. Source of the idea: a pretrained encoder tuned with its
classifier carries over to texts of other hands better than a classifier on its frozen vectors.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from ash.encoders.bert_graph import BertShape, write_quantised
from ash.encoders.light import GRAPH_FILE, TOKENIZER_FILE
from ash.encoders.tokens import RequestTokens, padded

JOB_FILE = "job.json"


class Tuning(Struct, frozen=True):
    """How an encoder is tuned; part of its identity.

    Attributes:
        layers: of the base model that are kept, from the first on.
        learning_rate: of the layers, at its highest.
        head_learning_rate: of the classifier, which starts from nothing.
        warm_up: share of the steps in which the learning rate rises; behind it falls to 0 linearly.
        batch: texts in a step.
        label_smoothing: share of the target that is spread over all labels.
        dropout: share of the vector's entries that the classifier does not see in a step.
        scale: of the logits: a unit vector alone could not make the classifier sure of anything.
        seed: of order and dropout.
    """

    layers: int = 3
    learning_rate: float = 1e-4
    head_learning_rate: float = 2e-3
    warm_up: float = 0.06
    batch: int = 32
    label_smoothing: float = 0.05
    dropout: float = 0.1
    scale: float = 20.0
    seed: int = 1


class Epoch(Struct, frozen=True):
    """The examples of one pass."""

    texts: list[str]
    labels: list[str]


class Job(Struct, frozen=True):
    """What to do: `model` is the folder of a sentence-transformers BERT model."""

    model: str
    tuning: Tuning
    epochs: list[Epoch]


def run(folder: Path) -> None:
    """Do the job in `folder`: write GRAPH_FILE and TOKENIZER_FILE there.

    Raises:
        OSError, msgspec.DecodeError: job or model cannot be read.
        KeyError: the model is not a BERT.
    """
    # Read when the libraries are imported, which is why they are imported here and not at the top.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    job = msgspec.json.decode((folder / JOB_FILE).read_bytes(), type=Job)
    tuning, source = job.tuning, Path(job.model)
    torch.manual_seed(tuning.seed)
    # More threads would take the cores that the machine is needed for, and change the result.
    torch.set_num_threads(1)
    labels = sorted({label for epoch in job.epochs for label in epoch.labels})
    column = {label: number for number, label in enumerate(labels)}
    tokens = RequestTokens(source / TOKENIZER_FILE)

    model = AutoModel.from_pretrained(source, local_files_only=True)
    model.encoder.layer = model.encoder.layer[: tuning.layers]
    # Words that no example holds must keep their place beside those that one does.
    for parameter in model.embeddings.parameters():
        parameter.requires_grad = False
    head = torch.nn.Linear(model.config.hidden_size, len(labels))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    dropout = torch.nn.Dropout(tuning.dropout)
    rates = (tuning.learning_rate, tuning.head_learning_rate)
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in model.encoder.parameters() if p.requires_grad], "lr": rates[0]},
            {"params": list(head.parameters()), "lr": rates[1]},
        ],
        weight_decay=0.01,
    )
    steps = sum(-(-len(epoch.texts) // tuning.batch) for epoch in job.epochs)
    step = 0
    model.train()
    for number, epoch in enumerate(job.epochs):
        ids = [tokens.ids(text) for text in epoch.texts]
        targets = [column[label] for label in epoch.labels]
        counts = np.bincount(targets, minlength=len(labels)).clip(1)
        # Between equal weights and equal shares: neither rare nor frequent labels take over.
        weights = torch.tensor((len(targets) / len(labels) / counts) ** 0.5, dtype=torch.float32)
        total = 0.0
        batches = list(_batches(ids, tuning.batch, random.Random(tuning.seed + number)))  # noqa: S311 (no secret)
        for batch in batches:
            factor = min((step + 1) / (tuning.warm_up * steps), 1.0) * (1 - step / steps)
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            rows, mask = (torch.from_numpy(part) for part in padded([ids[i] for i in batch]))
            hidden = model(input_ids=rows, attention_mask=mask.long()).last_hidden_state
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            unit = torch.nn.functional.normalize(mean, dim=1)
            loss = torch.nn.functional.cross_entropy(
                head(dropout(unit)) * tuning.scale,
                torch.tensor([targets[i] for i in batch]),
                weight=weights,
                label_smoothing=tuning.label_smoothing,
            )
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            step += 1
            total += loss.item()
        sys.stdout.write(f"epoch {number + 1} of {len(job.epochs)}: loss {total / len(batches):.3f}\n")
        sys.stdout.flush()

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    shape = msgspec.convert({**config, "num_hidden_layers": tuning.layers}, BertShape)
    shutil.copyfile(source / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    write_quantised(
        {name: value.detach().numpy() for name, value in model.state_dict().items()},
        shape,
        folder / GRAPH_FILE,
    )


def _batches(ids: Sequence[Sequence[int]], size: int, generator: random.Random) -> Iterator[list[int]]:
    """Numbers of texts in random order, yet next to others of about their length: padding costs time."""
    order = list(range(len(ids)))
    generator.shuffle(order)
    window = 32 * size
    sorted_order = [
        number
        for start in range(0, len(order), window)
        for number in sorted(order[start : start + window], key=lambda i: len(ids[i]))
    ]
    batches = [sorted_order[start : start + size] for start in range(0, len(sorted_order), size)]
    generator.shuffle(batches)
    yield from batches


if __name__ == "__main__":
    run(Path(sys.argv[1]))
