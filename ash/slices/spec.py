"""What a slice is made of, as config.toml says it: values only."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from ash.domain.values import Sampling


class SliceSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """One loadable model and how to run it.

    Attributes:
        name: the slice's name, the key of its table in config.toml.
        tier: `nano` for light work, `turbo` for hard work.
        model: `package:NAME`, `path:FILE` or `hf:ORG/REPO/FILE.gguf`.
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
        prefill_chunk: prompt tokens per step while others decode; bounds how long they stall.
        kv_type: element type of the KV cache.
        flash_attention: `off` is faster on CPUs that were measured (docs/decisions/).
        kv_unified: one KV buffer for all sessions instead of one each.
        gpu_layers: layers offloaded to a GPU.
        mmap: map the file instead of reading it.
        repack: let the CPU back end copy weights into a faster layout.
        paged_bytes: RAM for KV state of sessions that lost their slot; 0 keeps none.
        vision: the slice takes images.
    """

    name: str
    tier: Literal["nano", "turbo"]
    model: str
    sha256: str | None = None
    template: str | None = None
    stop: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    fallback: str | None = None
    context: int = 2048
    slots: int = 8
    threads: int = 0
    batch: int = 512
    prefill_chunk: int = 64
    kv_type: Literal["f16", "q8_0"] = "f16"
    flash_attention: Literal["auto", "on", "off"] = "off"
    kv_unified: bool = False
    gpu_layers: int = 0
    mmap: bool = True
    repack: bool = True
    paged_bytes: int = 256 * 1024 * 1024
    vision: bool = False
