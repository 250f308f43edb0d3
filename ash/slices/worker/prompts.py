"""From the messages of a request to the tokens of a prompt that fits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from msgspec import structs

from ash.domain.errors import TemplateError
from ash.domain.values import ChatMessage, GenerateRequest
from ash.slices.conversation import alternating
from ash.slices.worker.fitting import MAX_TOKEN_BYTES, fit_prompt
from ash.slices.worker.generation import Prompt
from ash.slices.worker.inference import Vocabulary
from ash.slices.worker.sequence import TokenisedText, shared_length
from ash.slices.worker.template import ChatTemplate
from ash.slices.worker.tokenising import encoded, tokenised, without_controls

_KEPT_BEGINNINGS: Final = 64
_LEAST_SHARED: Final = 16
"""Tokens of a common beginning that are worth keeping apart."""


class PromptBuilder:
    """Renders, tokenises and fits prompts for one model.

    Args:
        template: the chat template.
        vocabulary: the model's tokens.
        context: the most tokens of a sequence.
        bos_text: what every prompt has to begin with; empty if nothing.
    """

    def __init__(
        self, template: ChatTemplate, vocabulary: Vocabulary, *, context: int, bos_text: str
    ) -> None:
        self._template = template
        self._vocabulary = vocabulary
        self._context = context
        self._bos_text = bos_text
        self._beginnings: OrderedDict[tuple[ChatMessage, ...], bytes] = OrderedDict()

    def build(self, request: GenerateRequest, *, max_tokens: int) -> Prompt:
        """The prompt of `request`, with the continuation behind it, and room for at most `max_tokens`.

        `max_output` counts the continuation as part of the answer, so that a retried run does not become
        longer than it may be.

        Raises:
            PromptTooLong: the last message alone does not fit.
            TemplateError: the chat template failed.
        """
        messages = [
            structs.replace(message, text=self._without_controls(message.text))
            for message in request.messages
        ]
        continued = self._without_controls(request.continuation)
        # Every shorter candidate has fewer messages, so their number identifies it.
        texts: dict[int, TokenisedText] = {}

        def count_tokens(messages: Sequence[ChatMessage]) -> int:
            if len(messages) not in texts:
                texts[len(messages)] = tokenised(self._vocabulary, self._text(messages, continued))
            return len(texts[len(messages)].tokens)

        fitted = fit_prompt(
            messages,
            context=self._context,
            max_tokens=max_tokens,
            count_tokens=count_tokens,
        )
        text = texts[len(fitted.messages)]
        continuation = tokenised(self._vocabulary, encoded(continued)).tokens
        wanted = max_tokens - len(continuation)
        return Prompt(
            text=text,
            dropped_messages=fitted.dropped,
            max_output=max(1, min(wanted, self._context - len(text.tokens))),
            continuation_tokens=continuation,
            answer_lead="" if request.continuation else self._template.answer_lead,
            shared_tokens=self._shared_tokens(fitted.messages, text),
        )

    def _without_controls(self, text: str) -> str:
        if len(text) > self._context * MAX_TOKEN_BYTES:
            # It cannot fit, so it will not be computed; `fit_prompt` says so.
            return text
        return without_controls(self._vocabulary, text, most_tokens=self._context)

    def _shared_tokens(self, messages: Sequence[ChatMessage], text: TokenisedText) -> int:
        """How many tokens of the prompt every conversation with the same system messages begins with."""
        system = tuple(structs.replace(message, id="") for message in messages if message.role == "system")
        if system not in self._beginnings:
            self._beginnings[system] = self._common_beginning(system)
            if len(self._beginnings) > _KEPT_BEGINNINGS:
                self._beginnings.popitem(last=False)
        self._beginnings.move_to_end(system)
        beginning = self._beginnings[system]
        if not text.text.startswith(beginning):
            # Templates may write the date: yesterday's beginning is none today.
            beginning = self._beginnings[system] = self._common_beginning(system)
        if not text.text.startswith(beginning):
            return 0
        count = text.ending_within(len(beginning))
        return count if count >= _LEAST_SHARED else 0

    def _common_beginning(self, system: Sequence[ChatMessage]) -> bytes:
        """What two conversations have in common that share nothing but their system messages."""
        try:
            first, second = (
                self._text([*system, ChatMessage("user", question)], "") for question in ("Zebra", "quay 7")
            )
        except TemplateError:
            # It takes the conversation at hand, but not so short a one: then nothing is shared.
            return b""
        return first[: shared_length(first, second)]

    def _text(self, messages: Sequence[ChatMessage], continuation: str) -> bytes:
        text = self._template.render(alternating(messages))
        if not text.startswith(self._bos_text):
            # Templates of some models write the token themselves; two of them harm the answer.
            text = self._bos_text + text
        if continuation:
            text += self._template.answer_lead + continuation
        return encoded(text)
