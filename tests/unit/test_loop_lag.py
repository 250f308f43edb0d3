"""The lag of the event loop, measured against a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from ash.gateway.loop_lag import LoopLag
from ash.gateway.metrics import GatewayMetrics


class ManualLoop(asyncio.BaseEventLoop):
    """A loop whose time the test sets, and whose callbacks the test runs."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.due: list[tuple[float, asyncio.TimerHandle, Callable[[], object]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when, callback, *args, context=None):  # type: ignore[no-untyped-def]  # asyncio's own
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self.due.append((when, handle, callback))
        return handle

    def run_at(self, now: float) -> None:
        """Run what is scheduled, at `now`."""
        self.now = now
        scheduled, self.due = self.due, []
        for _, handle, callback in scheduled:
            if not handle.cancelled():
                callback()


@pytest.fixture
def loop():
    loop = ManualLoop()
    yield loop
    loop.close()


def test_the_lag_is_the_time_between_due_and_run(loop: ManualLoop) -> None:
    lags: list[float] = []
    lag = LoopLag(lags.append, interval_s=0.05)
    lag.start(loop)
    loop.run_at(0.05)
    loop.run_at(0.10 + 0.3)
    assert lags == pytest.approx([0.0, 0.3])
    assert [when for when, _, _ in loop.due] == pytest.approx([0.45]), "the next one counts from now"
    lag.stop()


def test_a_callback_that_runs_early_has_no_lag(loop: ManualLoop) -> None:
    lags: list[float] = []
    lag = LoopLag(lags.append, interval_s=0.05)
    lag.start(loop)
    loop.run_at(0.049)
    assert lags == [0.0]


def test_nothing_is_measured_after_stop(loop: ManualLoop) -> None:
    lags: list[float] = []
    lag = LoopLag(lags.append, interval_s=0.05)
    lag.start(loop)
    lag.stop()
    lag.stop()
    loop.run_at(1.0)
    assert lags == []
    assert loop.due == []


def test_the_metrics_show_the_lag_as_a_histogram() -> None:
    registry = CollectorRegistry()
    GatewayMetrics(registry).loop_lag.observe(0.03)
    shown = generate_latest(registry).decode()
    assert 'ash_event_loop_lag_seconds_bucket{le="0.02"} 0.0' in shown
    assert 'ash_event_loop_lag_seconds_bucket{le="0.05"} 1.0' in shown


async def test_the_running_loop_is_measured_by_default() -> None:
    observed: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    lag = LoopLag(lambda seconds: observed.done() or observed.set_result(seconds), interval_s=0.0)
    lag.start()
    assert await observed >= 0.0
    lag.stop()
