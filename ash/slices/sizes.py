"""How many bytes a slice takes: estimated from the model's header until it was measured, and remembered then.

Measured is the proportional set size (PSS) of the worker process: weights that two slices map from one file
count once. Measurements are kept by model digest and settings in a small JSON file of the data folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Final, Protocol

import msgspec
import structlog
from msgspec import Struct

from ash.domain.errors import ModelFileError
from ash.slices.gguf import GgufHeader, read_header
from ash.slices.models import expected_sha256, locate_model, prepare_model
from ash.slices.spec import SliceSpec
from ash.slices.worker.mapped_file import LAZY_TENSORS

_KV_ELEMENT_BYTES: Final = {"f16": 2.0, "q8_0": 34 / 32}
_CONTEXT_PADDING: Final = 256
"""llama.cpp rounds the tokens of a KV stream up to a multiple of it."""

_SLIDING_PERIODS: Final = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "gemma4": 5, "gpt-oss": 2, "cohere2": 4}
"""By architecture, every how many layers one looks back over the whole context and not over a window only, as
llama.cpp has it. Those that are not listed are taken to have no window: too much rather than too little."""

_REPACKED: Final = frozenset({"Q4_0", "Q4_K", "Q2_K", "IQ4_NL"})
"""Types that llama.cpp copies into another layout for x86 with AVX2 (ggml-cpu/repack.cpp)."""

_PROCESS_BYTES: Final = 55_000_000
"""Interpreter, libraries and llama.cpp in a worker without a model, measured."""
_TOKEN_BYTES: Final = 220
"""What llama.cpp keeps for one entry of the vocabulary, measured on 49,152 and on 262,144 entries."""

_NO_MATTER: Final = frozenset(
    {"name", "tier", "model", "remote", "sha256", "template", "stop", "sampling", "fallback", "threads"}
    | {"stall_ms", "disk_bytes", "pinned", "vision"}
)
"""Settings that do not change the size; all others are part of the key of a measurement."""

_log = structlog.get_logger(__name__)


class SliceSize(Struct, frozen=True):
    """Bytes of a loaded slice, measured earlier or estimated."""

    bytes: int
    is_measured: bool


class SizeSource(Protocol):
    """Where the expected sizes of slices come from. Methods block on the disk: call them from a thread."""

    def expected(self, spec: SliceSpec) -> SliceSize:
        """What the slice will take.

        Raises:
            ModelFileError: its model file cannot be used.
        """

    def remember(self, spec: SliceSpec, measured_bytes: int) -> None:
        """Expect `measured_bytes` from now on, for as long as model and settings are the same."""


class RememberedSizes:
    """Sizes by what was measured in the past, else by an estimate (port SizeSource). Safe in several threads.

    Args:
        path: the JSON file; made when there is something to remember. A damaged one counts as empty.
        cache_folder: where a model that comes in parts is put together.
    """

    def __init__(self, path: Path, *, cache_folder: Path) -> None:
        self._path = path
        self._cache_folder = cache_folder
        self._lock = threading.Lock()

    def expected(self, spec: SliceSpec) -> SliceSize:
        """See the port. The model file is found and checked as for a load."""
        return self._of_file(spec, prepare_model(spec, cache_folder=self._cache_folder))

    def of_unchecked(self, spec: SliceSpec) -> SliceSize:
        """As `expected`, yet the digest of the model file is not checked: to be shown.

        Raises:
            ModelFileError: there is no model file, or it is no GGUF file.
        """
        return self._of_file(spec, locate_model(spec.model, cache_folder=self._cache_folder))

    def remember(self, spec: SliceSpec, measured_bytes: int) -> None:
        """See the port. A failure costs an estimate at the next start and is logged."""
        try:
            key = _key(spec, locate_model(spec.model, cache_folder=self._cache_folder))
            with self._lock:
                known = self._read()
                known[key] = {"slice": spec.name, "model": spec.model, "bytes": measured_bytes}
                self._write(known)
        except (OSError, ModelFileError) as error:
            _log.warning("the size of a slice was not remembered", slice=spec.name, reason=str(error))

    def _of_file(self, spec: SliceSpec, path: Path) -> SliceSize:
        entry = self._read().get(_key(spec, path))
        if isinstance(entry, dict) and isinstance(known := entry.get("bytes"), int):
            return SliceSize(known, is_measured=True)
        return SliceSize(estimate_bytes(spec, read_header(path), path.stat().st_size), is_measured=False)

    def _read(self) -> dict[str, object]:
        try:
            known = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            # Nothing is lost: the sizes are estimated and measured again.
            return {}
        return known if isinstance(known, dict) else {}

    def _write(self, known: dict[str, object]) -> None:
        """Others see either the old file or the whole new one."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=self._path.parent, prefix=self._path.name, delete=False
        ) as file:
            json.dump(known, file, indent=1)
        Path(file.name).replace(self._path)


