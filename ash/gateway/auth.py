"""Who is at the other end: bearer tokens, and a limit on wrong ones per address."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from ash.domain.errors import RateLimited, Unauthenticated
from ash.domain.values import Principal
from ash.gateway.tokens import TokenRegistry

MAX_ADDRESSES = 4096
"""Addresses whose failures are remembered; the least recent one is forgotten first."""


def bearer_token(headers: Sequence[str]) -> str | None:
    """The token in the values of the Authorization headers; None when there is none.

    Two headers, or another scheme, count as no token: guessing which one is meant is not safe.
    """
    if len(headers) != 1:
        return None
    scheme, _, token = headers[0].strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


class FailureLimiter:
    """A sliding window of failures per address. `now` is seconds on any clock that does not go back."""

    def __init__(self, limit: int, window_s: float) -> None:
        self._limit = limit
        self._window_s = window_s
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    def failed(self, address: str, now: float) -> bool:
        """Count a failure; returns whether the address is over its limit."""
        times = self._failures.setdefault(address, deque())
        self._failures.move_to_end(address)
        while times and times[0] <= now - self._window_s:
            times.popleft()
        over = len(times) >= self._limit
        if not over:
            times.append(now)
        if len(self._failures) > MAX_ADDRESSES:
            self._failures.popitem(last=False)
        return over


class Authenticator:
    """Tokens to principals.

    A valid token always works: only failures are limited. An address may be shared (a reverse proxy, one
    machine), and blocking it would let anyone lock its other clients out.
    """

    def __init__(self, tokens: TokenRegistry, limiter: FailureLimiter, clock: Callable[[], float]) -> None:
        self._tokens = tokens
        self._limiter = limiter
        self._clock = clock

    def authenticate(self, token: str | None, address: str) -> Principal:
        """The principal behind `token`.

        Raises:
            Unauthenticated: the token is missing, unknown or revoked.
            RateLimited: the same, and too many of them came from `address`.
        """
        # A token issued or revoked a moment ago counts at once; looking costs one stat.
        self._tokens.refresh()
        principal = self._tokens.authenticate(token) if token else None
        if principal is not None:
            return principal
        if self._limiter.failed(address, self._clock()):
            raise RateLimited(
                "too many failed authentications from this address; wait a minute and try again"
            )
        if not token:
            raise Unauthenticated("no token: send `Authorization: Bearer TOKEN`, or `token` in initialize")
        raise Unauthenticated("the token is unknown or revoked; the owner can issue another one")

    def is_active(self, principal: Principal) -> bool:
        """Whether the principal's token is still good."""
        return self._tokens.is_active(principal.token_id)
