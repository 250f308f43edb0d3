"""Prompts are made to fit by leaving out the oldest exchanges."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ash.domain.errors import PromptTooLong
from ash.domain.values import ChatMessage
from ash.slices.worker.fitting import MAX_TOKEN_BYTES, answer_room, fit_prompt


def count(messages: Sequence[ChatMessage]) -> int:
    return sum(len(message.text) + 2 for message in messages) + 3


def history(sizes: Sequence[int], *, system: int = 5) -> list[ChatMessage]:
    """A persona, pairs of user and assistant messages of these sizes, and one user message."""
    messages = [ChatMessage("system", "s" * system)]
    for number, size in enumerate(sizes):
        messages.append(ChatMessage("assistant" if number % 2 else "user", "m" * size))
    if messages[-1].role != "user":
        messages.append(ChatMessage("user", "last"))
    return messages


@settings(deadline=None)  # a slow machine is no fault
@given(st.lists(st.integers(0, 60), max_size=60), st.integers(128, 400), st.integers(1, 500))
def test_what_is_left_fits_and_is_the_newest(sizes: list[int], context: int, max_tokens: int) -> None:
    messages = history(sizes)
    fitted = fit_prompt(messages, context=context, max_tokens=max_tokens, count_tokens=count)
    limit = context - answer_room(max_tokens, context)
    assert count(fitted.messages) <= limit
    assert fitted.messages[0].role == "system"
    assert fitted.messages[-1] == messages[-1]
    assert fitted.dropped == len(messages) - len(fitted.messages)
    assert list(fitted.messages[1:]) == messages[1 + fitted.dropped :]
    if fitted.dropped:
        assert count(messages) > limit
        assert fitted.messages[1].role == "user"
        # Half of the context is left for the turns to come, unless the last message alone takes more.
        assert count(fitted.messages) <= context // 2 or len(fitted.messages) == 2
    else:
        assert list(fitted.messages) == messages


def test_nothing_is_dropped_without_need() -> None:
    messages = history([40, 40])
    fitted = fit_prompt(messages, context=150, max_tokens=10, count_tokens=count)
    assert fitted.dropped == 0


def test_a_message_that_cannot_fit_says_the_limit() -> None:
    messages = [ChatMessage("system", "s" * 50), ChatMessage("user", "u" * 60)]
    with pytest.raises(PromptTooLong, match=r"takes 117 tokens .* takes 75") as caught:
        fit_prompt(messages, context=100, max_tokens=100, count_tokens=count)
    assert caught.value.limit == 75


def test_hopeless_text_is_not_tokenised() -> None:
    def never(messages: Sequence[ChatMessage]) -> int:
        raise AssertionError("it was tokenised")

    with pytest.raises(PromptTooLong, match="far more than"):
        fit_prompt(
            [ChatMessage("user", "u" * (100 * MAX_TOKEN_BYTES + 1))],
            context=100,
            max_tokens=10,
            count_tokens=never,
        )


def test_a_long_history_is_tokenised_a_few_times_only() -> None:
    calls: list[int] = []

    def counting(messages: Sequence[ChatMessage]) -> int:
        calls.append(len(messages))
        return count(messages)

    fitted = fit_prompt(history([50] * 3000), context=2048, max_tokens=256, count_tokens=counting)
    assert 0 < len(fitted.messages) < 30
    assert len(calls) < 20
    # The first look at it already leaves out what can be told from the bytes.
    assert max(calls) < 2048 * MAX_TOKEN_BYTES / 50 + 3


def test_system_messages_in_the_middle_stay() -> None:
    messages = [
        ChatMessage("user", "a" * 80),
        ChatMessage("assistant", "b" * 80),
        ChatMessage("system", "note"),
        ChatMessage("user", "c"),
    ]
    fitted = fit_prompt(messages, context=100, max_tokens=10, count_tokens=count)
    assert [message.text for message in fitted.messages] == ["note", "c"]
    assert fitted.dropped == 2


def test_a_greeting_before_the_first_question_can_be_dropped() -> None:
    messages = [ChatMessage("system", "s"), ChatMessage("assistant", "g" * 80), ChatMessage("user", "c")]
    fitted = fit_prompt(messages, context=80, max_tokens=10, count_tokens=count)
    assert [message.role for message in fitted.messages] == ["system", "user"]
