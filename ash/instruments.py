"""The encoder, the router and the mode observers: made at first use, then taken from the cache folder."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import structlog
from msgspec import Struct

from ash.config import ModesSettings, Settings
from ash.domain.errors import ConfigError
from ash.domain.ports import Encoder
from ash.encoders.light import LightEncoder
from ash.encoders.model import model_folder, model_identity
from ash.encoders.sentence import SentenceEncoder
from ash.encoders.tuning import Epoch, Job, Tuning, is_made, light_folder, make_light_encoder
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

log = structlog.get_logger(__name__)

LIGHT = "light:"
"""What stands before the reference of a model in `router.encoder` to have a light encoder made from it."""

HEAD_SEED = 7
"""Of the examples that the router's head is fitted on; tuning takes those behind it."""


def encoders_folder(settings: Settings) -> Path:
    """Where light encoders are kept."""
    return settings.cache_folder / "encoders"


def heads_folder(settings: Settings) -> Path:
    """Where fitted heads are kept."""
    return settings.cache_folder / "heads"


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
