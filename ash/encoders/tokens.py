"""Text to token ids for the light encoder, in training and in use alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ash.encoders.sentence import cut

# A request says what it wants at its beginning or its end. Time grows faster than length, so the middle is
# left out: 98 tokens with the two marks take a quarter of the time of the 256 that the model could read.
HEAD_TOKENS = 64
TAIL_TOKENS = 32

_BEGINNING, _END = "[CLS]", "[SEP]"


class RequestTokens:
    """A WordPiece tokeniser that keeps the first 64 and the last 32 tokens of a text."""

    def __init__(self, path: Path) -> None:
        """Read tokenizer.json at `path`.

        Raises:
            ValueError: it is no tokeniser, or not one of BERT's.
        """
        # The library raises bare Exception for whatever it does not like.
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise ValueError(f"{path}: no tokenizer.json of the tokenizers library: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        beginning = self._tokenizer.token_to_id(_BEGINNING)
        end = self._tokenizer.token_to_id(_END)
        if beginning is None or end is None:
            raise ValueError(f"{path}: has no {_BEGINNING} and {_END}; give the tokeniser of a BERT model")
        self._beginning: int = beginning
        self._end: int = end

    def ids(self, text: str) -> list[int]:
        """The ids of `text` between the marks; at most HEAD_TOKENS + TAIL_TOKENS + 2."""
        found: list[int] = self._tokenizer.encode(cut(text), add_special_tokens=False).ids
        if len(found) > HEAD_TOKENS + TAIL_TOKENS:
            found = found[:HEAD_TOKENS] + found[-TAIL_TOKENS:]
        return [self._beginning, *found, self._end]


def padded(ids: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and mask, each of shape (texts, longest), zeros behind shorter texts."""
    longest = max(map(len, ids))
    tokens = np.zeros((len(ids), longest), dtype=np.int64)
    mask = np.zeros((len(ids), longest), dtype=np.float32)
    for row, text in enumerate(ids):
        tokens[row, : len(text)] = text
        mask[row, : len(text)] = 1.0
    return tokens, mask
