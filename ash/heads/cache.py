"""Fitted heads on disk, so that a warm start encodes and fits nothing."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from ash.heads.head import Head, Training

# Goes up when fitting or the file's format changes, so that older files are no longer found.
HEAD_VERSION = 1

_DIGEST_BYTES = 32


def head_key(
    *, purpose: str, encoder: str, content_hash: str, training: Training, features: Sequence[object] = ()
) -> str:
    """The name of a fitted head: anything that changes its weights changes the key.

    Args:
        purpose: what the head decides, such as `intents`; becomes the readable part of the key.
        encoder: the encoder's identity.
        content_hash: of the anchors.
        training: hyperparameters.
        features: whatever defines the features beside the encoder's: their names, sizes and scales.
    """
    facts = msgspec.json.encode([HEAD_VERSION, purpose, encoder, content_hash, training, features])
    return f"{purpose}-{hashlib.sha256(facts).hexdigest()[:32]}"


class HeadCache:
    """Heads as files in one folder: a SHA-256 digest and the .npz that it is the digest of."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, key: str) -> Path:
        """Where the head of `key` is kept."""
        return self._folder / f"{key}.head"

    def load(self, key: str) -> Head | None:
        """The head of `key`, or None where there is no sound one: the caller then fits it and stores it.

        Raises:
            OSError: the file is there but cannot be read.
        """
        try:
            content = self.path(key).read_bytes()
        except FileNotFoundError:
            return None
        digest, arrays = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        # Checked first, because a damaged zip file makes its reader raise nearly anything.
        if hashlib.sha256(arrays).digest() != digest:
            return None
        try:
            return _decoded(arrays)
        except (ValueError, TypeError, KeyError):
            # Whole, but no head. It is a cache: the next store() overwrites it.
            return None

    def store(self, key: str, head: Head) -> None:
        """Keep `head` under `key`; it is written whole or not at all.

        Raises:
            OSError: the folder cannot be written; a head that was there before is intact.
        """
        arrays = _encoded(head)
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self._folder, prefix=f".{key}-", suffix=".tmp")
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(arrays).digest() + arrays)
            temporary.replace(self.path(key))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _encoded(head: Head) -> bytes:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        labels=np.asarray(head.labels),
        weights=head.weights,
        bias=head.bias,
        temperature=np.asarray(head.temperature),
        prior=head.prior,
    )
    return buffer.getvalue()


def _decoded(content: bytes) -> Head:
    """The head in the .npz `content`.

    Raises:
        ValueError, TypeError, KeyError: it holds something else.
    """
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return _checked(
            Head(
                labels=tuple(arrays["labels"].tolist()),
                weights=arrays["weights"],
                bias=arrays["bias"],
                temperature=float(arrays["temperature"]),
                prior=arrays["prior"],
            )
        )


def _checked(head: Head) -> Head:
    """`head` itself.

    Raises:
        ValueError: its parts do not fit each other.
    """
    classes = len(head.labels)
    shapes = (head.weights.ndim, head.weights.shape[-1:], head.bias.shape, head.prior.shape)
    if shapes != (2, (classes,), (classes,), (classes,)) or not all(isinstance(n, str) for n in head.labels):
        raise ValueError(f"a cached head has parts of shapes {shapes} for {classes} labels")
    if any(a.dtype != np.float64 for a in (head.weights, head.bias, head.prior)):
        raise ValueError("a cached head holds other numbers than float64")
    numbers = np.concatenate([head.weights.ravel(), head.bias, head.prior, [head.temperature]])
    if not np.all(np.isfinite(numbers)) or head.temperature <= 0:
        raise ValueError("a cached head holds numbers that are not finite")
    return head
