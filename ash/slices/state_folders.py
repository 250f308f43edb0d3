"""Where the KV states of a slice lie: one folder for each model and each setting that changes their bytes."""

from __future__ import annotations

import hashlib
import shutil
from importlib import metadata
from pathlib import Path

import msgspec

from ash.slices.models import cached_sha256
from ash.slices.spec import SliceSpec
from ash.slices.worker.state_files import file_name


def model_states_folder(slice_folder: Path, spec: SliceSpec, model: Path, *, cache_folder: Path) -> Path:
    """The folder for the states of `model` as `spec` runs it; those of other models are removed.

    Hashes the model file once for each version of it: call it from a thread.

    Raises:
        ModelFileError: the model cannot be read.
    """
    key = msgspec.json.encode(
        {
            "model": cached_sha256(model, cache_folder=cache_folder),
            "kv_type": spec.kv_type,
            # Without flash attention llama.cpp stores V transposed.
            "flash_attention": spec.flash_attention,
            "kv_unified": spec.kv_unified,
            "llama_cpp": metadata.version("llama-cpp-python"),
        },
        order="deterministic",
    )
    folder = slice_folder / hashlib.blake2b(key, digest_size=16).hexdigest()
    if slice_folder.is_dir():
        for other in slice_folder.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)  # states of a model that this slice no longer is
    return folder


def forget_states(slice_folder: Path, session: str) -> None:
    """Remove the files of `session`, whichever model they belong to."""
    for path in slice_folder.glob(f"*/{file_name(session)}"):
        path.unlink(missing_ok=True)
