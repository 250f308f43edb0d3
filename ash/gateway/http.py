"""Health and metrics over plain HTTP, on a port of their own."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterable, Mapping

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from ash.domain.errors import AshError
from ash.gateway.admission import HostPolicy

ReadinessCheck = Callable[[], Awaitable[str | None]]
"""Returns None when the part is ready, otherwise the reason why not; raising counts as not ready."""

CHECK_TIMEOUT_S = 5.0
"""A part that does not answer for this long is not ready."""

log = structlog.get_logger(__name__)


class HealthServer:
    """Serves `/healthz` (the process lives), `/readyz` (its parts work) and `/metrics` (Prometheus).

    Args:
        host: address to listen on.
        port: TCP port; 0 lets the system choose, see `address`.
        hosts: names, without ports, that a `Host` header may hold.
        checks: what must work for the server to be ready, by name.
        registry: the metrics to show.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        hosts: Iterable[str],
        checks: Mapping[str, ReadinessCheck],
        registry: CollectorRegistry,
    ) -> None:
        self._host = host
        self._port = port
        self._host_policy = HostPolicy(hosts)
        self._checks = checks
        self._registry = registry
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            AshError: the address cannot be listened on; says which setting to change.
        """
        app = web.Application(middlewares=[self._check_host])
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
            ]
        )
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port).start()
        except OSError as error:
            await runner.cleanup()
            reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
            raise AshError(
                f"cannot listen on {self._host}:{self._port} for health and metrics: {reason}; set "
                f"gateway.http_port (ASH_GATEWAY__HTTP_PORT) to another port"
            ) from error
        self._runner = runner

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that are listened on."""
        assert self._runner is not None, "start() comes first"
        name = self._runner.addresses[0]
        return name[0], name[1]

    async def stop(self) -> None:
        """Stop listening; idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    @web.middleware
    async def _check_host(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if not self._host_policy.allows(request.headers.getall("Host", [])):
            return web.Response(status=403, text="unknown Host; add the name to gateway.hosts\n")
        return await handler(request)

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def _readyz(self, _: web.Request) -> web.Response:
        names = list(self._checks)
        answers = await asyncio.gather(*(_ask(name, self._checks[name]) for name in names))
        reasons = {name: reason for name, reason in zip(names, answers, strict=True) if reason is not None}
        if reasons:
            return web.json_response({"status": "not ready", "reasons": reasons}, status=503)
        return web.json_response({"status": "ready", "checks": names})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )


async def _ask(name: str, check: ReadinessCheck) -> str | None:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            return await check()
    except TimeoutError:
        return f"no answer within {CHECK_TIMEOUT_S:g} s"
    except AshError as error:
        return str(error)
    except Exception as error:
        # A check that is broken must be told apart from a part that is: it is logged, and not ready.
        log.exception("http.check_failed", check=name)
        return f"the check failed: {type(error).__name__}"
