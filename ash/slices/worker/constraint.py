"""Output formats: JSON schemas, Lark grammars and regular expressions, enforced while tokens are drawn.

llguidance computes which tokens may come next; docs/decisions/ compares it with llama.cpp's own grammars.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from ash.domain.errors import FormatError
from ash.domain.values import OutputFormat
from ash.slices.worker.inference import Vocabulary

_LIMITS: Final = LLParserLimits(max_grammar_size=100_000, verbose_errors=False)
"""A format comes from a client: it may not take the worker's memory."""

_JSON: Final[Any] = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""As json.dumps writes it. Free whitespace would let a small model write nothing else."""

_SPECIAL: Final = b"\xff"
"""Marks pieces of control tokens for llguidance, so that no text can be made of them."""


class FormatConstraint:
    """The state of one answer that has to match a format (protocol Constraint)."""

    def __init__(self, matcher: LLMatcher, vocabulary_size: int) -> None:
        self._matcher = matcher
        self._mask = np.zeros((vocabulary_size + 31) // 32, dtype=np.uint32)

    @property
    def is_complete(self) -> bool:
        """True when nothing may follow any more."""
        return bool(self._matcher.is_stopped())

    def accept(self, token: int) -> None:
        """Count a token of the answer.

        Raises:
            FormatError: the format does not allow it here.
        """
        if not self._matcher.consume_token(token):
            raise FormatError(f"the answer left its format: {self._reason()}")

    def mask(self, logits: NDArray[np.float32]) -> None:
        """Set the logits (shape: vocabulary) of tokens that may not come next to minus infinity.

        Raises:
            FormatError: no token can continue the format, or finding out takes too much.
        """
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._matcher.is_error():
            raise FormatError(f"the format cannot be followed any further: {self._reason()}")
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: len(logits)]
        logits[allowed == 0] = -np.inf

    def _reason(self) -> str:
        return self._matcher.get_error() or str(self._matcher.stop_reason())


class FormatCompiler:
    """Makes constraints for one vocabulary.

    Args:
        vocabulary: the model's tokens.
        size: how many there are.
        end_tokens: those that end a generation, the usual one first.
    """

    def __init__(self, vocabulary: Vocabulary, size: int, end_tokens: Sequence[int]) -> None:
        self._size = size
        special = [token for token in range(size) if vocabulary.is_control(token)]
        pieces = vocabulary.pieces()
        for token in special:
            pieces[token] = _SPECIAL + pieces[token]
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Tokens(pieces, special, end_tokens[0], vocabulary.tokenise)),
            n_vocab=size,
            eos_token=list(end_tokens),
        )

    def compile(self, wanted: OutputFormat) -> FormatConstraint:
        """A constraint at the beginning of an answer.

        Raises:
            FormatError: the definition is not one, or is too large.
        """
        try:
            match wanted.syntax:
                case "json_schema":
                    grammar = LLMatcher.grammar_from_json_schema(wanted.definition, overrides=_JSON)
                case "lark":
                    grammar = LLMatcher.grammar_from_lark(wanted.definition)
                case "regex":
                    grammar = LLMatcher.grammar_from_regex(wanted.definition)
        except ValueError as error:
            raise FormatError(f"the {wanted.syntax} of the output format is not one: {error}") from error
        matcher = LLMatcher(self._tokenizer, grammar, limits=_LIMITS, log_level=0)
        if matcher.is_error():
            raise FormatError(
                f"the {wanted.syntax} of the output format does not compile: {matcher.get_error()}"
            )
        return FormatConstraint(matcher, self._size)


class _Tokens:
    """A vocabulary in the shape that TokenizerWrapper expects."""

    bos_token_id = None

    def __init__(
        self,
        tokens: Sequence[bytes],
        special: Sequence[int],
        end_token: int,
        tokenise: Callable[[bytes], list[int]],
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = end_token
        self._tokenise = tokenise

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenise(text)
