"""The light encoder: its graph against the reference implementation, its making, its faults."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the light encoder needs onnxruntime")
pytest.importorskip("onnx", reason="making a light encoder needs onnx")

import onnxruntime

from ash.domain.errors import ConfigError, EncoderUnavailable
from ash.encoders.bert_graph import BertShape, bert_model
from ash.encoders.light import GRAPH_FILE, MASK, TOKEN_IDS, TOKENIZER_FILE, VECTORS, LightEncoder
from ash.encoders.tokens import HEAD_TOKENS, TAIL_TOKENS, RequestTokens, padded
from ash.encoders.tuning import Epoch, Job, Tuning, light_folder, make_light_encoder
from tests.light_models import SMALL, small_model, small_weights

WORDS = ["add", "sum", "number", "sing", "song", "verse", "now", "please", "##s"]
SUMS = ["add number", "sum number now", "add sum please", "numbers sum", "sum sum"]
SONGS = ["sing song", "verse please", "sing verse now", "songs sing", "song song"]


def job(model: Path, epochs: int = 30) -> Job:
    epoch = Epoch(SUMS + SONGS, ["sums"] * len(SUMS) + ["songs"] * len(SONGS))
    tuning = Tuning(layers=2, learning_rate=3e-3, head_learning_rate=1e-2, batch=5, epochs=epochs)
    return Job(str(model), tuning, [epoch] * epochs)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"), WORDS)


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "light"
    asyncio.run(make_light_encoder(folder, job(model)))
    return folder


def test_the_graph_computes_what_the_reference_does() -> None:
    import torch
    from transformers import BertConfig, BertModel

    weights = small_weights(vocabulary=40)
    reference = BertModel(BertConfig(**SMALL, vocab_size=40), add_pooling_layer=False).eval()
    reference.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    tokens, mask = padded([[2, 7, 9, 30, 3], [2, 3], [2, 11, 12, 13, 14, 15, 16, 3]])
    with torch.no_grad():
        hidden = reference(torch.from_numpy(tokens), torch.from_numpy(mask)).last_hidden_state.numpy()
    expected = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)

    graph = bert_model(weights, BertShape(2, 4, 32, 1e-12))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run([VECTORS], {TOKEN_IDS: tokens, MASK: mask})

    np.testing.assert_allclose(found, expected, atol=1e-5)


async def test_tuning_brings_requests_of_one_label_together(made: Path) -> None:
    assert sorted(path.name for path in made.parent.iterdir()) == [made.name]
    assert {path.name for path in made.iterdir()} == {GRAPH_FILE, TOKENIZER_FILE}
    encoder = LightEncoder(made)
    await encoder.open()
    # Neither text is among the examples.
    sums, songs, asked = await encoder.encode(["number add now", "verse song now", "sum add"])
    assert np.dot(asked, sums) > np.dot(asked, songs) + 0.3
    await encoder.close()


async def test_making_it_again_leaves_what_is_there(model: Path, made: Path) -> None:
    before = (made / GRAPH_FILE).read_bytes()
    await make_light_encoder(made, job(model, epochs=1))
    assert (made / GRAPH_FILE).read_bytes() == before


async def test_a_job_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(EncoderUnavailable, match=r"status 1: .*tokenizer\.json.*; the encoder of a package"):
        await make_light_encoder(tmp_path / "light", job(tmp_path / "nowhere", epochs=1))
    assert list(tmp_path.iterdir()) == []


async def test_a_cancelled_job_leaves_nothing(model: Path, tmp_path: Path) -> None:
    making = asyncio.create_task(make_light_encoder(tmp_path / "light", job(model, epochs=1000)))
    # One turn of the loop, and the folder of the work is there.
    await asyncio.sleep(0)  # lets the task begin; no time passes
    assert len(list(tmp_path.iterdir())) == 1
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert list(tmp_path.iterdir()) == []


def test_the_folder_follows_everything_that_changes_the_encoder(tmp_path: Path) -> None:
    same = light_folder(tmp_path, "base", Tuning(), ["a", "b"])
    assert same == light_folder(tmp_path, "base", Tuning(), ["a", "b"])
    others = [
        light_folder(tmp_path, "other", Tuning(), ["a", "b"]),
        light_folder(tmp_path, "base", Tuning(layers=2), ["a", "b"]),
        light_folder(tmp_path, "base", Tuning(), ["a", "c"]),
    ]
    assert len({same, *others}) == 4


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"holds no {GRAPH_FILE}; make it with"):
        LightEncoder(tmp_path)


@pytest.mark.parametrize("name", [GRAPH_FILE, TOKENIZER_FILE])
async def test_a_damaged_model_is_unavailable(made: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "light"))
    (folder / name).write_bytes(b"damaged")
    encoder = LightEncoder(folder)
    with pytest.raises(EncoderUnavailable, match=r"cannot be loaded: [\s\S]*make it anew"):
        await encoder.open()
    with pytest.raises(EncoderUnavailable, match="open it first"):
        await encoder.encode(["too early"])


async def test_closing_ends_a_long_call(made: Path) -> None:
    encoder = LightEncoder(made)
    await encoder.open()
    long = asyncio.create_task(encoder.encode(["add number"] * 5000))
    await encoder.encode(["a short one passes"])
    await encoder.close()
    with pytest.raises(EncoderUnavailable, match="closed"):
        await long


def test_tokens_are_those_of_the_beginning_and_the_end(model: Path) -> None:
    tokens = RequestTokens(model / TOKENIZER_FILE)
    assert tokens.ids("") == [2, 3]
    assert tokens.ids("Add numbers") == [2, 4, 6, 12, 3]
    long = tokens.ids("add " * 100 + "sing " * 100)
    assert long == [2, *[4] * HEAD_TOKENS, *[7] * TAIL_TOKENS, 3]


def test_a_tokeniser_of_another_family_is_refused(tmp_path: Path) -> None:
    path = tmp_path / TOKENIZER_FILE
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"no tokenizer\.json of the tokenizers library"):
        RequestTokens(path)
