"""Make the model of the light encoder: the job, and the process that does it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from ash.domain.errors import EncoderUnavailable
from ash.encoders.light import GRAPH_FILE, TOKENIZER_FILE

JOB_FILE = "job.json"

# Goes up when the same job would give another encoder.
_VERSION = 1
# A traceback of the libraries ends with what was wrong.
_TOLD_LINES = 3


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
        epochs: passes over the examples.
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
    epochs: int = 3
    seed: int = 1


class Epoch(Struct, frozen=True):
    """The examples of one pass: texts and their labels."""

    texts: list[str]
    labels: list[str]


class Job(Struct, frozen=True):
    """What to do: `model` is the folder of a sentence-transformers BERT model."""

    model: str
    tuning: Tuning
    epochs: list[Epoch]


def light_folder(parent: Path, base: str, tuning: Tuning, contents: Sequence[str]) -> Path:
    """Where in `parent` the light encoder lies that is tuned this way; anything else has another folder.

    Args:
        parent: of all light encoders.
        base: the identity of the model that it is made from.
        tuning: how.
        contents: hashes of what the examples are made from.
    """
    facts = msgspec.json.encode([_VERSION, base, tuning, contents])
    return parent / f"light-{hashlib.sha256(facts).hexdigest()[:32]}"


def is_made(folder: Path) -> bool:
    """True where `folder` holds a light encoder."""
    return (folder / GRAPH_FILE).is_file() and (folder / TOKENIZER_FILE).is_file()


async def make_light_encoder(folder: Path, job: Job) -> None:
    """Tune an encoder in a process of its own and leave it in `folder`, whole or not at all.

    Five to fifteen minutes for the router's examples, on one core; nothing to do where `folder` holds one
    already. Cancelling ends the process.

    Raises:
        EncoderUnavailable: it did not work; says why.
        OSError: `folder` cannot be written.
    """
    if is_made(folder):
        return
    # Not in a thread: a cancelled call would leave behind what the thread still makes.
    work = _prepare(folder, job)
    try:
        await _run_trainer(work)
        await asyncio.to_thread(_put, work, folder)
    finally:
        await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)


def _prepare(folder: Path, job: Job) -> Path:
    """A new folder beside `folder` that holds the job."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    (work / JOB_FILE).write_bytes(msgspec.json.encode(job))
    return work


def _put(work: Path, folder: Path) -> None:
    (work / JOB_FILE).unlink()
    # Somebody else may have been faster with the same; theirs is as good.
    with contextlib.suppress(OSError):
        work.rename(folder)
    if not is_made(folder):
        raise EncoderUnavailable(f"the light encoder was made but could not be put at {folder}; remove that")


async def _run_trainer(work: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "ash.encoders.trainer",
        str(work),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, errors = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        told = errors.decode("utf-8", "replace").strip().splitlines()[-_TOLD_LINES:]
        raise EncoderUnavailable(
            f"the light encoder could not be made, status {process.returncode}: {' '.join(told)}; "
            "the encoder of a package needs no making: set router.encoder to package:NAME"
        )
