"""When a failed request is sent again. Pure; chance and time are passed in."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

from ash.slices.remote.failure import AttemptFailed, Retry

LONGEST_BACKOFF_S: Final = 30.0
LONGEST_RETRY_AFTER_S: Final = 60.0
"""An endpoint that asks for a longer wait has the request fail: another slice answers sooner."""


class RetryPolicy:
    """Exponential backoff with full jitter (M. Brooker, Exponential Backoff And Jitter, AWS 2015).

    Args:
        retries: how often a request is sent again.
        backoff_s: the longest wait before the first retry, seconds; doubles with each.
        uniform: a random number between two others.
    """

    def __init__(self, *, retries: int, backoff_s: float, uniform: Callable[[float, float], float]) -> None:
        self._retries = retries
        self._backoff_s = backoff_s
        self._uniform = uniform

    def delay(self, failure: AttemptFailed, attempts: int) -> float | None:
        """Seconds to wait before the request is sent again; None if it is not.

        Args:
            failure: how the last attempt ended.
            attempts: how many there were, 1 or more.
        """
        allowed = {Retry.NEVER: 0, Retry.ONCE: min(1, self._retries), Retry.ALLOWED: self._retries}
        if attempts > allowed[failure.retry]:
            return None
        # The exponent is bounded so that no number of retries overflows.
        ceiling = min(self._backoff_s * 2.0 ** min(attempts - 1, 60), LONGEST_BACKOFF_S)
        jitter = self._uniform(0.0, ceiling)
        if failure.retry_after_s is None:
            return jitter
        if failure.retry_after_s > LONGEST_RETRY_AFTER_S:
            return None
        # On top of the wait: all clients that were told the same would come back together.
        return failure.retry_after_s + jitter


def retry_after_s(header: str | None, *, now_s: float) -> float | None:
    """The seconds that a Retry-After header asks for (RFC 9110, 10.2.3); None if it cannot be read.

    Args:
        header: seconds, or an HTTP date.
        now_s: seconds since the Unix epoch.
    """
    text = (header or "").strip()
    if text.isascii() and text.isdigit():
        # No endpoint means more digits than these; a longer number is too long a wait all the same.
        return float(text[:12])
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        # Not for people to see: a wait that cannot be read is a wait that was not asked for.
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, date.timestamp() - now_s)
