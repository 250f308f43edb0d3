"""The circuit breaker against a model of it, and when a request is sent again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from ash.domain.errors import SliceUnavailable
from ash.slices.remote.breaker import CircuitBreaker, Permit
from ash.slices.remote.failure import AttemptFailed, Retry
from ash.slices.remote.retry import LONGEST_BACKOFF_S, LONGEST_RETRY_AFTER_S, RetryPolicy, retry_after_s

THRESHOLD, RESET_S = 3, 10.0


class Breaking(RuleBasedStateMachine):
    """Requests come, end in any order, and time passes."""

    permits: Bundle[Permit] = Bundle("permits")

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.breaker = CircuitBreaker(failures=THRESHOLD, reset_s=RESET_S, monotonic=lambda: self.now)
        self.opened_s: float | None = None
        self.in_a_row = 0
        self.trial: Permit | None = None
        self.current: set[Permit] = set()

    def change(self, opened_s: float | None) -> None:
        self.opened_s, self.in_a_row, self.trial = opened_s, 0, None
        self.current = set()

    @rule(target=permits)
    def admit(self) -> Permit:
        permit = self.breaker.admit()
        if self.opened_s is None:
            assert permit is not None
        elif self.now < self.opened_s + RESET_S or self.trial is not None:
            assert permit is None
        else:
            assert permit is not None
            self.trial = permit
        if permit is None:
            # Rules have to give something: a permit that is over.
            permit = Permit(self.breaker, -1)
        else:
            self.current.add(permit)
        return permit

    @rule(permit=permits)
    def answer(self, permit: Permit) -> None:
        permit.answered()
        if permit in self.current and self.opened_s is not None:
            self.change(None)
            self.current.add(permit)

    @rule(permit=consumes(permits))
    def succeed(self, permit: Permit) -> None:
        permit.succeeded()
        if permit in self.current:
            if self.opened_s is not None:
                self.change(None)
            self.in_a_row = 0
            self.current.discard(permit)
        permit.failed()

    @rule(permit=consumes(permits))
    def fail(self, permit: Permit) -> None:
        permit.failed()
        if permit in self.current:
            self.current.discard(permit)
            self.in_a_row += 1
            if self.opened_s is not None or self.in_a_row >= THRESHOLD:
                self.change(self.now)
        permit.succeeded()

    @rule(permit=consumes(permits))
    def abandon(self, permit: Permit) -> None:
        permit.abandoned()
        if permit is self.trial:
            self.trial = None
        self.current.discard(permit)
        permit.failed()

    @rule(seconds=st.sampled_from([0.5, RESET_S / 2, RESET_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def is_in_the_state_of_the_model(self) -> None:
        if self.opened_s is None:
            assert (self.breaker.state, self.breaker.remaining_s) == ("closed", 0)
        elif self.now < self.opened_s + RESET_S:
            assert self.breaker.state == "open"
            assert self.breaker.remaining_s == self.opened_s + RESET_S - self.now
        else:
            assert (self.breaker.state, self.breaker.remaining_s) == ("half-open", 0)


TestBreaking = Breaking.TestCase


def failure(retry: Retry, after_s: float | None = None) -> AttemptFailed:
    return AttemptFailed(SliceUnavailable("no"), retry=retry, retry_after_s=after_s)


@given(st.integers(0, 5), st.floats(0, 100), st.integers(1, 5000), st.floats(0, 1))
def test_waits_double_up_to_a_limit_with_full_jitter(
    retries: int, backoff_s: float, attempts: int, chance: float
) -> None:
    policy = RetryPolicy(
        retries=retries, backoff_s=backoff_s, uniform=lambda low, high: low + chance * (high - low)
    )
    delay = policy.delay(failure(Retry.ALLOWED), attempts)
    if attempts > retries:
        assert delay is None
    else:
        assert delay == chance * min(backoff_s * 2 ** (attempts - 1), LONGEST_BACKOFF_S)


def test_what_may_be_sent_again() -> None:
    policy = RetryPolicy(retries=5, backoff_s=1.0, uniform=lambda low, high: high)
    assert policy.delay(failure(Retry.NEVER), 1) is None
    assert policy.delay(failure(Retry.ONCE), 1) == 1.0
    assert policy.delay(failure(Retry.ONCE), 2) is None
    assert policy.delay(failure(Retry.ALLOWED), 3) == 4.0
    assert policy.delay(failure(Retry.ALLOWED, 7.0), 1) == 8.0
    assert policy.delay(failure(Retry.ALLOWED, LONGEST_RETRY_AFTER_S + 1), 1) is None
    none = RetryPolicy(retries=0, backoff_s=1.0, uniform=lambda low, high: high)
    assert none.delay(failure(Retry.ONCE), 1) is None


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("-3", None),
        ("Thu, 01 Jan 1970 00:01:40 +" + "9" * 30, None),
        ("7", 7.0),
        (" 0 ", 0.0),
        ("9" * 400, 999999999999.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90.0),
        ("Thu, 01 Jan 1970 00:00:01 GMT", 0.0),
        ("Thu, 01 Jan 1970 00:01:40 -0000", 90.0),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert retry_after_s(header, now_s=10.0) == seconds


@given(st.text(max_size=40))
def test_any_retry_after_is_read(header: str) -> None:
    seconds = retry_after_s(header, now_s=10.0)
    assert seconds is None or seconds >= 0
