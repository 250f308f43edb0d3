"""Tune the first layers of a sentence encoder on labelled requests: `python -m ash.encoders.trainer FOLDER`.

A process of its own, because PyTorch takes half a gigabyte that is wanted back when the work is done. FOLDER
holds the job; the encoder is written beside it. A pretrained encoder that is tuned together with its
classifier carries over to requests of other hands better than a classifier on its frozen vectors
(docs/decisions/2026-11-24-routing-quality.md).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ash.encoders.bert_graph import BertShape, write_quantised
from ash.encoders.light import GRAPH_FILE, TOKENIZER_FILE
from ash.encoders.tokens import RequestTokens, padded
from ash.encoders.tuning import JOB_FILE, Epoch, Job, Tuning
from ash.ipc.parent import die_with_parent

# Read when PyTorch and its companions are imported, which is why they are set before.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch
from transformers import AutoModel
from transformers.utils import logging

_WEIGHT_DECAY = 0.01
_LARGEST_GRADIENT = 1.0
# Batches whose texts are sorted by length together.
_WINDOW = 32


class Trainer:
    """The model with a classifier on top, and the optimiser of both."""

    def __init__(self, source: Path, tuning: Tuning, labels: Sequence[str], steps: int) -> None:
        """Load the model in the folder `source`; `steps` is how many will be taken.

        Raises:
            OSError: it cannot be loaded.
        """
        torch.manual_seed(tuning.seed)
        self._tuning = tuning
        self._column = {label: number for number, label in enumerate(labels)}
        self._tokens = RequestTokens(source / TOKENIZER_FILE)
        self._model: Any = AutoModel.from_pretrained(source, local_files_only=True)
        self._model.encoder.layer = self._model.encoder.layer[: tuning.layers]
        # Words that no example holds must keep their place beside those that one does.
        for parameter in self._model.embeddings.parameters():
            parameter.requires_grad = False
        self._head = torch.nn.Linear(self._model.config.hidden_size, len(labels))
        torch.nn.init.zeros_(self._head.weight)
        torch.nn.init.zeros_(self._head.bias)
        self._dropout = torch.nn.Dropout(tuning.dropout)
        self._rates = (tuning.learning_rate, tuning.head_learning_rate)
        parts = (self._model.encoder.parameters(), self._head.parameters())
        self._optimiser = torch.optim.AdamW(
            [{"params": list(part), "lr": rate} for part, rate in zip(parts, self._rates, strict=True)],
            weight_decay=_WEIGHT_DECAY,
        )
        self._steps = steps
        self._step = 0
        self._model.train()

    def pass_over(self, epoch: Epoch, number: int) -> float:
        """Take a step for every batch of `epoch`; returns the mean loss."""
        ids = [self._tokens.ids(text) for text in epoch.texts]
        targets = [self._column[label] for label in epoch.labels]
        counts = np.bincount(targets, minlength=len(self._column)).clip(1)
        # Between equal weights and equal shares: neither rare nor frequent labels take over.
        weights = torch.tensor((len(targets) / len(self._column) / counts) ** 0.5, dtype=torch.float32)
        # Nothing secret hangs on the order.
        generator = random.Random(self._tuning.seed + number)  # noqa: S311
        losses = [
            self._take_step([ids[i] for i in batch], [targets[i] for i in batch], weights)
            for batch in batches(ids, self._tuning.batch, generator)
        ]
        return float(np.mean(losses))

    def weights(self) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """The tuned model's, by the names of Hugging Face's BertModel."""
        return {name: value.detach().numpy() for name, value in self._model.state_dict().items()}

    def _take_step(self, ids: Sequence[Sequence[int]], targets: Sequence[int], weights: Any) -> float:
        self._set_rates()
        tokens, mask = (torch.from_numpy(part) for part in padded(ids))
        hidden = self._model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        unit = torch.nn.functional.normalize(mean, dim=1)
        loss = torch.nn.functional.cross_entropy(
            self._head(self._dropout(unit)) * self._tuning.scale,
            torch.tensor(targets),
            weight=weights,
            label_smoothing=self._tuning.label_smoothing,
        )
        self._optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), _LARGEST_GRADIENT)
        self._optimiser.step()
        return float(loss.item())

    def _set_rates(self) -> None:
        rising = (self._step + 1) / (self._tuning.warm_up * self._steps)
        factor = min(rising, 1.0) * (1 - self._step / self._steps)
        for group, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._step += 1


def batches(ids: Sequence[Sequence[int]], size: int, generator: random.Random) -> Iterator[list[int]]:
    """Numbers of texts in random order, yet next to others of about their length: padding costs time."""
    order = list(range(len(ids)))
    generator.shuffle(order)
    window = _WINDOW * size
    alike = [
        number
        for start in range(0, len(order), window)
        for number in sorted(order[start : start + window], key=lambda i: len(ids[i]))
    ]
    found = [alike[start : start + size] for start in range(0, len(alike), size)]
    generator.shuffle(found)
    yield from found


def run(folder: Path) -> None:
    """Do the job in `folder`: write GRAPH_FILE and TOKENIZER_FILE there.

    Raises:
        OSError, msgspec.DecodeError: job or model cannot be read.
        KeyError: the model is not a BERT.
    """
    job = msgspec.json.decode((folder / JOB_FILE).read_bytes(), type=Job)
    source = Path(job.model)
    labels = sorted({label for epoch in job.epochs for label in epoch.labels})
    steps = sum(-(-len(epoch.texts) // job.tuning.batch) for epoch in job.epochs)
    trainer = Trainer(source, job.tuning, labels, steps)
    for number, epoch in enumerate(job.epochs):
        loss = trainer.pass_over(epoch, number)
        sys.stdout.write(f"epoch {number + 1} of {len(job.epochs)}: loss {loss:.3f}\n")
        sys.stdout.flush()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    shape = msgspec.convert({**config, "num_hidden_layers": job.tuning.layers}, BertShape)
    shutil.copyfile(source / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    write_quantised(trainer.weights(), shape, folder / GRAPH_FILE)


def main() -> None:
    """Run the process; its argument is the folder."""
    die_with_parent()
    logging.disable_progress_bar()
    # More threads would take the cores that the machine is needed for, and change the result.
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
