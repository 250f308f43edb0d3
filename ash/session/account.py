"""What a run cost: tokens, reuse and times, for RUN_FINISHED and for whoever watches speed. Pure."""

from __future__ import annotations

from typing import Any

from ash.domain.events import TokenUsage
from ash.domain.values import Admitted, Finished


class Account:
    """Adds up the generations of one run. Times are seconds of one monotonic clock."""

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        self._first_s: float | None = None
        self._admitted: Admitted | None = None
        self._usage: list[TokenUsage] = []
        self._prefill_s = 0.0
        self._decode_s = 0.0
        self._output_tokens = 0
        self.reason = ""

    def admitted(self, item: Admitted) -> None:
        """A prompt was taken; after a crash the retry's prompt replaces it."""
        self._admitted = item

    def spoke(self, now_s: float) -> None:
        """Text arrived; only the first time counts."""
        if self._first_s is None:
            self._first_s = now_s

    def finished(self, item: Finished, slice_name: str) -> None:
        """A generation ended on `slice_name`."""
        admitted, self._admitted = self._admitted, None
        prompt = admitted.prompt_tokens if admitted else 0
        reused = admitted.reused_tokens if admitted else 0
        if item.prompt_tokens is not None:
            prompt, reused = item.prompt_tokens, item.reused_tokens or 0
        self._usage.append(
            TokenUsage(
                provider="ash",
                model=slice_name,
                input_tokens=prompt,
                output_tokens=item.output_tokens,
                cached_input_tokens=reused,
                total_tokens=prompt + item.output_tokens,
            )
        )
        self._prefill_s += item.prefill_s
        self._decode_s += item.decode_s
        self._output_tokens += item.output_tokens
        self.reason = item.reason

    @property
    def usage(self) -> list[TokenUsage] | None:
        """One entry per generation; None when the run ended before any."""
        return self._usage or None

    def metadata(self, now_s: float) -> dict[str, Any]:
        """Milliseconds and rates of the run: ttftMs, totalMs, prefillMs, tokensPerSecond, stopReason."""
        known: dict[str, Any] = {
            "totalMs": round((now_s - self._started_s) * 1000, 1),
            "prefillMs": round(self._prefill_s * 1000, 1),
        }
        if self._first_s is not None:
            known["ttftMs"] = round((self._first_s - self._started_s) * 1000, 1)
        # The first token comes out of the prefill, so the decode time covers one token less.
        if self._decode_s > 0 and self._output_tokens > 1:
            known["tokensPerSecond"] = round((self._output_tokens - 1) / self._decode_s, 1)
        if self.reason:
            known["stopReason"] = self.reason
        return known
