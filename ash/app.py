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
from msgspec import Struct
from prometheus_client import CollectorRegistry

from ash import __version__
from ash.config import ModesSettings, ResidencySettings, Settings
from ash.domain.errors import AshError, ConfigError
from ash.domain.ports import Encoder
from ash.encoders.light import LightEncoder
from ash.encoders.model import model_folder, model_identity
from ash.encoders.sentence import SentenceEncoder
from ash.encoders.tuning import Epoch, Job, Tuning, is_made, light_folder, make_light_encoder
from ash.gateway.http import HealthServer
from ash.gateway.limits import GatewayLimits
from ash.gateway.metrics import GatewayMetrics
from ash.gateway.tokens import TokenRegistry
from ash.gateway.ws import Gateway
from ash.heads.cache import HeadCache
from ash.modes import anchors as mode_anchors
from ash.modes import observer as mode_heads
from ash.modes.cusum import Cusum
from ash.modes.filter import ModeFilter
from ash.modes.instrument import Instrument
from ash.modes.observer import ModeObserver, RequestObserver
from ash.routing import anchors as intent_anchors
from ash.routing.augmentation import Examples, augmented, load_material
from ash.routing.policy import PolicyValues
from ash.routing.router import Router, fit_router, router_key
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

LIGHT = "light:"
"""What stands before the reference of a model in `router.encoder` to have a light encoder made from it."""

HEAD_SEED = 7
"""Of the examples that the router's head is fitted on; tuning takes those behind it."""

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


def encoders_folder(settings: Settings) -> Path:
    """Where light encoders are kept."""
    return settings.cache_folder / "encoders"


def heads_folder(settings: Settings) -> Path:
    """Where fitted heads are kept."""
    return settings.cache_folder / "heads"


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


def router_examples(seed: int = HEAD_SEED) -> Examples:
    """What the router's head is fitted on; other seeds are for tuning."""
    return augmented(intent_anchors.load_anchors(), load_material(), seed=seed)


async def prepared_encoder(settings: Settings) -> Encoder:
    """The encoder of `router.encoder`, not yet open; a light one is made first, where it has not been.

    Raises:
        ConfigError: there is no such model.
        EncoderUnavailable: the light encoder could not be made.
    """
    reference = settings.router.encoder
    if not reference.startswith(LIGHT):
        return SentenceEncoder(model=reference)
    base = reference.removeprefix(LIGHT)
    source, tuning = model_folder(base), Tuning()
    identity = await asyncio.to_thread(model_identity, base, source)
    examples = [router_examples(HEAD_SEED + 1 + number) for number in range(tuning.epochs)]
    contents = [part.content_hash for part in examples]
    folder = light_folder(encoders_folder(settings), identity, tuning, contents)
    if not is_made(folder):
        log.info("making the light encoder: once, five to fifteen minutes on one core", folder=str(folder))
    epochs = [Epoch(*part.tuned_on()) for part in examples]
    await make_light_encoder(folder, Job(str(source), tuning, epochs))
    return LightEncoder(folder)


@contextlib.asynccontextmanager
async def opened_reference(model: str) -> AsyncIterator[Encoder]:
    """`model` of `router.encoder` as it was published, even where a light one is made from it."""
    encoder = SentenceEncoder(model=model.removeprefix(LIGHT))
    await encoder.open()
    try:
        yield encoder
    finally:
        await encoder.close()


async def fitted_router(settings: Settings, encoder: Encoder, cache: HeadCache) -> Router:
    """The router with its head, fitted on the examples or taken from the cache."""
    examples = router_examples()
    key = router_key(examples, encoder.identity)
    head = cache.load(key)
    if head is None:
        log.info("fitting the router; once, a minute or two", examples=len(examples.texts))
        vectors = await encoder.encode(examples.texts)
        head = await asyncio.to_thread(fit_router, examples, vectors)
        cache.store(key, head)
    values = PolicyValues(abstain=settings.router.abstain, up=settings.router.up, down=settings.router.down)
    return Router(head, settings.router.table, values)


class OpenedRouter(Struct, frozen=True):
    """A router, the encoder that it was fitted for, open, and where their heads are kept."""

    router: Router
    encoder: Encoder
    cache: HeadCache


@contextlib.asynccontextmanager
async def opened_router(settings: Settings, *, refit: bool = False) -> AsyncIterator[OpenedRouter]:
    """A router for commands that need no server; the encoder is closed at the end of the block.

    `refit` fits the head even where the cache has it.
    """
    cache = HeadCache(heads_folder(settings))
    encoder = await prepared_encoder(settings)
    await encoder.open()
    try:
        if refit:
            cache.path(router_key(router_examples(), encoder.identity)).unlink(missing_ok=True)
        yield OpenedRouter(await fitted_router(settings, encoder, cache), encoder, cache)
    finally:
        await encoder.close()


async def fitted_instrument(encoder: Encoder, cache: HeadCache) -> Instrument:
    """The mode observers with their heads, fitted on the anchors or taken from the cache."""
    texts = mode_anchors.load_anchors().with_joined_lines()
    requests = mode_anchors.load_requests()
    keys = (
        mode_heads.mode_key(texts, encoder.identity),
        mode_heads.genre_key(texts, encoder.identity),
        mode_heads.request_key(requests, encoder.identity),
    )
    mode, genre, request = (cache.load(key) for key in keys)
    if mode is None or genre is None or request is None:
        log.info("fitting the mode observer on its anchors; once", texts=len(texts.texts()))
        vectors = await encoder.encode(texts.texts())
        asked = await encoder.encode(requests.texts())

        mode = await asyncio.to_thread(mode_heads.fit_modes, texts, vectors)
        genre = await asyncio.to_thread(mode_heads.fit_genres, texts, vectors)
        request = await asyncio.to_thread(mode_heads.fit_requests, requests, asked)
        for key, head in zip(keys, (mode, genre, request), strict=True):
            if head is not None:
                cache.store(key, head)
    return Instrument(ModeObserver(mode, genre), RequestObserver(request))


@contextlib.asynccontextmanager
async def opened_instrument(settings: Settings) -> AsyncIterator[tuple[Encoder, Instrument]]:
    """The encoder, open for the length of the block, and the mode observers; needs no server."""
    cache = HeadCache(heads_folder(settings))
    encoder = await prepared_encoder(settings)
    await encoder.open()
    try:
        yield encoder, await fitted_instrument(encoder, cache)
    finally:
        await encoder.close()


def mode_filter(modes: ModesSettings) -> ModeFilter:
    """The filter over observed modes, as configured.

    Raises:
        ConfigError: a value is out of its range.
    """
    try:
        return ModeFilter(
            stay=modes.stay,
            alarm=modes.alarm,
            noise=modes.noise,
            confirm=modes.confirm,
            window=modes.window,
        )
    except ValueError as error:
        raise ConfigError(f"[modes]: {error}") from error


def mode_cusum(modes: ModesSettings) -> Cusum:
    """The cross-check of the filter, as configured.

    Raises:
        ConfigError: a value is out of its range.
    """
    try:
        return Cusum(threshold=modes.cusum_threshold, drift=modes.cusum_drift, cap=modes.cusum_cap)
    except ValueError as error:
        raise ConfigError(f"[modes]: {error}") from error


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