def estimate_bytes(spec: SliceSpec, header: GgufHeader, file_bytes: int) -> int:
    """Bytes of the worker that runs `spec` on the model with `header`: weights, KV, compute buffers, process.

    Saved KV state of sessions without a slot (`paged_bytes`) comes on top as sessions come. Layers on a GPU
    (`gpu_layers`) are counted as if they were in RAM. Both are corrected by the first measurement.
    """
    return _PROCESS_BYTES + sum(
        (
            weight_bytes(spec, header, file_bytes),
            kv_bytes(spec, header),
            compute_bytes(spec, header),
            _TOKEN_BYTES * header.array_lengths.get("tokenizer.ggml.tokens", 0),
        )
    )


def weight_bytes(spec: SliceSpec, header: GgufHeader, file_bytes: int) -> int:
    """The file, and beside a mapped one the copies of the weights that are repacked.

    Of tensors that are read row by row next to nothing is in memory.
    """
    if spec.lazy == "on":
        file_bytes -= sum(tensor.size for tensor in header.tensors if tensor.name in LAZY_TENSORS)
    if not (spec.mmap and spec.repack):
        return file_bytes
    copies = sum(
        tensor.size
        for tensor in header.tensors
        if tensor.type in _REPACKED and "embd" not in tensor.name and len(tensor.shape) > 1
    )
    return file_bytes if spec.release_file else file_bytes + copies


def kv_bytes(spec: SliceSpec, header: GgufHeader) -> int:
    """The KV cache: for each layer its K and V rows by tokens, in windows only where the layer has one."""
    context = _padded(spec.context)
    window = header.metadata.get(f"{header.architecture}.attention.sliding_window")
    period = header.metadata.get(
        f"{header.architecture}.attention.sliding_window_pattern", _SLIDING_PERIODS.get(header.architecture)
    )
    elements = 0
    for layer, width in _kv_widths(header).items():
        tokens = context
        if isinstance(window, int) and isinstance(period, int) and period > 1 and (layer + 1) % period:
            # A window and one batch, so that a batch can be computed before old tokens leave.
            tokens = min(context, _padded(window + spec.batch))
        elements += width * tokens * spec.slots
    return int(elements * _KV_ELEMENT_BYTES[spec.kv_type])


def compute_bytes(spec: SliceSpec, header: GgufHeader) -> int:
    """A guess at the compute buffers: scores, activations of a layer, a row of logits for each slot."""
    heads = _count(header, "attention.head_count")
    width = _count(header, "embedding_length")
    inner = _count(header, "feed_forward_length")
    vocabulary = header.array_lengths.get("tokenizer.ggml.tokens", 0)
    scores = heads * _padded(spec.context) if spec.flash_attention == "off" else 0
    return 4 * (spec.batch * (scores + 4 * width + 2 * inner) + spec.slots * vocabulary)


def ram_bytes() -> int:
    """The RAM of this machine, or of the control group (version 2) that this process is confined to."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        # No control groups here.
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _kv_widths(header: GgufHeader) -> dict[int, int]:
    """Layer -> elements of K and V of one token, from the shapes of the projections.

    Layers without (recurrent ones, or those that share another layer's) have no entry.
    """
    widths: dict[int, int] = {}
    joint: dict[int, int] = {}
    queries: dict[int, int] = {}
    for tensor in header.tensors:
        block, _, rest = tensor.name.removeprefix("blk.").partition(".")
        if not block.isdigit() or len(tensor.shape) != 2:
            continue
        layer = int(block)
        match rest:
            case "attn_k.weight" | "attn_v.weight" | "attn_kv_a_mqa.weight":
                widths[layer] = widths.get(layer, 0) + tensor.shape[1]
            case "attn_qkv.weight":
                joint[layer] = tensor.shape[1]
            case "attn_output.weight":
                queries[layer] = tensor.shape[0]
    # Q, K and V in one matrix: what is left of its rows without those of Q, which the output takes in.
    return widths | {layer: rows - queries.get(layer, 0) for layer, rows in joint.items()}


def _count(header: GgufHeader, key: str) -> int:
    """A number of the architecture; 0 where it differs from layer to layer or is not told."""
    value = header.metadata.get(f"{header.architecture}.{key}")
    return value if isinstance(value, int) else 0


def _padded(tokens: int) -> int:
    return -(-tokens // _CONTEXT_PADDING) * _CONTEXT_PADDING


def _key(spec: SliceSpec, path: Path) -> str:
    """What a measurement belongs to: the model file, by digest where one is expected, and the settings."""
    status = path.stat()
    model = expected_sha256(spec) or [str(path), status.st_size, status.st_mtime_ns, status.st_ino]
    settings = {name: value for name, value in msgspec.structs.asdict(spec).items() if name not in _NO_MATTER}
    return hashlib.sha256(json.dumps([model, settings], sort_keys=True).encode()).hexdigest()
