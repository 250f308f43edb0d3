"""A run in progress, as the turn sees it: what to answer, where to write, when to stop."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from ash.domain.events import CompactionValue, Draft, Event, InputValue, Origin, SliceValue
from ash.domain.ports import SliceGeneration
from ash.domain.values import ChatMessage, SliceNotice
from ash.session.session import Session
from ash.session.transcript import first_kept

Commit = Callable[[Sequence[Draft]], Coroutine[Any, Any, None]]


class Run:
    """The active run of a session. It belongs to the session: clients come and go without its notice."""

    def __init__(self, session: Session, commit: Commit) -> None:
        active = session.active
        assert active is not None, "a Run is made for an active run"
        self.session = session
        self.run_id = active.run_id
        self.origin: Origin = active.origin
        self.slice = ""
        self.cancelled = False
        self._active = active
        self._commit = commit
        self._generation: SliceGeneration | None = None
        self._input = self._newest()

    def _newest(self) -> InputValue:
        value = self._active.steered[-1] if self._active.steered else self._active.value
        assert value is not None, "RUN_STARTED and its ash.input are committed together"
        return value

    def take_steered(self) -> None:
        """Make the newest steered input the current one."""
        self._input = self._newest()

    @property
    def text(self) -> str:
        """Text of the current input."""
        return self._input.text

    @property
    def message_id(self) -> str:
        """Id of the current input."""
        return self._input.message_id

    @property
    def has_images(self) -> bool:
        """Whether the current input carries images."""
        return bool(self._input.images)

    async def append(self, *events: Event) -> None:
        """Commit events of this run."""
        await self._commit([Draft(event, run_id=self.run_id, origin=self.origin) for event in events])

    async def notice(self, item: SliceNotice) -> None:
        """Log what happened to a slice. It belongs to no run: other runs on that slice saw the same."""
        if item.to is not None:
            self.slice = item.to
        value = SliceValue(slice=item.slice, what=item.what, reason=item.reason, to=item.to)
        await self._commit([Draft(value.event())])

    async def compact(self, prompt: Sequence[ChatMessage], dropped: int) -> None:
        """Log that the engine left out the `dropped` oldest messages, so that later prompts do too."""
        if not dropped:
            return
        value = CompactionValue(
            dropped=dropped,
            first_kept=first_kept(prompt, dropped),
            reason="the prompt was longer than the slice's context",
        )
        await self.append(value.event())

    def hold(self, generation: SliceGeneration, slice_name: str) -> SliceGeneration:
        """Remember the generation on `slice_name` so that a cancel reaches it; returns it."""
        self.slice = slice_name
        self._generation = generation
        if self.cancelled:
            generation.cancel()
        return generation

    def cancel(self) -> None:
        """Stop within one decoding step; idempotent."""
        self.cancelled = True
        if self._generation is not None:
            self._generation.cancel()
