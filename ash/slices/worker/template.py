"""Chat templates: jinja2 as transformers runs it, in a sandbox with limits, since a model file is foreign."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any, Final, NoReturn

from jinja2 import TemplateError as JinjaError
from jinja2 import Undefined
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ash.domain.errors import TemplateError
from ash.domain.values import ChatMessage

MAX_STEPS: Final = 200_000
"""Lines of compiled template; the longest history that fits a context takes a few thousand."""
MAX_CHARACTERS: Final = 16_000_000
_MAX_PRODUCT: Final = 1_000_000


class _LimitExceeded(JinjaError):
    pass


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of jinja2, without the two operators that make much of little."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise _LimitExceeded("** is not available in chat templates")
        size = max(
            len(left) if hasattr(left, "__len__") else 1, len(right) if hasattr(right, "__len__") else 1
        )
        factor = max((abs(value) for value in (left, right) if isinstance(value, int)), default=1)
        if size * factor > _MAX_PRODUCT and size > 1:
            raise _LimitExceeded(f"a product of more than {_MAX_PRODUCT} elements")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    raise JinjaError(message)


def _strftime_now(pattern: str) -> str:
    # Templates expect the local date of the machine, as transformers gives it.
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
        environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols],
            undefined=Undefined,
            autoescape=False,  # the output is a prompt, not HTML
        )
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = environment.from_string(source)
        except (JinjaError, RecursionError) as error:
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
            with _limited_steps(MAX_STEPS):
                for part in self._template.generate(variables):
                    characters += len(part)
                    if characters > MAX_CHARACTERS:
                        raise _LimitExceeded(f"more than {MAX_CHARACTERS} characters of prompt")
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


@contextmanager
def _limited_steps(steps: int) -> Iterator[None]:
    """Stop the Python code inside after `steps` lines: a deterministic limit, in any thread."""
    left = steps

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left < 0:
                raise _LimitExceeded(f"more than {steps} steps")
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(outer)
