"""The encoder's process dies, hangs, does not load: what its callers see."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ash.domain.errors import ConfigError, EncoderUnavailable
from ash.encoders.sentence import HEAD_CHARACTERS, TAIL_CHARACTERS, SentenceEncoder, cut


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What looks like a model until it is loaded."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "modules.json").write_text("[]")
    (model / "model.safetensors").write_bytes(b"weights")
    return model


@pytest.fixture
def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> type[_Faulty]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    _Faulty.folder = folder
    return _Faulty


class _Faulty(SentenceEncoder):
    folder: Path

    def __init__(self, **values: float) -> None:
        super().__init__(model=f"path:{self.folder}", worker="faulty_encoder", **values)  # type: ignore[arg-type]


@pytest.fixture
async def encoder(make: type[_Faulty]) -> AsyncIterator[_Faulty]:
    made = make()
    await made.open()
    yield made
    await made.close()


def length_of(vector: list[float]) -> float:
    return round(vector[0] / vector[1])


async def test_a_call_survives_one_death(encoder: _Faulty, tmp_path: Path) -> None:
    before = encoder.pid
    text = f"die-once {tmp_path / 'died'}"

    (vector,) = await encoder.encode([text])

    assert length_of(vector) == len(text)
    assert encoder.pid not in {None, before}


async def test_a_kill_from_outside_is_survived(encoder: _Faulty) -> None:
    assert encoder.pid is not None
    os.kill(encoder.pid, signal.SIGKILL)

    (vector,) = await encoder.encode(["four"])

    assert length_of(vector) == 4


async def test_a_text_that_always_kills_fails_alone(encoder: _Faulty) -> None:
    outcomes = await asyncio.gather(
        encoder.encode(["one"]), encoder.encode(["die"]), encoder.encode(["three"]), return_exceptions=True
    )

    assert isinstance(outcomes[1], EncoderUnavailable)
    assert "status 7" in str(outcomes[1])
    assert "out of luck" in str(outcomes[1])
    for outcome, length in ((outcomes[0], 3), (outcomes[2], 5)):
        assert isinstance(outcome, list)
        assert length_of(outcome[0]) == length
    assert len(await encoder.encode(["later"])) == 1


async def test_a_process_that_hangs_is_replaced(make: type[_Faulty]) -> None:
    encoder = make(batch_timeout_s=0.05)
    await encoder.open()
    with pytest.raises(EncoderUnavailable, match=r"within 0\.05 s"):
        await encoder.encode(["hang"])
    await encoder.close()


async def test_a_model_that_does_not_load_says_why_and_may_be_tried_again(
    make: type[_Faulty], folder: Path
) -> None:
    (folder / "broken").touch()
    encoder = make()
    with pytest.raises(EncoderUnavailable, match="the weights are broken"):
        await encoder.open()
    with pytest.raises(EncoderUnavailable, match="the weights are broken"):
        await encoder.encode(["a"])

    (folder / "broken").unlink()
    assert len(await encoder.encode(["a"])) == 1
    await encoder.close()


async def test_a_load_that_takes_too_long_is_ended(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "stuck_encoder.py").write_text("import sys, time\nwhile True: time.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    encoder = SentenceEncoder(model=f"path:{folder}", worker="stuck_encoder", load_timeout_s=0.05)
    with pytest.raises(EncoderUnavailable, match=r"did not load the model within 0\.05 s"):
        await encoder.open()
    await encoder.close()


async def test_closing_fails_the_calls_that_wait(make: type[_Faulty]) -> None:
    encoder = make()
    await encoder.open()
    waiting = asyncio.create_task(encoder.encode(["hang"]))
    await asyncio.sleep(0)  # the call reaches the encoder
    closing = asyncio.create_task(encoder.close())
    with pytest.raises(EncoderUnavailable, match="closed"):
        await waiting
    assert encoder.pid is not None
    os.kill(encoder.pid, signal.SIGKILL)
    await closing
    assert encoder.pid is None


async def test_a_closed_encoder_can_be_opened_again(encoder: _Faulty) -> None:
    await encoder.close()
    await encoder.open()
    assert len(await encoder.encode(["again"])) == 1


async def test_a_cancelled_call_leaves_the_others_alone(encoder: _Faulty) -> None:
    cancelled = asyncio.create_task(encoder.encode(["never"]))
    other = asyncio.create_task(encoder.encode(["four"]))
    await asyncio.sleep(0)  # both calls reach the encoder
    cancelled.cancel()

    assert length_of((await other)[0]) == 4
    with pytest.raises(asyncio.CancelledError):
        await cancelled


async def test_short_calls_do_not_wait_behind_a_long_one(encoder: _Faulty) -> None:
    order: list[str] = []

    async def call(name: str, count: int) -> None:
        vectors = await encoder.encode([name] * count)
        assert [length_of(vector) for vector in vectors] == [len(name)] * count
        order.append(name)

    await asyncio.gather(call("anchors", 1000), call("turn", 1))

    assert order == ["turn", "anchors"]


async def test_calls_that_wait_are_joined_into_one_batch(encoder: _Faulty, tmp_path: Path) -> None:
    log = tmp_path / "batches"
    first = asyncio.create_task(encoder.encode(["x"]))
    await asyncio.sleep(0)  # the first batch holds this call alone
    await asyncio.gather(
        first, *(encoder.encode([f"text {n}"]) for n in range(20)), encoder.encode([f"count {log}"])
    )

    # 22 calls in two batches: the one that counts is asked for once, beside all others of the second.
    assert log.read_text() == "batch\n"
    assert encoder._numbers == 2


def test_a_long_text_keeps_head_and_tail() -> None:
    text = "a" * 5000 + "b" * 5000

    assert cut(text) == "a" * HEAD_CHARACTERS + " ... " + "b" * TAIL_CHARACTERS
    assert cut("short") == "short"
    assert cut("half \ud800") == "half ?"


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ("package:no-such-package", "not installed"),
        ("package:msgspec", "0 files modules.json"),
        ("path:/nowhere", "holds no modules.json"),
        ("all-MiniLM-L6-v2", "write package:NAME or path:FOLDER"),
    ],
)
def test_a_model_that_is_not_there_is_named(reference: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        SentenceEncoder(model=reference)


def test_identity_follows_the_weights(folder: Path) -> None:
    encoder = SentenceEncoder(model=f"path:{folder}")
    before = encoder.identity

    (folder / "model.safetensors").write_bytes(b"other weights")

    assert encoder.identity != before
