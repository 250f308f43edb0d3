"""llama.cpp behind typed methods: the only module that imports llama_cpp.

Written against the low-level functions of llama-cpp-python 0.3.36; units and return codes are those of
llama.h of that version.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from llama_cpp import llama_cpp as api
from numpy.typing import NDArray

from ash.domain.errors import ModelFileError, SliceUnavailable
from ash.domain.values import Sampling
from ash.slices.spec import SliceSpec
from ash.slices.worker.inference import BatchEntry, Constraint, Sampler
from ash.slices.worker.mapped_file import FilePages

_LEVEL_INFO: Final = 2  # ggml_log_level of ggml.h; the table in llama_cpp/_logger.py is of an older version
_LEVEL_WARN: Final = 3
_LEVEL_ERROR: Final = 4
_PENALTY_WINDOW: Final = 64  # llama.cpp's default penalty_last_n, as the domain promises
_RANDOM_SEED: Final = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: llama.cpp would draw a seed of its own
_FLASH_ATTENTION: Final = {
    "auto": api.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "off": api.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    "on": api.LLAMA_FLASH_ATTN_TYPE_ENABLED,
}
_KV_BUFFER: Final = re.compile(r"KV buffer size =\s+([\d.]+) MiB")
_KV_TYPES: Final = {"f16": api.GGML_TYPE_F16, "q8_0": api.GGML_TYPE_Q8_0}
_LAZY_MODES: Final = {
    "off": api.LLAMA_LAZY_MODE_OFF,
    "auto": api.LLAMA_LAZY_MODE_AUTO,
    "on": api.LLAMA_LAZY_MODE_ON,
}


class LlamaLog:
    """What llama.cpp says: warnings and errors go to stderr, and the last errors are kept as reasons.

    The sizes of the KV buffers are read from here because the C interface does not tell them.
    """

    def __init__(self) -> None:
        self.kv_bytes = 0
        self._errors: deque[str] = deque(maxlen=3)
        # ctypes frees a callback that nothing refers to, under llama.cpp's feet: the model keeps this object.
        self._callback = api.llama_log_callback(self._take)
        api.llama_log_set(self._callback, ctypes.c_void_p(0))

    def reasons(self) -> str:
        """The last errors in one line."""
        return "; ".join(self._errors) or "llama.cpp gave no reason"

    def _take(self, level: int, text: bytes | None, _user_data: object) -> None:
        line = (text or b"").decode("utf-8", "replace")
        if level == _LEVEL_INFO and (size := _KV_BUFFER.search(line)):
            self.kv_bytes += int(float(size[1]) * 1024 * 1024)
        if level in {_LEVEL_WARN, _LEVEL_ERROR}:
            sys.stderr.write(line)
        if level == _LEVEL_ERROR and line.strip():
            self._errors.append(line.strip())


def _load(path: Path, parameters: Any, pages: FilePages) -> Any:
    """Load a model while `pages` keeps what is not needed of its file out of this process."""
    pages.before_load()

    def on_progress(progress: float, _user_data: object) -> bool:
        pages.while_loading(progress)
        return True  # false would end the load

    callback = api.llama_progress_callback(on_progress)  # held here until the load is over
    parameters.progress_callback = callback
    handle = api.llama_model_load_from_file(os.fsencode(path), parameters)
    pages.after_load()
    if pages.failure is not None:
        # The model works all the same; it takes more memory than the settings ask for.
        sys.stderr.write(f"more of the model file stays in memory than asked for: {pages.failure}\n")
    return handle


class LlamaModel:
    """The weights and the vocabulary of one GGUF file. Reading methods may be called from any thread.

    Raises:
        ModelFileError: llama.cpp refuses the file.
    """

    def __init__(self, path: Path, spec: SliceSpec, log: LlamaLog) -> None:
        self._log = log
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = spec.gpu_layers
        parameters.load_mode = api.LLAMA_LOAD_MODE_MMAP if spec.mmap else api.LLAMA_LOAD_MODE_NONE
        parameters.lazy_mode = _LAZY_MODES[spec.lazy]
        parameters.use_extra_bufts = spec.repack
        # Without a map or without copies of the weights there is nothing to give back.
        release = spec.release_file and spec.mmap and spec.repack
        self.handle = _load(path, parameters, FilePages(path, release=release, lazy=spec.lazy == "on"))
        if not self.handle:
            raise ModelFileError(f"{path} cannot be loaded as a model: {log.reasons()}")
        self._vocabulary = api.llama_model_get_vocab(self.handle)
        self._pieces: dict[int, bytes] = {}
        self._shown: dict[int, bytes] = {}

    @property
    def trained_context(self) -> int:
        """Tokens of context the model was trained for."""
        return int(api.llama_model_n_ctx_train(self.handle))

    @property
    def sliding_window(self) -> int:
        """Tokens that sliding-window layers look back over; 0 if there are none."""
        return int(api.llama_model_n_swa(self.handle))

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens in the vocabulary."""
        return int(api.llama_vocab_n_tokens(self._vocabulary))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(api.llama_model_size(self.handle))

    @property
    def description(self) -> str:
        """Such as `llama 256M Q4_1`."""
        buffer = ctypes.create_string_buffer(256)
        api.llama_model_desc(self.handle, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    @property
    def chat_template(self) -> str | None:
        """The jinja2 source in the file's metadata (`tokenizer.chat_template`)."""
        source = api.llama_model_chat_template(self.handle, None)
        return source.decode("utf-8", "replace") if source else None

    @property
    def adds_bos(self) -> bool:
        """True when the model expects a beginning-of-sequence token in front of every text."""
        return bool(api.llama_vocab_get_add_bos(self._vocabulary))

    @property
    def bos_text(self) -> str:
        """Text of the beginning-of-sequence token; empty if the model has none."""
        return self._special_text(api.llama_vocab_bos(self._vocabulary))

    @property
    def eos_text(self) -> str:
        """Text of the end-of-sequence token; empty if the model has none."""
        return self._special_text(api.llama_vocab_eos(self._vocabulary))

    def tokenise(self, text: bytes) -> list[int]:
        """Token ids of `text`; special tokens in it are recognised, none is added."""
        size = len(text) + 8
        tokens = (api.llama_token * size)()
        count = api.llama_tokenize(self._vocabulary, text, len(text), tokens, size, False, True)
        if count < 0:
            # A normalising tokeniser can make more tokens than there are bytes; it says how many.
            tokens = (api.llama_token * -count)()
            count = api.llama_tokenize(self._vocabulary, text, len(text), tokens, -count, False, True)
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        """The bytes that `token` stands for in a prompt, special tokens spelt out."""
        return self._piece(self._pieces, token, special=True)

    def shown_piece(self, token: int) -> bytes:
        """The bytes of `token` in an answer: nothing for special tokens."""
        return self._piece(self._shown, token, special=False)

    def pieces(self) -> list[bytes]:
        """The bytes of every token of the vocabulary, control tokens spelt out."""
        # One buffer for all: with a quarter of a million tokens, making buffers takes most of the time.
        size = 1024
        buffer = ctypes.create_string_buffer(size)
        pieces: list[bytes] = []
        for token in range(self.vocabulary_size):
            length = api.llama_token_to_piece(self._vocabulary, token, buffer, size, 0, True)
            pieces.append(ctypes.string_at(buffer, length) if length >= 0 else self.piece(token))
        return pieces

    def is_end(self, token: int) -> bool:
        """True for tokens that end a generation."""
        return bool(api.llama_vocab_is_eog(self._vocabulary, token))

    def is_control(self, token: int) -> bool:
        """True for tokens that structure a prompt, such as the end of a turn."""
        return bool(api.llama_vocab_get_attr(self._vocabulary, token) & api.LLAMA_TOKEN_ATTR_CONTROL)

    def end_tokens(self) -> list[int]:
        """All tokens that end a generation, the vocabulary's own one first."""
        usual = api.llama_vocab_eot(self._vocabulary)
        if usual < 0:
            usual = api.llama_vocab_eos(self._vocabulary)
        others = (token for token in range(self.vocabulary_size) if self.is_end(token) and token != usual)
        return [usual, *others]

    def _special_text(self, token: int) -> str:
        return self.piece(token).decode("utf-8", "replace") if token >= 0 else ""

    def _piece(self, cache: dict[int, bytes], token: int, *, special: bool) -> bytes:
        known = cache.get(token)
        if known is not None:
            return known
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = api.llama_token_to_piece(self._vocabulary, token, buffer, size, 0, special)
            if length >= 0:
                cache[token] = buffer.raw[:length]
                return cache[token]
            size = -length


class LlamaSampler:
    """Draws the tokens of one generation; must be freed by `close`.

    The repetition penalty and greedy choice are computed here on the row of logits: llama.cpp's samplers
    copy the whole vocabulary into candidates first and look each of them up, which took 4 of the 83 ms of a
    step of sixteen sequences. Everything else is a chain of its samplers.
    """

    def __init__(self, sampling: Sampling, *, seed: int) -> None:
        self._penalty = sampling.repeat_penalty
        self._recent: deque[int] = deque(maxlen=_PENALTY_WINDOW)
        self._chain: Any = None
        if sampling.temperature <= 0.0:
            return
        self._chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        # The order of llama.cpp's own programs: cut the tail first, then scale by the temperature.
        self._add(api.llama_sampler_init_top_k(sampling.top_k))
        self._add(api.llama_sampler_init_top_p(sampling.top_p, 1))
        self._add(api.llama_sampler_init_min_p(sampling.min_p, 1))
        self._add(api.llama_sampler_init_temp(sampling.temperature))
        self._add(api.llama_sampler_init_dist(seed % _RANDOM_SEED))

    def accept(self, token: int) -> None:
        """Count a token for the repetition penalty."""
        self._recent.append(token)

    def draw(self, context: Any, index: int, logits: NDArray[np.float32]) -> int:
        """A token from `logits` (shape: vocabulary), which are row `index` of `context`; it is counted."""
        if self._penalty != 1.0 and self._recent:
            # As llama.cpp's penalties: once for each token, whichever sign its logit has.
            repeated = np.fromiter(set(self._recent), dtype=np.intp)
            values = logits[repeated]
            logits[repeated] = np.where(values > 0, values / self._penalty, values * self._penalty)
        if self._chain is None:
            token = int(logits.argmax())
        else:
            token = int(api.llama_sampler_sample(self._chain, context, index))
        self.accept(token)
        return token

    def close(self) -> None:
        """Free it. Idempotent."""
        if self._chain is not None:
            api.llama_sampler_free(self._chain)
            self._chain = None

    def _add(self, sampler: Any) -> None:
        api.llama_sampler_chain_add(self._chain, sampler)


class LlamaContext:
    """The KV cache and the compute buffers over a model; belongs to one thread.

    Raises:
        SliceUnavailable: there is not enough memory, or the settings do not go together.
    """

    def __init__(self, model: LlamaModel, spec: SliceSpec, log: LlamaLog) -> None:
        parameters = api.llama_context_default_params()
        parameters.n_ctx = spec.context * spec.slots
        parameters.n_seq_max = spec.slots
        parameters.n_batch = spec.batch
        parameters.n_ubatch = spec.batch
        # One row of logits per sequence is all that is ever read; a row for each token of a batch would
        # take half a gigabyte with Gemma's vocabulary.
        parameters.n_outputs_max = spec.slots
        parameters.n_threads = parameters.n_threads_batch = spec.threads or len(os.sched_getaffinity(0))
        parameters.flash_attn_type = _FLASH_ATTENTION[spec.flash_attention]
        parameters.type_k = parameters.type_v = _KV_TYPES[spec.kv_type]
        parameters.kv_unified = spec.kv_unified
        # Sliding-window layers keep their window only; a cut behind it means a new prefill (SlotTable).
        parameters.swa_full = False
        parameters.offload_kqv = spec.gpu_layers > 0
        parameters.no_perf = True
        self._model = model
        self._context = api.llama_init_from_model(model.handle, parameters)
        if not self._context:
            raise SliceUnavailable(
                f"slice {spec.name}: llama.cpp could not make a context of {spec.slots} x {spec.context} "
                f"tokens (KV {spec.kv_type}, flash attention {spec.flash_attention}); lower slots or "
                f"context: {log.reasons()}"
            )
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(spec.batch, 0, 1)

    @property
    def tokens_per_sequence(self) -> int:
        """Tokens that one sequence can hold."""
        return int(api.llama_n_ctx_seq(self._context))

    def decode(self, entries: Sequence[BatchEntry]) -> int:
        """Compute a batch; returns llama_decode's code.

        0 done; 1 no room in the KV cache (nothing changed); 2 or below -1: failed half-way, what was
        computed of the batch is still in the cache.
        """
        batch = self._batch
        index = 0
        for entry in entries:
            for offset, token in enumerate(entry.tokens):
                batch.token[index] = token
                batch.pos[index] = entry.position + offset
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = entry.slot
                batch.logits[index] = 0
                index += 1
            batch.logits[index - 1] = entry.wants_logits
        batch.n_tokens = index
        return int(api.llama_decode(self._context, batch))

    def sample(self, sampler: Sampler, index: int, constraint: Constraint | None) -> int:
        """Draw a token from the logits of batch position `index`, among those that `constraint` allows."""
        assert isinstance(sampler, LlamaSampler)
        pointer = api.llama_get_logits_ith(self._context, index)
        logits = np.ctypeslib.as_array(pointer, shape=(self._model.vocabulary_size,))
        if constraint is not None:
            constraint.mask(logits)
        return sampler.draw(self._context, index, logits)

    def new_sampler(self, sampling: Sampling, *, seed: int) -> LlamaSampler:
        """A sampler chain for one generation."""
        return LlamaSampler(sampling, seed=seed)

    def first_position(self, slot: int) -> int:
        """The first position that all layers still hold; -1 for an empty sequence."""
        return int(api.llama_memory_seq_pos_min(self._memory, slot))

    def remove(self, slot: int, start: int) -> bool:
        """Remove what `slot` holds from position `start` on; False if the cache cannot do that."""
        return bool(api.llama_memory_seq_rm(self._memory, slot, start, -1))

    def state_bytes(self, slot: int) -> int:
        """Size of what `save` would return."""
        return int(api.llama_state_seq_get_size(self._context, slot))

    def save(self, slot: int) -> bytearray:
        """The KV state of a sequence."""
        state = bytearray(self.state_bytes(slot))
        buffer = (ctypes.c_uint8 * len(state)).from_buffer(state)
        written = api.llama_state_seq_get_data(self._context, buffer, len(state), slot)
        assert written == len(state), "llama.cpp sized the state of a sequence wrong"
        return state

    def save_windows(self, slot: int) -> bytearray:
        """The sliding-window part of the KV state of a sequence."""
        flags = api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        windows = bytearray(api.llama_state_seq_get_size_ext(self._context, slot, flags))
        buffer = (ctypes.c_uint8 * len(windows)).from_buffer(windows)
        written = api.llama_state_seq_get_data_ext(self._context, buffer, len(windows), slot, flags)
        assert written == len(windows), "llama.cpp sized the windows of a sequence wrong"
        return windows

    def restore_windows(self, slot: int, windows: bytearray) -> bool:
        """Put saved windows back over those of now; False if that fails."""
        flags = api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        buffer = (ctypes.c_uint8 * len(windows)).from_buffer(windows)
        return bool(api.llama_state_seq_set_data_ext(self._context, buffer, len(windows), slot, flags) > 0)

    def restore(self, slot: int, state: bytearray) -> bool:
        """Put a saved state into an empty sequence; False if it does not fit."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer(state)
        return bool(api.llama_state_seq_set_data(self._context, buffer, len(state), slot) > 0)
