"""How much of a prompt to send to an endpoint whose tokeniser is not at hand. Pure.

The tokens of a prompt are estimated from its bytes, at the rate of the prompts before. The endpoint has the
last word: what it refuses as too long is fitted again by its own count.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Final

from msgspec import Struct

from ash.domain.errors import PromptTooLong
from ash.domain.values import ChatMessage, GenerateRequest
from ash.slices.remote.failure import ContextExceeded
from ash.slices.worker.fitting import answer_room, fit_prompt

FIRST_TOKENS_PER_BYTE: Final = 0.3
"""Before anything is known. English prose takes 0.2 to 0.25, code and other scripts more."""

MESSAGE_BYTES: Final = 16
"""What the template puts around a message, in bytes of text that take as many tokens."""

_NEWEST_WEIGHT: Final = 0.3
_REFUSED_MARGIN: Final = 1.05
"""A refused prompt was denser than others; its parts may be denser still."""


class PromptPlan(Struct, frozen=True):
    """What to send.

    Attributes:
        messages: the prompt; system messages and the newest of the others.
        dropped: how many of the oldest were left out.
        tokens: of the prompt with the continuation, estimated.
        weight: its bytes with those of the template.
        max_tokens: the most tokens of the answer, the continuation's taken off.
    """

    messages: tuple[ChatMessage, ...]
    dropped: int
    tokens: int
    weight: int
    max_tokens: int


class PromptSizer:
    """Plans prompts for one endpoint and learns from what it counts.

    Args:
        context: tokens of prompt and answer.
    """

    def __init__(self, context: int) -> None:
        self.context = context
        self._rate = FIRST_TOKENS_PER_BYTE

    def plan(self, request: GenerateRequest, *, max_tokens: int) -> PromptPlan:
        """What of `request` to send first.

        Raises:
            PromptTooLong: the last message has more bytes than any context holds.
        """
        return self._plan(request, max_tokens, self._rate, self.context)

    def replan(
        self, request: GenerateRequest, refused: PromptPlan, reason: ContextExceeded, *, max_tokens: int
    ) -> PromptPlan:
        """What to send after the endpoint refused a plan as too long.

        Raises:
            PromptTooLong: nothing can be left out any more.
        """
        context = min(self.context, reason.context or self.context)
        # An endpoint that gives no number has at least said that it is more than this.
        tokens = reason.prompt_tokens or max(ceil(1.3 * refused.tokens), context)
        rate = tokens / refused.weight
        plan = self._plan(request, max_tokens, rate * _REFUSED_MARGIN, context)
        # With its own count at hand the answer can be cut to what is left.
        plan_tokens = tokens if plan.messages == refused.messages else plan.tokens
        room = max(1, min(plan.max_tokens, context - plan_tokens))
        if plan.messages == refused.messages and (plan_tokens >= context or room >= refused.max_tokens):
            limit = context - answer_room(max_tokens, context)
            raise PromptTooLong(
                f"the last message takes {tokens} tokens with the persona, this slice takes {limit} beside "
                f"the answer; shorten it or split it ({reason})",
                limit=limit,
            )
        return PromptPlan(plan.messages, plan.dropped, plan_tokens, plan.weight, room)

    def learn(self, plan: PromptPlan, tokens: int) -> None:
        """The endpoint counted `tokens` in the prompt of `plan`."""
        if tokens > 0:
            self._rate += _NEWEST_WEIGHT * (tokens / plan.weight - self._rate)

    def _plan(self, request: GenerateRequest, max_tokens: int, rate: float, context: int) -> PromptPlan:
        limit = context - answer_room(max_tokens, context)
        continued = _bytes(request.continuation)

        def weight(messages: Sequence[ChatMessage]) -> int:
            return (
                sum(_bytes(message.text) + MESSAGE_BYTES for message in messages) + continued + MESSAGE_BYTES
            )

        def count_tokens(messages: Sequence[ChatMessage]) -> int:
            tokens = ceil(rate * weight(messages))
            last_exchange = sum(message.role == "user" for message in messages) == 1
            # Whether the last exchange alone is too long is not for an estimate to decide.
            return min(tokens, limit) if last_exchange else tokens

        fitted = fit_prompt(
            request.messages, context=context, max_tokens=max_tokens, count_tokens=count_tokens
        )
        sent = weight(fitted.messages)
        return PromptPlan(
            messages=fitted.messages,
            dropped=fitted.dropped,
            tokens=ceil(rate * sent),
            weight=sent,
            max_tokens=max(1, min(max_tokens - ceil(rate * continued), context)),
        )


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))
