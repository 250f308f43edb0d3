"""A deterministic encoder without a model: for tests, and for a server that shall start in no time."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

from ash.domain.errors import EncoderUnavailable


class HashEncoder:
    """Hashed character n-grams as unit vectors (feature hashing, Weinberger et al. 2009).

    Texts that share spelling come out near each other; meaning plays no part.
    """

    def __init__(self, *, dimensions: int = 256, lengths: Sequence[int] = (3, 4)) -> None:
        """Choose the size.

        Args:
            dimensions: length of a vector.
            lengths: characters of the n-grams.

        Raises:
            ValueError: a number is not positive.
        """
        if dimensions < 1 or not lengths or min(lengths) < 1:
            raise ValueError(f"dimensions {dimensions} and lengths {tuple(lengths)} must be positive")
        self._dimensions = dimensions
        self._lengths = tuple(lengths)
        self._opened = False

    @property
    def dimensions(self) -> int:
        return self._dimensions

    @property
    def identity(self) -> str:
        return f"hash-{'-'.join(map(str, self._lengths))}-{self._dimensions}@1"

    async def open(self) -> None:
        self._opened = True

    async def close(self) -> None:
        self._opened = False

    async def encode(self, texts: Sequence[str]) -> list[list[float]]:
        if not self._opened:
            raise EncoderUnavailable("the encoder is closed; open it first")
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[float]:
        padded = f" {' '.join(text.casefold().split())} "
        vector = [0.0] * self._dimensions
        # The whole text is a gram too, so that a text shorter than every n-gram has one.
        grams = [padded]
        grams += [padded[i : i + n] for n in self._lengths for i in range(len(padded) - n + 1)]
        for gram in grams:
            # crc32 is the same in every process, unlike hash().
            code = zlib.crc32(gram.encode("utf-8", "surrogatepass"))
            vector[(code >> 1) % self._dimensions] += 1.0 if code & 1 else -1.0
        norm = math.hypot(*vector)
        if norm == 0.0:
            # Grams can cancel each other out; the vector must have length 1 all the same.
            vector[0] = norm = 1.0
        return [value / norm for value in vector]
