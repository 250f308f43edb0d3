"""Makes a prompt fit the context by leaving out the oldest messages. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Final

from msgspec import Struct

from ash.domain.errors import PromptTooLong
from ash.domain.values import ChatMessage

MAX_TOKEN_BYTES: Final = 64
"""No ordinary text has longer tokens on average; more bytes than this per token cannot fit."""


class FittedPrompt(Struct, frozen=True):
    """The messages that are left, and how many of the oldest were left out."""

    messages: tuple[ChatMessage, ...]
    dropped: int


def answer_room(max_tokens: int, context: int) -> int:
    """Tokens that a prompt must leave for its answer: `max_tokens`, but at most a quarter of the context."""
    return min(max_tokens, context // 4)


def fit_prompt(
    messages: Sequence[ChatMessage],
    *,
    context: int,
    max_tokens: int,
    count_tokens: Callable[[Sequence[ChatMessage]], int],
) -> FittedPrompt:
    """Drop the oldest messages until the prompt fits `context` tokens beside the answer.

    System messages stay. Others go in pairs: a user message with the answers behind it. Once anything has to
    go, so much goes that the rest takes half of the context or less, so that the turns that follow can extend
    the same prompt (and find it in the KV cache) for a while.

    Args:
        messages: the whole prompt, a user message last.
        context: tokens of the context.
        max_tokens: the most tokens of the answer.
        count_tokens: tokens of the prompt of some messages, template included.

    Raises:
        PromptTooLong: the system messages and the last exchange alone do not fit.
        TemplateError: from `count_tokens`.
    """
    limit = context - answer_room(max_tokens, context)
    cuts = _cuts(messages)
    sizes = _sizes(messages, cuts)
    byte_limit = context * MAX_TOKEN_BYTES
    if sizes[-1] > byte_limit:
        raise PromptTooLong(
            f"the message has {sizes[-1]} bytes, far more than the {limit} tokens that this slice takes; "
            "shorten it or split it",
            limit=limit,
        )

    def tokens_from(cut: int) -> int:
        return count_tokens(_from(messages, cut))

    # Sizes fall from cut to cut, so the first one that may be worth tokenising is found by bisection.
    first = bisect_left(sizes, -byte_limit, key=lambda size: -size)
    chosen = first
    if tokens_from(cuts[first]) > limit:
        comfortable = context // 2
        chosen = bisect_left(cuts, True, lo=first, key=lambda cut: tokens_from(cut) <= comfortable)
        chosen = min(chosen, len(cuts) - 1)
        tokens = tokens_from(cuts[chosen])
        if tokens > limit:
            raise PromptTooLong(
                f"the message takes {tokens} tokens with the persona, this slice takes {limit} beside the "
                "answer; shorten it or split it",
                limit=limit,
            )
    kept = _from(messages, cuts[chosen])
    return FittedPrompt(kept, len(messages) - len(kept))


def _cuts(messages: Sequence[ChatMessage]) -> list[int]:
    """Where the history may begin: at 0 and at each user message that has something to drop before it."""
    cuts = [0]
    droppable = False
    for index, message in enumerate(messages):
        if message.role == "user" and droppable:
            cuts.append(index)
        droppable = droppable or message.role != "system"
    return cuts


def _from(messages: Sequence[ChatMessage], cut: int) -> tuple[ChatMessage, ...]:
    return tuple(
        message for index, message in enumerate(messages) if index >= cut or message.role == "system"
    )


def _sizes(messages: Sequence[ChatMessage], cuts: Sequence[int]) -> list[int]:
    """Bytes of text that are left by each cut."""
    lengths = [len(message.text.encode("utf-8", "replace")) for message in messages]
    droppable = [
        0 if message.role == "system" else length for message, length in zip(messages, lengths, strict=True)
    ]
    dropped_before = [0, *accumulate(droppable)]
    total = sum(lengths)
    return [total - dropped_before[cut] for cut in cuts]
