"""Chat templates: rendered as transformers does, inside limits, with errors that say what failed."""

import contextlib
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash.domain.errors import ConfigError, TemplateError
from ash.domain.values import ChatMessage
from ash.slices.templates import template_source
from ash.slices.worker import sandbox
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
        "{{ (''|attr('__class__')).mro }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{a}'.format_map({'a': 1}) }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as text %}",
        "{% extends '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].nothing.further }}",
        "{{ 1 // 0 }}",
        "{{ messages | no_such_filter }}",
    ],
)
def test_what_the_sandbox_forbids_is_a_template_error(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(10**9) %}{% endfor %}",
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}",
        "{{ range(90000)|map('string')|list|length + range(90000)|map('string')|list|length }}" * 3,
        "{{ 9 ** 9 ** 9 }}",
        "{% set n = namespace(x=10) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ 1.5|round(1000000000, 'ceil') }}",
    ],
)
def test_what_never_ends_is_ended(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize("size", [4000, 200_000])
@pytest.mark.parametrize("bracket", ["[]", "()", "{% for a in b %}{% endfor %}"])
def test_endless_nesting_does_not_compile(bracket: str, size: int) -> None:
    half = len(bracket) // 2 if len(bracket) == 2 else bracket.index("%}") + 2
    source = bracket[:half] * size + bracket[half:] * size
    with pytest.raises(TemplateError, match="does not compile"):
        ChatTemplate(source if "%" in source else "{{ " + source + " }}")


REPEATED = (
    "{% set n = namespace(x='abcdefgh') %}{% for i in range(60) %}{% set n.x = BODY %}{% endfor %}{{ n.x }}"
)
BIG = "('x' * 900000)"
LINES = "('\n' * 900000)"


@pytest.mark.parametrize(
    "source",
    [
        REPEATED.replace("BODY", "n.x + n.x"),
        REPEATED.replace("BODY", "n.x ~ n.x"),
        REPEATED.replace("BODY", "[n.x, n.x]"),
        REPEATED.replace("BODY", "(n.x, n.x)"),
        REPEATED.replace("BODY", "{'a': n.x, 'b': n.x}"),
        REPEATED.replace("BODY", "dict(a=n.x, b=n.x)"),
        REPEATED.replace("BODY", "n.x.replace('a', n.x)"),
        REPEATED.replace("BODY", "'%s%s' % (n.x, n.x)"),
        REPEATED.replace("BODY", "'{}{}'.format(n.x, n.x)"),
        REPEATED.replace("BODY", "n.x.join([n.x, n.x])"),
        REPEATED.replace("BODY", "[n.x, n.x]|join"),
        REPEATED.replace("{% set n.x = BODY %}", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
        "{% macro twice(a) %}{{ a }}{{ a }}{% endmacro %}" + REPEATED.replace("BODY", "twice(n.x)"),
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set b = BIG %}{% set n = namespace(k=()) %}"
        "{% for i in range(60000) %}{% set n.k = (n.k, b[1:]) %}{% endfor %}".replace("BIG", BIG),
        "{{ 'x' * 100000000 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ '\t'.expandtabs(1000000000) }}",
        "{{ (1).to_bytes(1000000000, 'big') }}",
        f"{{{{ {BIG}.replace('', {BIG}) }}}}",
        f"{{{{ {BIG} | replace('x', {BIG}) }}}}",
        f"{{{{ {BIG}.join(['a'] * 1000) }}}}",
        f"{{{{ [{BIG}] * 1000 | join }}}}".replace("[", "([").replace(" |", ") |"),
        f"{{{{ {LINES} | indent(100000) }}}}",
        f"{{{{ {LINES} | indent({BIG}) }}}}",
        f"{{{{ {LINES}.splitlines() | length }}}}" * 4,
        f"{{{{ {LINES} | upper }}}}" * 200,
        f"{{{{ {LINES} | list | length }}}}" * 4,
        "{{ lipsum(100000000) }}",
        "{{ [1] | batch(1000000000, 'x') | list }}",
        "{{ strftime_now('%A' * 400000) }}",
    ],
)
def test_what_would_take_gigabytes_is_refused_before_it_is_made(source: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            ChatTemplate(source).render(HELLO)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A text that doubles is charged for all its shorter forms; the list of what is waiting is beside it.
    assert peak < 2 * sandbox.MAX_BYTES


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 'a' ~ 1 ~ none }}", "a1None"),
        ("{{ 'a-b'.split('-') | join('+') }}", "a+b"),
        ("{{ ' a  b '.split() }}", "['a', 'b']"),
        ("{{ '%s is %d' % ('x', 3) }}{{ '%s' | format(1) }}{{ '{}-{}'.format(1, 'b') }}", "x is 31" + "1-b"),
        ("{{ 7 % 4 }}{{ 2 * 3 }}{{ 'ab' * 2 }}{{ [1] * 2 }}", "36abab[1, 1]"),
        ("{{ messages[1:][0].content }}{{ 'abcdef'[1:4] }}{{ 'abc'[::-1] }}", "Hello <b>bcdcba"),
        ("{{ {'a': [1, 'ü<']} | tojson }}", '{"a": [1, "ü<"]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ 'a\nb\n' | indent(2) }}|{{ 'a' | indent(2, true) }}", "a\n  b\n|  a"),
        ("{{ {'b': 1, 'a': 2} | dictsort }}", "[('a', 2), ('b', 1)]"),
        ("{% for key, value in {'k': 'v'}.items() %}{{ key }}={{ value }}{% endfor %}", "k=v"),
        (
            "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | first }}",
            "Hello <b>",
        ),
        ("{{ messages | map(attribute='role') | join(', ') }}", "system, user"),
        ("{{ 'Hello'.replace('l', 'L', 1) }}{{ 'x' | replace('x', 'y') }}", "HeLloy"),
        (
            "{%set n = namespace(t='')%}{%for m in messages%}{%set n.t = n.t ~ m.role%}{%endfor%}{{n.t}}",
            "systemuser",
        ),
        (
            "{% for m in messages %}{{ m.role.replace('s', '') }}{{ m.role.join('ab') }}{% endfor %}",
            "ytemasystembuerauserb",
        ),
        (
            "{% for m in messages %}{{ m.role.split('s', maxsplit=1) }}{% endfor %}",
            "['', 'ystem']['u', 'er']",
        ),
        ("{% macro f(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}", "12"),
        ("{{ dict(a=1).get('a') }}{{ [3, 1] | sort }}{{ 'b' in 'abc' }}", "1[1, 3]True"),
        ("{% for a in [1, 2, 3] %}{% if a == 2 %}{% break %}{% endif %}{{ a }}{% endfor %}", "1"),
    ],
)
def test_what_templates_use_is_allowed(source: str, expected: str) -> None:
    assert ChatTemplate(source).render(HELLO) == expected


def test_a_budget_is_for_one_rendering() -> None:
    template = ChatTemplate(f"{{{{ {BIG} | upper | length }}}}" * 10)
    for _ in range(5):
        assert template.render(HELLO) == "900000" * 10


def test_a_source_of_megabytes_is_refused() -> None:
    with pytest.raises(TemplateError, match="it has 1000001 characters"):
        ChatTemplate("x" * 1_000_001)


@given(st.text(alphabet="{}%[]()'\"|~+*.,:-x1 \n" + "forinsetmacraendif_", max_size=120))
def test_any_source_renders_or_is_a_template_error(source: str) -> None:
    with contextlib.suppress(TemplateError):
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
