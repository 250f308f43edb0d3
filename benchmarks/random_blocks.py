"""Random weights in the block formats of ggml: uniform quants under one scale, so no row stands out.

Layouts: block_* in ggml/src/ggml-common.h of llama.cpp. Weights come out with mean about 0 and the standard
deviation that was asked for, because a model of weights without any scale overflows or gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_PIECE_BYTES: Final = 16 * 1024 * 1024
_UNIFORM_4_BIT: Final = 4.610  # standard deviation of 0..15, sqrt((16**2 - 1) / 12)
_SCALE: Final = 16
"""Of the 6-bit and 8-bit scales inside K blocks; the block's own factor takes the rest."""

Blocks = npt.NDArray[Any]
Fill = Callable[[Blocks, float], None]


def _q4_0(blocks: Blocks, deviation: float) -> None:
    blocks["d"] = deviation / _UNIFORM_4_BIT


def _q8_0(blocks: Blocks, deviation: float) -> None:
    blocks["d"] = deviation / 73.9  # of -128..127


def _q3_k(blocks: Blocks, deviation: float) -> None:
    # 6-bit scales minus 32: 48 is the low half 0 of eight bytes and the high part 3 of four.
    blocks["scales"][:, :8] = 0x00
    blocks["scales"][:, 8:] = 0xFF
    blocks["d"] = deviation / (2.291 * _SCALE)  # of -4..3


def _q4_k(blocks: Blocks, deviation: float) -> None:
    # Scales and minima are all 15: small enough to need no high bits.
    blocks["scales"][:, :8] = 15
    blocks["scales"][:, 8:] = 0xFF
    blocks["d"] = deviation / (_UNIFORM_4_BIT * 15)
    blocks["dmin"] = 7.5 * deviation / (_UNIFORM_4_BIT * 15)


def _q6_k(blocks: Blocks, deviation: float) -> None:
    blocks["scales"] = _SCALE
    blocks["d"] = deviation / (18.47 * _SCALE)  # of -32..31


_FORMATS: Final[dict[str, tuple[Any, Fill]]] = {
    "Q4_0": ([("d", "<f2"), ("qs", "u1", 16)], _q4_0),
    "Q8_0": ([("d", "<f2"), ("qs", "i1", 32)], _q8_0),
    "Q3_K": ([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")], _q3_k),
    "Q4_K": ([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)], _q4_k),
    "Q6_K": ([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")], _q6_k),
}
_ELEMENTS: Final = {"Q4_0": 32, "Q8_0": 32, "Q3_K": 256, "Q4_K": 256, "Q6_K": 256}

TYPES: Final = (*_FORMATS, "F16")
"""Types that can be made here."""


def block_elements(kind: str) -> int:
    """Elements that share a block: rows are multiples of it."""
    return _ELEMENTS.get(kind, 1)


def random_weights(
    shape: tuple[int, ...], kind: str, deviation: float, generator: np.random.Generator
) -> Iterator[bytes]:
    """The bytes of one tensor, in pieces.

    Args:
        shape: elements of each dimension; the first one is a multiple of `block_elements(kind)`.
        kind: one of TYPES.
        deviation: standard deviation of the weights.
        generator: where the randomness comes from; the same state gives the same bytes.
    """
    if kind == "F16":
        for count in _pieces(prod(shape), 2):
            yield (generator.standard_normal(count, np.float32) * deviation).astype("<f2").tobytes()
        return
    fields, fill = _FORMATS[kind]
    layout = np.dtype(fields)
    for count in _pieces(prod(shape) // _ELEMENTS[kind], layout.itemsize):
        blocks = np.frombuffer(bytearray(generator.bytes(count * layout.itemsize)), layout)
        fill(blocks, deviation)
        yield blocks.tobytes()


def _pieces(count: int, item_bytes: int) -> Iterator[int]:
    most = _PIECE_BYTES // item_bytes
    for start in range(0, count, most):
        yield min(most, count - start)
