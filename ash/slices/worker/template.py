"""Chat templates: jinja2 as transformers runs it, in a sandbox with limits, since a model file is foreign."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final, NoReturn

from jinja2 import TemplateError as JinjaError

from ash.domain.errors import TemplateError
from ash.domain.values import ChatMessage
from ash.slices.worker.sandbox import LimitedEnvironment, LimitExceeded

MAX_CHARACTERS: Final = 16_000_000
_MAX_SOURCE_CHARACTERS: Final = 1_000_000
_MAX_PATTERN_CHARACTERS: Final = 200


def _raise_exception(message: str) -> NoReturn:
    raise JinjaError(message)


def _strftime_now(pattern: str) -> str:
    # Templates expect the local date of the machine, as transformers gives it.
    if len(pattern) > _MAX_PATTERN_CHARACTERS:
        raise LimitExceeded(f"a date pattern of {len(pattern)} characters")
    return datetime.now().astimezone().strftime(pattern)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: jinja2, with `messages`, `add_generation_prompt`, `bos_token` and `eos_token`.
        bos_token: text of the beginning-of-sequence token, empty if the model has none.
        eos_token: the same for the end of the sequence.

    Attributes:
        answer_lead: whitespace that belongs between the rendered prompt and the answer.

    Raises:
        TemplateError: `source` is not a template.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        if len(source) > _MAX_SOURCE_CHARACTERS:
            raise TemplateError(
                f"the chat template does not compile: it has {len(source)} characters, "
                f"{_MAX_SOURCE_CHARACTERS} are allowed"
            )
        self._environment = LimitedEnvironment()
        self._environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:
            # Not only jinja2 refuses: Python's compiler has limits of its own, such as of nested blocks.
            raise TemplateError(f"the chat template does not compile: {error}") from error
        self.answer_lead = self._find_answer_lead()

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> str:
        """The prompt text for `messages`, with `add_generation_prompt` up to where the answer begins.

        Raises:
            TemplateError: the template refused the messages, failed on them, or took too many steps or too
                much text.
        """
        variables = {
            "messages": [{"role": message.role, "content": message.text} for message in messages],
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
        }
        parts: list[str] = []
        characters = 0
        try:
            with self._environment.limits():
                for part in self._template.generate(variables):
                    characters += len(part)
                    if characters > MAX_CHARACTERS:
                        raise LimitExceeded(f"more than {MAX_CHARACTERS} characters of prompt")
                    parts.append(part)
        except Exception as error:
            # A template can raise anything that its expressions can.
            raise TemplateError(f"the chat template failed on these messages: {error}") from error
        return "".join(parts)

    def _find_answer_lead(self) -> str:
        """The whitespace that the template writes between the prompt and an answer; mostly none.

        After a prompt that ends with `Assistant:` the model writes it first: it is no part of the answer.
        """
        question, answer = ChatMessage("user", "question"), ChatMessage("assistant", "answer")
        try:
            prompt = self.render([question])
            whole = self.render([question, answer], add_generation_prompt=False)
        except TemplateError:
            # A template may refuse so short a conversation; then nothing is known of it.
            return ""
        lead, _, _ = whole.removeprefix(prompt).partition(answer.text)
        return lead if whole.startswith(prompt) and lead.isspace() else ""
