"""What the model is shown of a session: inputs and answers in order, as a fold over the log. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from ash.domain.events import InputValue
from ash.domain.values import ChatMessage


class Entry(Struct):
    """One message that may enter a prompt."""

    message_id: str
    run_id: str
    role: Literal["user", "assistant"]
    text: str


class Transcript:
    """The messages since the last compaction; the log keeps the older ones."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._open: Entry | None = None
        self._deltas: list[str] = []

    def add_input(self, value: InputValue, run_id: str) -> None:
        """An input becomes part of the prompt when its run starts, not while it waits."""
        self.entries.append(Entry(value.message_id, run_id, "user", value.text))

    def open_answer(self, message_id: str, run_id: str) -> None:
        """An answer begins."""
        self._open = Entry(message_id, run_id, "assistant", "")
        self._deltas = []

    def extend_answer(self, delta: str) -> None:
        """More text of the open answer."""
        self._deltas.append(delta)

    def close_answer(self) -> None:
        """The open answer is complete or was cut off; an empty one leaves no trace in a prompt."""
        if self._open is not None and self._deltas:
            self._open.text = "".join(self._deltas)
            self.entries.append(self._open)
        self._open, self._deltas = None, []

    def forget_answers(self, run_id: str) -> None:
        """Leave out what a cut-off run said: a resume run answers the same input from the start."""
        self.entries = [
            entry for entry in self.entries if entry.run_id != run_id or entry.role != "assistant"
        ]

    def drop_before(self, message_id: str) -> None:
        """Compaction: keep `message_id` and what follows; an unknown id changes nothing."""
        for index, entry in enumerate(self.entries):
            if entry.message_id == message_id:
                del self.entries[:index]
                return

    def text_of(self, message_id: str) -> str:
        """The text of a message in the prompt; empty for one that said nothing."""
        for entry in reversed(self.entries):
            if entry.message_id == message_id:
                return entry.text
        return ""

    def prompt(self, persona: str | None) -> tuple[ChatMessage, ...]:
        """The prompt: the persona as system message, then what was said, in order.

        An input that was not answered stands before the next one: the engine may leave out each of them.
        """
        system = [ChatMessage("system", persona)] if persona else []
        said = (ChatMessage(entry.role, entry.text, entry.message_id) for entry in self.entries)
        return (*system, *said)


def first_kept(prompt: Sequence[ChatMessage], dropped: int) -> str:
    """Id of the oldest message that stays when an engine left out `dropped` non-system messages."""
    spoken = [message for message in prompt if message.role != "system"]
    return spoken[dropped].id
