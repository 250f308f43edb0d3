"""Heads on disk: found again, never trusted blindly."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest

from ash.heads.cache import HeadCache, head_key
from ash.heads.head import Head, Training

HEAD = Head(("a", "b"), np.arange(6.0).reshape(3, 2), np.array([1.0, -1.0]), 1.5, np.array([0.25, 0.75]))
KEY = "intents-0123"


@pytest.fixture
def cache(tmp_path: Path) -> HeadCache:
    return HeadCache(tmp_path / "heads")


def test_a_stored_head_comes_back_whole(cache: HeadCache) -> None:
    assert cache.load(KEY) is None
    cache.store(KEY, HEAD)

    found = cache.load(KEY)

    assert found is not None
    assert (found.labels, found.temperature) == (HEAD.labels, HEAD.temperature)
    for name in ("weights", "bias", "prior"):
        np.testing.assert_array_equal(getattr(found, name), getattr(HEAD, name))


def test_every_cut_and_every_flipped_byte_is_noticed(cache: HeadCache) -> None:
    cache.store(KEY, HEAD)
    path = cache.path(KEY)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert cache.load(KEY) is None
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 0x10
        path.write_bytes(changed)
        assert cache.load(KEY) is None

    cache.store(KEY, HEAD)
    assert cache.load(KEY) is not None


@pytest.mark.parametrize(
    "head",
    [
        Head(("a",), HEAD.weights, HEAD.bias, 1.0, HEAD.prior),
        Head(HEAD.labels, HEAD.weights[:, :1], HEAD.bias, 1.0, HEAD.prior),
        Head(HEAD.labels, HEAD.weights * np.nan, HEAD.bias, 1.0, HEAD.prior),
        Head(HEAD.labels, HEAD.weights, HEAD.bias, 0.0, HEAD.prior),
        Head(HEAD.labels, HEAD.weights.astype(np.float32), HEAD.bias, 1.0, HEAD.prior),  # type: ignore[arg-type]
    ],
)
def test_a_head_that_does_not_fit_together_is_not_loaded(cache: HeadCache, head: Head) -> None:
    cache.store(KEY, head)
    assert cache.load(KEY) is None


@pytest.mark.parametrize(
    "arrays",
    [
        {"labels": np.array([Path()], dtype=object)},
        {"labels": np.array(["a", "b"]), "weights": HEAD.weights},
    ],
    ids=["pickled", "incomplete"],
)
def test_what_is_whole_but_no_head_is_not_loaded(cache: HeadCache, arrays: dict[str, object]) -> None:
    cache.store(KEY, HEAD)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # faulty on purpose
    cache.path(KEY).write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    assert cache.load(KEY) is None


def test_a_failed_write_leaves_the_old_head(cache: HeadCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(KEY, HEAD)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        cache.store(KEY, HEAD)
    assert cache.load(KEY) is not None
    assert [path.name for path in cache.path(KEY).parent.iterdir()] == [f"{KEY}.head"]


def test_whatever_changes_a_head_changes_its_key() -> None:
    facts = {"purpose": "intents", "encoder": "e", "content_hash": "c", "training": Training()}
    key = head_key(**facts)  # type: ignore[arg-type]  # a mapping of keyword arguments for brevity
    assert key.startswith("intents-")
    assert key == head_key(**facts)  # type: ignore[arg-type]
    for change in (
        {"purpose": "modes"},
        {"encoder": "f"},
        {"content_hash": "d"},
        {"training": Training(folds=4)},
        {"features": ("rhyme",)},
    ):
        assert head_key(**{**facts, **change}) != key  # type: ignore[arg-type]
