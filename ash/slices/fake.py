"""FakeEngine: an engine without a model, for tests of Ash and of plugins (port Engine).

It passes the same conformance suite as LocalEngine. Its tokens are words, so every number can be foreseen.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence

from ash.domain.errors import EngineCrashed, SliceError, SliceUnavailable
from ash.domain.values import Admitted, ChatMessage, Delta, EngineItem, Finished, GenerateRequest, Sampling
from ash.slices.cancellation import unless
from ash.slices.worker.fitting import fit_prompt
from ash.slices.worker.text import StopStrings

_WORD = re.compile(r"\s*\S+|\s+$")

Script = Callable[[GenerateRequest], str]


def echo(request: GenerateRequest) -> str:
    """The script that answers with the last message."""
    return request.messages[-1].text


def words_of(text: str) -> list[str]:
    """The tokens of `text`: words, each with the space before it."""
    return _WORD.findall(text)


class FakeGeneration:
    """A generation of a FakeEngine (port Generation)."""

    def __init__(self, engine: FakeEngine, request: GenerateRequest) -> None:
        self._engine = engine
        self._request = request
        self._cancelled = asyncio.Event()

    def cancel(self) -> None:
        """See the port."""
        self._cancelled.set()

    async def __aiter__(self) -> AsyncIterator[EngineItem]:
        if self._cancelled.is_set():
            yield Finished("cancelled", 0)
            return
        turn = self._engine.turns[self._request.session_id]
        if await unless(self._cancelled, turn.acquire()) is None:
            yield Finished("cancelled", 0)
            return
        try:
            async for item in self._engine.run(self._request, self._cancelled):
                yield item
        finally:
            turn.release()


class FakeEngine:
    """Answers with a script, word by word.

    Args:
        name: the slice's name.
        script: request -> the whole answer. A continuation that the answer begins with is not repeated.
        context: words per session.
        stop: strings that end every answer.

    Faults on purpose: `crash_after`, `refusal`, `pause` and `resume`.

    Attributes:
        requests: every request that was admitted, in order.
        crash_after: crash once that many deltas have been yielded by one generation; then None again.
        refusal: raised by `open` and `generate` while it is set.
    """

    def __init__(
        self,
        name: str = "fake",
        script: Script = echo,
        *,
        context: int = 2048,
        stop: Sequence[str] = (),
    ) -> None:
        self._name = name
        self._script = script
        self._context = context
        self._stop = tuple(stop)
        self._loaded = False
        self._closed = False
        self._prompts: dict[str, list[str]] = {}
        self._crashes = 0
        self._crash_reason = ""
        self._may_go_on = asyncio.Event()
        self._may_go_on.set()
        self.turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.requests: list[GenerateRequest] = []
        self.crash_after: int | None = None
        self.refusal: SliceError | None = None

    @property
    def name(self) -> str:
        """The slice's name."""
        return self._name

    @property
    def loaded(self) -> bool:
        """See the port."""
        return self._loaded

    async def open(self) -> None:
        """See the port."""
        if self.refusal is not None:
            raise self.refusal
        self._closed = False
        self._loaded = True

    async def close(self) -> None:
        """See the port."""
        self._closed = True
        self.crash("the engine was closed")

    async def forget(self, session_id: str) -> None:
        """See the port; a session that comes back begins with an empty cache."""
        self._prompts.pop(session_id, None)

    def generate(self, request: GenerateRequest) -> FakeGeneration:
        """See the port."""
        return FakeGeneration(self, request)

    def pause(self) -> None:
        """Hold every generation before its next word."""
        self._may_go_on.clear()

    def resume(self) -> None:
        """Let them go on."""
        self._may_go_on.set()

    def crash(self, reason: str = "SIGKILL") -> None:
        """Every running generation raises EngineCrashed; the next `open` finds a fresh engine."""
        self._crashes += 1
        self._crash_reason = reason
        self._loaded = False
        self._prompts.clear()
        # Wake those that are paused, so that they notice.
        waiting, self._may_go_on = self._may_go_on, asyncio.Event()
        if waiting.is_set():
            self._may_go_on.set()
        waiting.set()

    async def run(self, request: GenerateRequest, cancelled: asyncio.Event) -> AsyncIterator[EngineItem]:
        """The items of one generation whose turn it is."""
        if self.refusal is not None:
            raise self.refusal
        if self._closed:
            raise SliceUnavailable(f"slice {self._name} is closed; open it first")
        self._loaded = True
        crashes = self._crashes
        sampling = request.sampling or Sampling()
        prompt = fit_prompt(
            request.messages,
            context=self._context,
            max_tokens=sampling.max_tokens,
            count_tokens=lambda messages: len(words_of(_transcript(messages) + request.continuation)),
        )
        text = _transcript(prompt.messages) + request.continuation
        words = words_of(text)
        self.requests.append(request)
        yield Admitted(len(words), self._reused(request.session_id, words), prompt.dropped)
        answer = self._script(request).removeprefix(request.continuation)
        stops = StopStrings(self._stop + sampling.stop, shown=request.continuation)
        room = max(
            1, min(sampling.max_tokens - len(words_of(request.continuation)), self._context - len(words))
        )
        shown, deltas = "", 0
        output = words_of(answer)
        for number, word in enumerate(output[:room], 1):
            await self._step(crashes, cancelled)
            if self.crash_after is not None and deltas >= self.crash_after:
                self.crash_after = None
                self.crash()
                await self._step(crashes, cancelled)
            if cancelled.is_set():
                yield Finished("cancelled", number - 1)
                return
            piece = stops.feed(word)
            if not piece.stopped and number == len(output[:room]):
                piece = type(piece)(piece.text + stops.finish(), stopped=False)
            shown += piece.text
            if piece.text:
                deltas += 1
                yield Delta(piece.text)
            if piece.stopped:
                self._prompts[request.session_id] = words_of(text + shown)
                yield Finished("stop", number)
                return
        self._prompts[request.session_id] = words_of(text + shown)
        yield Finished("length" if len(output) > room else "stop", min(len(output), room))

    async def _step(self, crashes: int, cancelled: asyncio.Event) -> None:
        """Let other generations have their word; wait while paused; notice a crash."""
        await asyncio.sleep(0)
        await unless(cancelled, self._may_go_on.wait())
        if self._crashes != crashes:
            raise EngineCrashed(f"the worker of slice {self._name} was ended by {self._crash_reason}")

    def _reused(self, session: str, words: Sequence[str]) -> int:
        held = self._prompts.get(session, [])
        same = 0
        while same < min(len(held), len(words)) and held[same] == words[same]:
            same += 1
        return same


def _transcript(messages: Sequence[ChatMessage]) -> str:
    return "".join(f"{message.role}: {message.text}\n" for message in messages) + "assistant: "
