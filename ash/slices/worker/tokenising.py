"""From text to tokens, without letting the text of a message become structure."""

from __future__ import annotations

from typing import Final

from ash.slices.worker.inference import Vocabulary
from ash.slices.worker.sequence import TokenisedText

BREAK: Final = "\ufdd0"
"""Stands inside text that spells a control token; a noncharacter of Unicode, which no text should hold."""


def encoded(text: str) -> bytes:
    """`text` in UTF-8; a lone surrogate, which JSON can carry, has none and becomes `?`."""
    return text.encode("utf-8", "replace")


def tokenised(vocabulary: Vocabulary, text: bytes) -> TokenisedText:
    """`text` as tokens with the bytes that each stands for.

    What stands on either side of BREAK is tokenised on its own, so that it does not become a control token.
    """
    separator = encoded(BREAK)
    parts: list[TokenisedText] = []
    for part in text.split(separator):
        tokens = vocabulary.tokenise(part)
        parts.append(TokenisedText.of(part, tokens, [vocabulary.piece(token) for token in tokens]))
    return TokenisedText.joined(parts, separator)


def without_controls(vocabulary: Vocabulary, text: str, *, most_tokens: int) -> str:
    """`text` with a BREAK inside everything that spells a control token: only templates may write those.

    A message with `<|im_end|>` in it would otherwise end its own turn and speak as somebody else. Text of
    more than `most_tokens` tokens, which cannot be part of a prompt, is returned as it is: looking through
    all of it would take seconds.
    """
    text = text.replace(BREAK, "\N{REPLACEMENT CHARACTER}")
    while True:
        tokens = tokenised(vocabulary, encoded(text)).tokens
        if len(tokens) > most_tokens:
            return text
        spelt = {
            vocabulary.piece(token).decode("utf-8", "replace")
            for token in tokens
            if vocabulary.is_control(token)
        }
        broken = text
        for control in spelt:
            if len(control) > 1:
                broken = broken.replace(control, control[:1] + BREAK + control[1:])
        if broken == text:
            return text
        text = broken
