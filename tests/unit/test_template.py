"""Chat templates: rendered as transformers does, inside limits, with errors that say what failed."""

import pytest

from ash.domain.errors import ConfigError, TemplateError
from ash.domain.values import ChatMessage
from ash.slices.templates import template_source
from ash.slices.worker import template as template_module
from ash.slices.worker.template import ChatTemplate

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = (ChatMessage("system", "Be brief."), ChatMessage("user", "Hello <b>"))


def test_chatml() -> None:
    assert ChatTemplate(CHATML).render(HELLO) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello <b><|im_end|>\n<|im_start|>assistant\n"
    )


def test_blocks_leave_no_whitespace() -> None:
    source = "  {% for message in messages %}\n{{ message.content }}|\n  {% endfor %}\n"
    assert ChatTemplate(source).render(HELLO) == "Be brief.|\nHello <b>|\n"


def test_the_special_tokens_are_variables() -> None:
    template = ChatTemplate("{{ bos_token }}x{{ eos_token }}", bos_token="<s>", eos_token="</s>")
    assert template.render(HELLO) == "<s>x</s>"


def test_a_template_may_refuse() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(HELLO)


def test_the_date_is_available() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(HELLO).isdecimal()


def test_a_template_that_does_not_compile() -> None:
    with pytest.raises(TemplateError, match="does not compile"):
        ChatTemplate("{% for %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].nothing.further }}",
        "{{ 1 // 0 }}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 100000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_the_sandbox_forbids_is_a_template_error(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source).render(HELLO)


def test_the_output_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_CHARACTERS", 100)
    with pytest.raises(TemplateError, match="more than 100 characters"):
        ChatTemplate("{% for a in range(50) %}abc{{ a }}{% endfor %}").render(HELLO)


def test_a_long_history_is_within_the_limits() -> None:
    history = [ChatMessage("user", "a question") for _ in range(5000)]
    assert ChatTemplate(CHATML).render(history).count("<|im_end|>") == 5000


def test_the_completion_template_extends_each_turn() -> None:
    """A base model's transcript: what was rendered before stays a prefix, so the KV cache serves again."""
    template = ChatTemplate(template_source("completion"))
    messages = [ChatMessage("system", "You are Ash.")]
    text = ""
    for question, answer in (("Who are you?", "I am Ash."), ("Why?", "Because."), ("Bye", "Bye\nbye!")):
        messages.append(ChatMessage("user", question))
        rendered = template.render(messages)
        assert rendered.startswith(text)
        assert rendered.endswith(f"\nUser: {question}\nAssistant:")
        text = rendered + template.answer_lead + answer
        messages.append(ChatMessage("assistant", answer))
    assert "You are Ash." in text


def test_the_whitespace_before_an_answer() -> None:
    assert ChatTemplate(template_source("completion")).answer_lead == " "
    assert ChatTemplate(CHATML).answer_lead == ""
    assert ChatTemplate("{{ raise_exception('never') }}").answer_lead == ""
    assert ChatTemplate("{{ messages | length }}").answer_lead == ""


def test_an_unknown_template_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="completion"):
        template_source("chatml")
    assert template_source("{{ bos_token }}") == "{{ bos_token }}"
