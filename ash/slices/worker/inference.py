"""What the decoder needs from a model: implemented over llama.cpp (llama.py) and by a fake in the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ash.domain.values import Sampling


class BatchEntry(Struct, frozen=True):
    """Tokens of one sequence, for its positions `position` and up; logits are of the last token."""

    slot: int
    position: int
    tokens: tuple[int, ...]
    wants_logits: bool


class Vocabulary(Protocol):
    """Tokens and the bytes they stand for. Its methods may be called from any thread."""

    def pieces(self) -> list[bytes]:
        """The bytes of every token, special tokens spelt out."""

    def tokenise(self, text: bytes) -> list[int]:
        """Token ids of `text`; special tokens in it are recognised, none is added."""

    def is_control(self, token: int) -> bool:
        """True for tokens that structure a prompt, such as the end of a turn."""

    def piece(self, token: int) -> bytes:
        """The bytes that `token` stands for in a prompt, special tokens spelt out."""

    def shown_piece(self, token: int) -> bytes:
        """The bytes of `token` in an answer: nothing for special tokens."""

    def is_end(self, token: int) -> bool:
        """True for tokens that end a generation."""


class Constraint(Protocol):
    """The output format of one generation, token by token."""

    @property
    def is_complete(self) -> bool:
        """True when nothing may follow any more."""

    def accept(self, token: int) -> None:
        """Count a token of the answer.

        Raises:
            FormatError: the format does not allow it here.
        """

    def mask(self, logits: NDArray[np.float32]) -> None:
        """Set the logits (shape: vocabulary) of tokens that may not come next to minus infinity."""


class Sampler(Protocol):
    """Draws the tokens of one generation."""

    def accept(self, token: int) -> None:
        """Count a token that was not sampled here, for the repetition penalty."""

    def close(self) -> None:
        """Free it. Idempotent."""


class KvMemory(Protocol):
    """The KV cache: `slot` is the number of a sequence."""

    def first_position(self, slot: int) -> int:
        """The first position that all layers still hold; -1 for an empty sequence."""

    def remove(self, slot: int, start: int) -> bool:
        """Remove positions from `start` on; False if that is impossible. From 0 on it never fails."""

    def state_bytes(self, slot: int) -> int:
        """Size of what `save` would return."""

    def save(self, slot: int) -> bytearray:
        """The state of a sequence."""

    def restore(self, slot: int, state: bytearray) -> bool:
        """Put a saved state into an empty sequence; False if it does not fit."""

    def save_windows(self, slot: int) -> bytearray:
        """The part of a sequence's state that moves on: its sliding windows."""

    def restore_windows(self, slot: int, windows: bytearray) -> bool:
        """Put saved windows back over those of now; what lies behind them must be removed next."""


class Inference(KvMemory, Protocol):
    """A model with its KV cache; belongs to one thread."""

    def decode(self, entries: Sequence[BatchEntry]) -> int:
        """Compute a batch. 0 done, 1 no room in the KV cache, anything else failed half-way."""

    def new_sampler(self, sampling: Sampling, *, seed: int) -> Sampler:
        """A sampler for one generation."""

    def sample(self, sampler: Sampler, index: int, constraint: Constraint | None) -> int:
        """Draw a token from the logits at position `index` of the last batch, among those allowed."""
