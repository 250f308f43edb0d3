"""What the gateway counts, on the Prometheus registry that it is given."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LAG_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class GatewayMetrics:
    """Counters and gauges of one gateway."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.connections = Gauge(
            "ash_gateway_connections", "Authenticated WebSocket connections.", ["path"], registry=registry
        )
        self.requests = Counter(
            "ash_gateway_requests",
            "Requests by method and outcome (ok or the error's kind).",
            ["method", "outcome"],
            registry=registry,
        )
        self.events_sent = Counter(
            "ash_gateway_events_sent", "Session events handed to sockets.", registry=registry
        )
        self.bytes_sent = Counter(
            "ash_gateway_sent_bytes", "Payload bytes handed to sockets.", registry=registry
        )
        self.slow_consumer_closes = Counter(
            "ash_gateway_slow_consumer_closes",
            "Sockets closed because their client did not keep up.",
            registry=registry,
        )
        self.refused = Counter(
            "ash_gateway_refused", "Connections refused, by reason.", ["reason"], registry=registry
        )
        self.loop_lag = Histogram(
            "ash_event_loop_lag_seconds",
            "How late the event loop ran a callback that was due.",
            buckets=LAG_BUCKETS_S,
            registry=registry,
        )
