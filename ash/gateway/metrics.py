"""What the gateway counts, on the Prometheus registry that it is given."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


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
