"""From messages to the tokens of a prompt: one BOS, the continuation behind it, and room for the answer."""

import pytest

from ash.domain.errors import PromptTooLong, TemplateError
from ash.domain.values import ChatMessage, GenerateRequest
from ash.slices.worker.prompts import PromptBuilder
from ash.slices.worker.template import ChatTemplate

TRANSCRIPT = (
    "{% for m in messages %}{{ '\nUser: ' + m.content if m.role == 'user' else '\nBot: ' + m.content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\nBot:' }}{% endif %}"
)


class ByteVocabulary:
    """Every byte is a token."""

    def tokenise(self, text: bytes) -> list[int]:
        return list(text)

    def piece(self, token: int) -> bytes:
        return bytes([token])

    def pieces(self) -> list[bytes]:
        raise NotImplementedError("only output formats need the whole vocabulary")

    def shown_piece(self, token: int) -> bytes:
        return bytes([token])

    def is_end(self, token: int) -> bool:
        return False

    def is_control(self, token: int) -> bool:
        return False


def builder(source: str = TRANSCRIPT, *, context: int = 200, bos: str = "") -> PromptBuilder:
    return PromptBuilder(
        ChatTemplate(source, bos_token="<s>"), ByteVocabulary(), context=context, bos_text=bos
    )


def ask(*texts: str, continuation: str = "") -> GenerateRequest:
    """A request of user and assistant messages in turn."""
    messages = tuple(
        ChatMessage("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)
    )
    return GenerateRequest("run", "session", messages, continuation=continuation)


def test_a_prompt() -> None:
    prompt = builder().build(ask("Hi", "Hello", "Bye"), max_tokens=20)
    assert prompt.text.text == b"\nUser: Hi\nBot: Hello\nUser: Bye\nBot:"
    assert (prompt.dropped_messages, prompt.max_output, prompt.answer_lead) == (0, 20, " ")


@pytest.mark.parametrize(
    "source", ["{{ messages[-1].content }}", "{{ bos_token }}{{ messages[-1].content }}"]
)
def test_there_is_one_beginning_of_sequence(source: str) -> None:
    assert builder(source, bos="<s>").build(ask("Hi"), max_tokens=1).text.text == b"<s>Hi"


def test_the_answer_gets_what_room_is_left() -> None:
    prompt = builder(context=50).build(ask("a question of some length"), max_tokens=400)
    assert prompt.max_output == 50 - len(prompt.text.tokens)


def test_a_continuation_follows_the_lead_and_counts_as_answer() -> None:
    prompt = builder().build(ask("Hi", continuation="Hel"), max_tokens=10)
    assert prompt.text.text == b"\nUser: Hi\nBot: Hel"
    assert prompt.continuation_tokens == tuple(b"Hel")
    assert (prompt.max_output, prompt.answer_lead) == (7, "")
    assert builder().build(ask("Hi", continuation="Hello"), max_tokens=3).max_output == 1


def test_a_continuation_counts_when_the_prompt_is_fitted() -> None:
    history = ["x" * 30, "y" * 30, "z" * 30]
    assert builder().build(ask(*history), max_tokens=10).dropped_messages == 0
    fitted = builder().build(ask(*history, continuation="c" * 80), max_tokens=100)
    assert fitted.dropped_messages == 2
    assert fitted.text.text.endswith(b"z" * 30 + b"\nBot: " + b"c" * 80)


def test_a_lone_surrogate_does_not_break_the_prompt() -> None:
    assert b"a?b" in builder().build(ask("a\ud800b"), max_tokens=10).text.text


def test_errors_pass_through() -> None:
    with pytest.raises(PromptTooLong):
        builder().build(ask("x" * 300), max_tokens=10)
    with pytest.raises(TemplateError, match="no thanks"):
        builder("{{ raise_exception('no thanks') }}").build(ask("Hi"), max_tokens=10)


def test_neighbours_of_one_role_are_joined_and_can_be_left_out_one_by_one() -> None:
    unanswered = tuple(ChatMessage("user", text) for text in ("x" * 400, "Hi", "Bye"))
    request = GenerateRequest("run", "session", unanswered)
    prompt = builder(context=100).build(request, max_tokens=20)
    assert prompt.text.text == b"\nUser: Hi\n\nBye\nBot:"
    assert prompt.dropped_messages == 1
