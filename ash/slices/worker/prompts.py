"""From the messages of a request to the tokens of a prompt that fits."""

from __future__ import annotations

from collections.abc import Sequence

from ash.domain.values import ChatMessage, GenerateRequest
from ash.slices.worker.decoder import tokenised
from ash.slices.worker.fitting import fit_prompt
from ash.slices.worker.generation import Prompt
from ash.slices.worker.inference import Vocabulary
from ash.slices.worker.sequence import TokenisedText
from ash.slices.worker.template import ChatTemplate


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

    def build(self, request: GenerateRequest, *, max_tokens: int) -> Prompt:
        """The prompt of `request`, with the continuation behind it, and room for at most `max_tokens`.

        `max_output` counts the continuation as part of the answer, so that a retried run does not become
        longer than it may be.

        Raises:
            PromptTooLong: the last message alone does not fit.
            TemplateError: the chat template failed.
        """
        # Every shorter candidate has fewer messages, so their number identifies it.
        texts: dict[int, TokenisedText] = {}

        def count_tokens(messages: Sequence[ChatMessage]) -> int:
            if len(messages) not in texts:
                texts[len(messages)] = tokenised(self._vocabulary, self._text(messages, request.continuation))
            return len(texts[len(messages)].tokens)

        fitted = fit_prompt(
            request.messages,
            context=self._context,
            max_tokens=max_tokens,
            count_tokens=count_tokens,
        )
        text = texts[len(fitted.messages)]
        continuation = tuple(self._vocabulary.tokenise(request.continuation.encode()))
        wanted = max_tokens - len(continuation)
        return Prompt(
            text=text,
            dropped_messages=fitted.dropped,
            max_output=max(1, min(wanted, self._context - len(text.tokens))),
            continuation_tokens=continuation,
            answer_lead="" if request.continuation else self._template.answer_lead,
        )

    def _text(self, messages: Sequence[ChatMessage], continuation: str) -> bytes:
        text = self._template.render(messages)
        if not text.startswith(self._bos_text):
            # Templates of some models write the token themselves; two of them harm the answer.
            text = self._bos_text + text
        if continuation:
            text += self._template.answer_lead + continuation
        # A lone surrogate, which JSON can carry, has no UTF-8.
        return text.encode("utf-8", "replace")
