"""What chat templates and endpoints expect of a conversation. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import structs

from ash.domain.values import ChatMessage


def alternating(messages: Iterable[ChatMessage]) -> list[ChatMessage]:
    """`messages` with neighbours of one role joined by a blank line, under the id of the first.

    Many templates refuse two messages of one role in a row, which a session has where an input was not
    answered. Joined only here, behind the fitting: each of them can be left out by itself.
    """
    joined: list[ChatMessage] = []
    for message in messages:
        if joined and joined[-1].role == message.role:
            joined[-1] = structs.replace(joined[-1], text=f"{joined[-1].text}\n\n{message.text}")
        else:
            joined.append(message)
    return joined
