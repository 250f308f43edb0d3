"""From the chunks of a stream to the items of a generation. Pure; the clock is passed in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from ash.domain.values import Admitted, Delta, EngineItem, Finished
from ash.slices.remote.failure import MalformedStream
from ash.slices.remote.protocol import Chunk, Timings, Usage
from ash.slices.worker.fitting import MAX_TOKEN_BYTES
from ash.slices.worker.text import OutputText, StopStrings

_FINISH_REASONS: Final[dict[str, Literal["stop", "length"]]] = {"length": "length"}
"""Whatever else ends an answer (stop, content_filter, tool_calls) ends it where the model chose to."""


class AnswerReader:
    """Reads one answer.

    Args:
        estimated_tokens: of the prompt, for endpoints that count at the end only.
        dropped: messages that were left out of the prompt.
        max_tokens: the most tokens of the answer.
        stops: strings that end it. The endpoint is told them too, but need not take all, and it does not see
            one that begins in the continuation.
        continuation: the beginning of the answer, which was shown already.
        echoes: whether the endpoint may repeat it.
        began_s: when the request was sent.

    Attributes:
        started: whether anything was given out.
        finish: why the answer ended; None before.
        stopped: whether a stop string ended it, so that nothing more is of interest.
    """

    def __init__(
        self,
        *,
        estimated_tokens: int,
        dropped: int,
        max_tokens: int,
        stops: Iterable[str],
        continuation: str,
        echoes: bool,
        began_s: float,
    ) -> None:
        self._estimated_tokens = estimated_tokens
        self._dropped = dropped
        self._most_bytes = max_tokens * MAX_TOKEN_BYTES + len(continuation.encode("utf-8", "replace"))
        self._output = OutputText(StopStrings(stops, shown=continuation), lead=continuation if echoes else "")
        self._bytes = 0
        self._pieces = 0
        self._usage: Usage | None = None
        self._timings: Timings | None = None
        self._began_s = began_s
        self._first_s: float | None = None
        self._last_s = began_s
        self.started = False
        self.finish: Literal["stop", "length"] | None = None
        self.stopped = False

    def read(self, chunk: Chunk, now_s: float) -> list[EngineItem]:
        """Add a chunk that came at `now_s` and return what can be shown.

        Raises:
            MalformedStream: the answer is longer than its limit allows.
        """
        items: list[EngineItem] = []
        self._usage = chunk.usage or self._usage
        self._timings = chunk.timings or self._timings
        if not self.started:
            self.started = True
            items.append(self._admitted(chunk))
        text = chunk.text
        if text and self.finish is None:
            self._first_s = now_s if self._first_s is None else self._first_s
            self._last_s = now_s
            self._pieces += 1
            piece = text.encode("utf-8", "replace")
            self._bytes += len(piece)
            if self._bytes > self._most_bytes:
                raise MalformedStream(
                    f"more than {self._most_bytes} bytes, though `max_tokens` ended long ago"
                )
            shown = self._output.feed(piece)
            if shown.text:
                items.append(Delta(shown.text))
            if shown.stopped:
                self.finish = "stop"
                self.stopped = True
        reason = chunk.finish_reason
        if reason is not None and self.finish is None:
            self.finish = _FINISH_REASONS.get(reason, "stop")
            if held := self._output.finish():
                items.append(Delta(held))
        return items

    def finished(self) -> Finished:
        """The last item of an answer that has its `finish`."""
        assert self.finish is not None
        usage, timings = self._usage, self._timings
        counted = usage.completion_tokens if usage is not None else None
        first_s = self._last_s if self._first_s is None else self._first_s
        return Finished(
            self.finish,
            # One chunk for each token, or fewer where a token is no whole character.
            output_tokens=self._pieces if counted is None else counted,
            prefill_s=timings.prompt_ms / 1000 if timings is not None else first_s - self._began_s,
            decode_s=timings.predicted_ms / 1000 if timings is not None else self._last_s - first_s,
            prompt_tokens=self.prompt_tokens,
            reused_tokens=usage.cached_tokens if usage is not None and self.prompt_tokens else None,
        )

    @property
    def prompt_tokens(self) -> int | None:
        """What the endpoint counted in the prompt; None if it did not say."""
        return self._usage.prompt_tokens or None if self._usage is not None else None

    def _admitted(self, chunk: Chunk) -> Admitted:
        if chunk.prompt_progress is not None:
            return Admitted(chunk.prompt_progress.total, chunk.prompt_progress.cache, self._dropped)
        if chunk.usage is not None and chunk.usage.prompt_tokens:
            return Admitted(chunk.usage.prompt_tokens, chunk.usage.cached_tokens, self._dropped)
        return Admitted(self._estimated_tokens, 0, self._dropped)
