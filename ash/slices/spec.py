"""What a slice is made of, as config.toml says it: values only."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from ash.domain.values import Sampling

MODEL_SCHEME = "openai:"
"""What the `model` of a remote slice begins with."""


class RemoteSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """An OpenAI-compatible endpoint that runs a slice.

    Attributes:
        url: base of the API, such as `http://127.0.0.1:8080/v1`.
        dialect: which fields beyond OpenAI's it takes; `auto` asks it (ash/slices/remote/dialect.py).
        api_key_env: the environment variable that holds the key; empty if the endpoint wants none.
        concurrency: requests that run at the same time; others wait.
        connect_timeout_s: for the connection.
        first_token_timeout_s: from the request to the first piece of the answer, prefill included.
        idle_timeout_s: between two pieces of the answer.
        retries: how often a request that failed before its first piece is sent again.
        backoff_s: wait before the first retry; doubles each time, with jitter.
        breaker_failures: failures in a row after which the endpoint is left alone.
        breaker_reset_s: for so long, then one request tries it again.
    """

    url: str
    dialect: Literal["auto", "openai", "llamacpp", "vllm"] = "auto"
    api_key_env: str = ""
    concurrency: int = 8
    connect_timeout_s: float = 5.0
    first_token_timeout_s: float = 120.0
    idle_timeout_s: float = 30.0
    retries: int = 2
    backoff_s: float = 0.5
    breaker_failures: int = 5
    breaker_reset_s: float = 30.0


class SliceSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """One loadable model and how to run it.

    Attributes:
        name: the slice's name, the key of its table in config.toml.
        tier: `nano` for light work, `turbo` for hard work.
        model: `package:NAME`, `path:FILE`, `hf:ORG/REPO/FILE.gguf`, or `openai:MODEL` with a [remote] table.
        remote: the endpoint of an `openai:` model; None for a local file.
        sha256: expected digest of the GGUF file, hex; None leaves it unchecked.
        template: jinja2 chat template, or the name of one that Ash ships (`completion`, for base models);
            None takes the one inside the GGUF.
        stop: strings that end an answer, beside the model's end-of-generation tokens.
        sampling: defaults for this slice.
        fallback: the slice that answers when this one keeps failing.
        context: tokens per session (history and answer).
        slots: sessions whose KV cache is resident at the same time.
        threads: decoding threads; 0 takes one per usable core.
        batch: the most tokens in one decode call (n_batch).
        stall_ms: how long answers that stream may wait for their next token while prompts come in. Prompts
            that can be finished within it are; longer ones are computed beside the others, in steps half as
            long.
        kv_type: element type of the KV cache.
        flash_attention: `auto` uses it where the back end can (docs/decisions/).
        kv_unified: one KV buffer for all sessions instead of one each.
        gpu_layers: layers offloaded to a GPU.
        mmap: map the file instead of reading it.
        lazy: read embedding tables row by row from the file when they are used (`auto`: llama.cpp decides).
        repack: let the CPU back end copy weights into a faster layout.
        release_file: after loading, give back the pages of a mapped file whose weights were repacked.
        paged_bytes: RAM for KV state of sessions that lost their slot; 0 keeps none.
        disk_bytes: disk for KV state, which then survives restarts; 0 keeps none.
        pinned: never evicted once loaded.
        vision: the slice takes images.
    """

    name: str
    tier: Literal["nano", "turbo"]
    model: str
    remote: RemoteSpec | None = None
    sha256: str | None = None
    template: str | None = None
    stop: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    fallback: str | None = None
    context: int = 2048
    slots: int = 8
    threads: int = 0
    batch: int = 512
    stall_ms: int = 500
    kv_type: Literal["f16", "q8_0"] = "f16"
    flash_attention: Literal["auto", "on", "off"] = "auto"
    kv_unified: bool = False
    gpu_layers: int = 0
    mmap: bool = True
    lazy: Literal["off", "auto", "on"] = "auto"
    repack: bool = True
    release_file: bool = False
    paged_bytes: int = 256 * 1024 * 1024
    disk_bytes: int = 4 * 1024 * 1024 * 1024
    pinned: bool = False
    vision: bool = False
