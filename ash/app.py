"""The composition root: the only module that knows which adapter stands behind which port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry

from ash import __version__
from ash.config import ResidencySettings, Settings
from ash.domain.errors import AshError
from ash.domain.ports import Encoder
from ash.gateway.http import HealthServer
from ash.gateway.limits import GatewayLimits
from ash.gateway.metrics import GatewayMetrics
from ash.gateway.tokens import TokenRegistry
from ash.gateway.ws import Gateway
from ash.heads.cache import HeadCache
from ash.instruments import fitted_instrument, fitted_router, heads_folder, mode_filter, prepared_encoder
from ash.session.service import SessionLimits, Sessions
from ash.session.turn import TurnPorts
from ash.slices.catalog import validate
from ash.slices.dispatch import SlicePool
from ash.slices.engine import LocalEngine
from ash.slices.remote.engine import RemoteEngine
from ash.slices.residency import ResidencyLimits
from ash.slices.sizes import RememberedSizes, ram_bytes
from ash.slices.spec import SliceSpec
from ash.store.lock import DataFolderLock
from ash.store.log import SqliteEventStore

log = structlog.get_logger(__name__)

DATABASE = "ash.db"
STATES_FOLDER = "kv"
SIZES_FILE = "slice-sizes.json"
SERVER_FILE = "server.json"
"""Where a running server writes its addresses, for `ash chat` and scripts."""

RESUME_AFTER_MS = 2000
"""When clients are told to come back after a shutdown."""


def wall_clock() -> int:
    """Milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000


def new_id(prefix: str) -> str:
    """A fresh id that sorts by time: prefix, milliseconds in hex, 40 random bits."""
    return f"{prefix}_{wall_clock():011x}{secrets.token_hex(5)}"


def slice_specs(settings: Settings) -> list[SliceSpec]:
    """The catalogue, checked.

    Raises:
        ConfigError: the slices do not go together.
    """
    specs = list(settings.slices.values())
    validate(specs)
    return specs


def models_folder(settings: Settings) -> Path:
    """Where model files that packages bring in parts are put together."""
    return settings.cache_folder / "models"


def slice_sizes(settings: Settings) -> RememberedSizes:
    """What slices take in memory: estimated, or remembered in the data folder."""
    return RememberedSizes(settings.data_folder / SIZES_FILE, cache_folder=models_folder(settings))


def residency_limits(residency: ResidencySettings) -> ResidencyLimits:
    """Budget and times of residency; no budget in the settings means half of the RAM."""
    return ResidencyLimits(
        budget_bytes=residency.budget_bytes or ram_bytes() // 2,
        min_resident_s=residency.min_resident_s,
        patience_s=residency.patience_s,
    )


def prepare_data_folder(settings: Settings) -> Path:
    """Make the data folder, readable by its owner only.

    Raises:
        AshError: it cannot be made.
    """
    folder = settings.data_folder
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise AshError(f"cannot make the data folder {folder}: {error.strerror}; set store.path") from error
    return folder


