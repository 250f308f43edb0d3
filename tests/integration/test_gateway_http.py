"""Health, readiness and metrics over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from gateway_harness import HOSTS
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from ash.domain.errors import AshError, StoreError
from ash.gateway import http
from ash.gateway.http import HealthServer, ReadinessCheck
from ash.gateway.metrics import GatewayMetrics


async def ready() -> str | None:
    return None


async def no_model() -> str | None:
    return "no slice could be loaded"


async def store_down() -> str | None:
    raise StoreError("the database is gone")


async def defect() -> str | None:
    raise ZeroDivisionError("secret")


async def hangs() -> str | None:
    await asyncio.Event().wait()
    return None


@asynccontextmanager
async def health(**checks: ReadinessCheck) -> AsyncIterator[tuple[aiohttp.ClientSession, GatewayMetrics]]:
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)
    server = HealthServer(host="127.0.0.1", port=0, hosts=HOSTS, checks=checks, registry=registry)
    await server.start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{server.address[1]}") as client:
            yield client, metrics
    finally:
        await server.stop()
        await server.stop()


async def get(client: aiohttp.ClientSession, path: str, **options: Any) -> tuple[int, Any]:
    async with client.get(path, **options) as response:
        body = await (response.json() if "json" in response.content_type else response.text())
        return response.status, body


async def test_the_process_is_alive_whatever_its_parts_do() -> None:
    async with health(store=store_down) as (client, _):
        assert await get(client, "/healthz") == (200, {"status": "alive"})


async def test_it_is_ready_when_every_part_is() -> None:
    async with health(store=ready, slices=ready) as (client, _):
        assert await get(client, "/readyz") == (200, {"status": "ready", "checks": ["store", "slices"]})


async def test_it_is_not_ready_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "CHECK_TIMEOUT_S", 0.01)
    async with health(store=store_down, slices=no_model, encoder=hangs, odd=defect, good=ready) as (
        client,
        _,
    ):
        with capture_logs() as logs:
            status, body = await get(client, "/readyz")
        assert status == 503
        assert body["reasons"] == {
            "store": "the database is gone",
            "slices": "no slice could be loaded",
            "encoder": "no answer within 0.01 s",
            "odd": "the check failed: ZeroDivisionError",
        }
        assert [(line["event"], line["check"]) for line in logs] == [("http.check_failed", "odd")]


async def test_metrics_are_in_prometheus_form() -> None:
    async with health() as (client, metrics):
        metrics.slow_consumer_closes.inc(3)
        status, body = await get(client, "/metrics")
        assert status == 200
        assert "ash_gateway_slow_consumer_closes_total 3.0" in body


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/nothing"])
async def test_an_unknown_host_is_forbidden(path: str) -> None:
    async with health() as (client, _):
        status, body = await get(client, path, headers={"Host": "evil.example"})
        assert status == 403
        assert "gateway.hosts" in body


async def test_a_port_in_use_names_the_setting() -> None:
    async with health() as (client, _):
        assert client._base_url is not None
        port = client._base_url.port
        assert port is not None
        second = HealthServer(
            host="127.0.0.1", port=port, hosts=HOSTS, checks={}, registry=CollectorRegistry()
        )
        with pytest.raises(AshError, match=rf"127\.0\.0\.1:{port}.*ASH_GATEWAY__HTTP_PORT"):
            await second.start()
