"""The tokens of one session in the KV cache, and how much of them a new prompt can use. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from msgspec import Struct


class TokenisedText(Struct, frozen=True):
    """Tokens and the bytes that they stand for; `ends[i]` is the number of bytes up to and with token i.

    Some tokenisers add or normalise bytes, so that the pieces of a text do not join to it again. Then every
    token's end is the end of the whole text: it can be used again as a whole only.
    """

    text: bytes
    tokens: tuple[int, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, text: bytes, tokens: Sequence[int], pieces: Sequence[bytes]) -> TokenisedText:
        """Align `pieces` (the bytes of each token) with `text`."""
        if b"".join(pieces) == text:
            return cls(text, tuple(tokens), tuple(accumulate(map(len, pieces))))
        return cls(text, tuple(tokens), (len(text),) * len(tokens))

    @classmethod
    def joined(cls, parts: Sequence[TokenisedText], separator: bytes) -> TokenisedText:
        """`parts` in a row; the text of each separator belongs to the token behind it."""
        text = bytearray()
        tokens: list[int] = []
        ends: list[int] = []
        for index, part in enumerate(parts):
            if index:
                text += separator
            tokens += part.tokens
            ends += [len(text) + end for end in part.ends]
            text += part.text
        return cls(bytes(text), tuple(tokens), tuple(ends))

    def ending_within(self, size: int) -> int:
        """How many leading tokens stand for the first `size` bytes or fewer."""
        return bisect_right(self.ends, size)

    def behind(self, count: int) -> TokenisedText:
        """What follows the first `count` tokens, which must end at a boundary."""
        start = self.ends[count - 1] if count else 0
        return TokenisedText(
            self.text[start:], self.tokens[count:], tuple(end - start for end in self.ends[count:])
        )


class SequenceRecord(Struct, frozen=True, array_like=True):
    """A TokenSequence at one moment, for a file."""

    tokens: list[int]
    ends: list[int]
    text: bytes
    cached: int


class TokenSequence:
    """Token ids of one session, in order, with the bytes they stand for.

    The first `cached` tokens are in the KV cache; those behind it still have to be computed: a prompt, or
    the last token that was sampled.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.cached = 0
        self._ends: list[int] = []
        self._text = bytearray()

    @classmethod
    def of(cls, record: SequenceRecord) -> TokenSequence:
        """The sequence as it was when `record` was made.

        Raises:
            ValueError: the record contradicts itself.
        """
        ends = record.ends
        if len(ends) != len(record.tokens) or not 0 <= record.cached <= len(ends):
            raise ValueError("a record of a token sequence contradicts itself")
        if ends and ends[-1] != len(record.text):
            raise ValueError("the tokens of a record do not make its text")
        sequence = cls()
        sequence.tokens, sequence._ends = list(record.tokens), list(ends)
        sequence._text, sequence.cached = bytearray(record.text), record.cached
        return sequence

    def record(self) -> SequenceRecord:
        """A copy of this moment."""
        return SequenceRecord(list(self.tokens), list(self._ends), bytes(self._text), self.cached)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens that are not in the KV cache."""
        return len(self.tokens) - self.cached

    @property
    def cached_tokens(self) -> list[int]:
        """The tokens that are in the KV cache."""
        return self.tokens[: self.cached]

    def append(self, token: int, piece: bytes) -> None:
        """Add a sampled token."""
        self.tokens.append(token)
        self._text += piece
        self._ends.append(len(self._text))

    def extend(self, part: TokenisedText) -> None:
        """Add tokenised text."""
        start = len(self._text)
        self.tokens.extend(part.tokens)
        self._ends.extend(start + end for end in part.ends)
        self._text += part.text

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens, up to a boundary that `common_boundary` gave.

        The caller removes the others from the KV cache.
        """
        del self.tokens[length:]
        del self._ends[length:]
        del self._text[self._ends[-1] if self._ends else 0 :]
        self.cached = min(self.cached, length)

    def clear(self) -> None:
        """Forget everything."""
        self.truncate(0)

    def is_prefix_of(self, text: bytes) -> bool:
        """True when `text` goes on where this sequence ends."""
        return text.startswith(self._text)

    def text_behind(self, text: bytes) -> bytes:
        """What `text` has behind this sequence, which must be a prefix of it."""
        return text[len(self._text) :]

    def common_boundary(self, other: TokenisedText) -> tuple[int, int]:
        """The longest common beginning that ends with a whole token on both sides, as two token counts.

        Cutting where only this side has a boundary would make the model read a word split in a way that its
        tokeniser never produces.
        """
        shared = shared_length(self._text, other.text)
        boundaries = {end: count for count, end in enumerate(other.ends, 1) if end <= shared}
        for count in range(len(self._ends), 0, -1):
            end = self._ends[count - 1]
            if end in boundaries:
                return count, boundaries[end]
        return 0, 0


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning, by bisection over whole comparisons."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