class Server:
    """One running Ash: everything wired, started in order, stopped in reverse."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stack = contextlib.AsyncExitStack()
        self.address = ("", 0)
        self.http_address = ("", 0)

    async def start(self) -> None:
        """Open the log, recover, listen.

        Raises:
            AshError: it cannot start; the message says why and what to do.
        """
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _start(self) -> None:
        settings = self._settings
        folder = prepare_data_folder(settings)
        specs = slice_specs(settings)
        self._stack.enter_context(DataFolderLock(folder))
        tokens = TokenRegistry(folder)
        tokens.ensure_owner()
        store = SqliteEventStore(folder / DATABASE, clock=wall_clock)
        await store.open()
        self._stack.push_async_callback(store.close)
        log.info("loading the encoder", model=settings.router.encoder)
        encoder = await prepared_encoder(settings)
        await encoder.open()
        self._stack.push_async_callback(encoder.close)
        cache = HeadCache(heads_folder(settings))
        router = await fitted_router(settings, encoder, cache)
        instrument = await fitted_instrument(encoder, cache)
        engines = {
            spec.name: RemoteEngine(spec, environment=os.environ)
            if spec.remote is not None
            else LocalEngine(spec, cache_folder=models_folder(settings), states_folder=folder / STATES_FOLDER)
            for spec in specs
        }
        slices = SlicePool(
            engines,
            specs,
            limits=residency_limits(settings.residency),
            sizes=slice_sizes(settings),
            measure={
                name: engine.resident_bytes
                for name, engine in engines.items()
                if isinstance(engine, LocalEngine)
            },
        )
        self._stack.push_async_callback(slices.close)
        ports = TurnPorts(
            encoder=encoder,
            router=router,
            observer=instrument,
            slices=slices,
            monotonic=time.monotonic,
            new_id=new_id,
            default_persona=settings.session.persona or None,
            coalesce_s=settings.session.coalesce_ms / 1000,
        )
        sessions = Sessions(store, ports, lambda: mode_filter(settings.modes), self._session_limits())
        self._stack.push_async_callback(sessions.stop)
        await sessions.recover()
        await self._listen(folder, sessions, tokens, store, encoder)

    async def _listen(
        self,
        folder: Path,
        sessions: Sessions,
        tokens: TokenRegistry,
        store: SqliteEventStore,
        encoder: Encoder,
    ) -> None:
        registry = CollectorRegistry()
        gateway_settings = self._settings.gateway

        async def store_ready() -> str | None:
            try:
                await store.head("")
            except AshError as error:
                return str(error)
            return None

        async def encoder_ready() -> str | None:
            try:
                await encoder.encode(["ready"])
            except AshError as error:
                return str(error)
            return None

        gateway = Gateway(
            sessions,
            tokens,
            host=gateway_settings.host,
            port=gateway_settings.port,
            hosts=gateway_settings.hosts,
            origins=gateway_settings.origins,
            limits=GatewayLimits(
                max_payload=gateway_settings.max_payload,
                max_buffered=gateway_settings.max_buffered,
                heartbeat_ms=gateway_settings.heartbeat_ms,
                max_connections=gateway_settings.max_connections,
                compression=gateway_settings.compression,
            ),
            metrics=GatewayMetrics(registry),
            version=__version__,
        )
        health = HealthServer(
            host=gateway_settings.host,
            port=gateway_settings.http_port,
            hosts=gateway_settings.hosts,
            checks={"store": store_ready, "encoder": encoder_ready},
            registry=registry,
        )
        await health.start()
        self._stack.push_async_callback(health.stop)
        await gateway.start()

        async def stop_gateway() -> None:
            sessions.refuse_input()
            await gateway.stop(
                reason="stopped",
                resume_after_ms=RESUME_AFTER_MS,
                grace_s=gateway_settings.shutdown_grace_s,
            )

        self._stack.push_async_callback(stop_gateway)
        self.address, self.http_address = gateway.address, health.address
        _write_server_file(folder / SERVER_FILE, self.address, self.http_address)

    async def stop(self) -> None:
        """Announce, close, and leave open runs to the next start's recovery."""
        await self._stack.aclose()

    def _session_limits(self) -> SessionLimits:
        session = self._settings.session
        return SessionLimits(
            resume_interrupted=session.resume_interrupted,
            resident_sessions=session.resident_sessions,
            queue_length=session.queue_length,
            prompt_bytes=session.prompt_bytes,
        )


def _write_server_file(path: Path, address: tuple[str, int], http_address: tuple[str, int]) -> None:
    """Tell local programs where the server is; written whole or not at all."""
    facts = {
        "pid": os.getpid(),
        "ws": f"ws://{address[0]}:{address[1]}/ws",
        "chat": f"ws://{address[0]}:{address[1]}/chat",
        "http": f"http://{http_address[0]}:{http_address[1]}",
        "version": __version__,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(facts), encoding="utf-8")
    temporary.replace(path)


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Server]:
    """A started server that is stopped at the end of the block."""
    server = Server(settings)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def until_signalled(signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> None:
    """Return when the process is told to stop."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in signals:
        loop.add_signal_handler(number, told.set)
    await told.wait()
