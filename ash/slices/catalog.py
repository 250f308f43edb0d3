"""The catalogue of slices: what has to hold of it, and what can be told of each model file."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import Struct

from ash.domain.errors import ConfigError, ModelFileError
from ash.slices.gguf import read_header
from ash.slices.models import expected_sha256, locate_model, sha256_of
from ash.slices.spec import MODEL_SCHEME, SliceSpec
from ash.slices.templates import template_source


class CheckResult(Struct, frozen=True):
    """What a look at a slice's model file gave; nothing is loaded.

    Attributes:
        slice: the slice's name.
        path: the model file; None if it was not found.
        bytes: its size.
        sha256: its digest, hex.
        digest_ok: whether that is the expected one; None if none is expected.
        architecture: such as `llama`.
        tensor_types: number of tensors by quantisation type, most frequent first.
        context_length: tokens of context the model was trained for.
        licence: what the file says of its licence.
        endpoint: the address of a remote slice, which has no file to look at; None for others.
        problem: why the slice cannot be used; None if it can.
    """

    slice: str
    path: str | None = None
    bytes: int = 0
    sha256: str | None = None
    digest_ok: bool | None = None
    architecture: str | None = None
    tensor_types: dict[str, int] = {}
    context_length: int | None = None
    licence: str | None = None
    endpoint: str | None = None
    problem: str | None = None


def validate(specs: Sequence[SliceSpec]) -> None:
    """Check that the slices go together.

    Raises:
        ConfigError: naming the slice and the key that is wrong.
    """
    by_name: dict[str, SliceSpec] = {}
    for spec in specs:
        if spec.name in by_name:
            raise ConfigError(f"slices.{spec.name}: there are two slices of this name; rename one")
        by_name[spec.name] = spec
        _validate_sizes(spec)
        _validate_remote(spec)
        if spec.template is not None:
            template_source(spec.template)
    for spec in specs:
        _validate_fallbacks(spec, by_name)


def check(spec: SliceSpec, *, cache_folder: Path) -> CheckResult:
    """Look at the model file of `spec`, if it is a local one; no endpoint is asked.

    Reads the whole file: call it from a thread.
    """
    if spec.remote is not None:
        return CheckResult(spec.name, endpoint=spec.remote.url)
    try:
        path = locate_model(spec.model, cache_folder=cache_folder)
    except ModelFileError as error:
        return CheckResult(spec.name, problem=str(error))
    try:
        digest = sha256_of(path)
        header = read_header(path)
    except ModelFileError as error:
        return CheckResult(spec.name, str(path), problem=str(error))
    expected = expected_sha256(spec)
    licence = header.metadata.get("general.license")
    wrong_digest = expected is not None and digest != expected
    return CheckResult(
        slice=spec.name,
        path=str(path),
        bytes=path.stat().st_size,
        sha256=digest,
        digest_ok=None if expected is None else not wrong_digest,
        architecture=header.architecture,
        tensor_types=header.tensor_types(),
        context_length=header.context_length,
        licence=str(licence) if licence is not None else None,
        problem=f"sha256 is {digest} instead of {expected}" if wrong_digest else None,
    )


def _validate_sizes(spec: SliceSpec) -> None:
    least_of = {"context": 64, "slots": 1, "threads": 0, "stall_ms": 1, "paged_bytes": 0, "disk_bytes": 0}
    for key, least in least_of.items():
        value = getattr(spec, key)
        if value < least:
            raise ConfigError(f"slices.{spec.name}.{key} = {value}: it has to be {least} or more")
    if spec.batch <= spec.slots:
        raise ConfigError(
            f"slices.{spec.name}.batch = {spec.batch}: it has to be larger than slots ({spec.slots}), so "
            "that every session decodes in each step and a prompt still fits in"
        )
    if spec.kv_type != "f16" and spec.flash_attention == "off":
        raise ConfigError(
            f'slices.{spec.name}.kv_type = {spec.kv_type!r} needs flash_attention = "on" or "auto"'
        )


def _validate_remote(spec: SliceSpec) -> None:
    """An `openai:` model and a [remote] table belong together, and the table has to make sense."""
    key = f"slices.{spec.name}"
    is_remote_model = spec.model.startswith(MODEL_SCHEME)
    if spec.remote is None:
        if is_remote_model:
            raise ConfigError(f"{key}.model = {spec.model!r} needs a table [{key}.remote] with the url")
        return
    if not is_remote_model:
        raise ConfigError(
            f"{key}.remote belongs to a model at an endpoint, but model = {spec.model!r}; write "
            f"{MODEL_SCHEME}NAME, or take the table out"
        )
    if not spec.model.removeprefix(MODEL_SCHEME).strip():
        raise ConfigError(f"{key}.model = {spec.model!r}: write the name of the model behind {MODEL_SCHEME}")
    _validate_url(f"{key}.remote.url", spec.remote.url)
    least_of = {"concurrency": 1, "retries": 0, "backoff_s": 0, "breaker_failures": 1}
    for name, least in least_of.items():
        if not least <= getattr(spec.remote, name) < inf:
            raise ConfigError(
                f"{key}.remote.{name} = {getattr(spec.remote, name)}: it has to be {least} or more"
            )
    for name in ("connect_timeout_s", "first_token_timeout_s", "idle_timeout_s", "breaker_reset_s"):
        if not 0 < getattr(spec.remote, name) < inf:
            raise ConfigError(f"{key}.remote.{name} = {getattr(spec.remote, name)}: it has to be above 0")


def _validate_url(key: str, url: str) -> None:
    example = "write one such as http://127.0.0.1:8080/v1"
    try:
        parts = urlsplit(url)
        # Read for its check.
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"{key}: no web address ({error}); {example}") from error
    # The url itself is shown only where it holds no secret.
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"{key}: it holds a name or password; put the key into a variable, `api_key_env`")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(f"{key} = {url!r}: no http or https address; {example}")
    if parts.query or parts.fragment:
        raise ConfigError(f"{key}: leave out what follows the path, from ? or # on; {example}")


def _validate_fallbacks(spec: SliceSpec, by_name: dict[str, SliceSpec]) -> None:
    """A fallback is another slice of the catalogue. Two may name each other: a run falls back once only."""
    if spec.fallback is None:
        return
    if spec.fallback not in by_name:
        raise ConfigError(
            f"slices.{spec.name}.fallback = {spec.fallback!r}: there is no such slice; write one "
            f"of {', '.join(by_name)}"
        )
    if spec.fallback == spec.name:
        raise ConfigError(f"slices.{spec.name}.fallback: a slice cannot be its own fallback; name another")
