"""What every encoder must do: the shipped fake, the real process, and the light one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from ash.domain.errors import EncoderUnavailable
from ash.domain.ports import Encoder
from ash.encoders.fake import HashEncoder
from ash.encoders.light import LightEncoder
from ash.encoders.sentence import SentenceEncoder
from tests.light_models import untuned_light_encoder

Make = Callable[[], Encoder]


@pytest.fixture(scope="module")
def light_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untuned_light_encoder(tmp_path_factory.mktemp("light"))


@pytest.fixture(
    params=[
        "hash",
        pytest.param("sentence", marks=pytest.mark.slices),
        pytest.param("light", marks=pytest.mark.slices),
    ]
)
def make(request: pytest.FixtureRequest) -> Make:
    if request.param == "light":
        folder = request.getfixturevalue("light_folder")
        return lambda: LightEncoder(folder)
    return HashEncoder if request.param == "hash" else SentenceEncoder


@pytest.fixture
async def encoder(make: Make) -> AsyncIterator[Encoder]:
    made = make()
    await made.open()
    yield made
    await made.close()


async def test_every_contract_of_encode(encoder: Encoder) -> None:
    # One test, because each loads the model anew.
    texts = [
        "good morning",
        "",
        "   \n",
        "a" * 100_000,
        "日本語 🎉",
        "\ud800 half a surrogate",
        "good morning",
    ]
    vectors = await encoder.encode(texts)

    assert [len(vector) for vector in vectors] == [encoder.dimensions] * len(texts)
    for vector in vectors:
        assert math.hypot(*vector) == pytest.approx(1.0, abs=1e-9)
    assert vectors[0] == pytest.approx(vectors[-1], abs=1e-5)
    assert vectors[0] != pytest.approx(vectors[4], abs=1e-2)

    assert await encoder.encode([]) == []
    (alone,) = await encoder.encode(["good morning"])
    assert alone == pytest.approx(vectors[0], abs=1e-5)

    many = await asyncio.gather(*(encoder.encode([f"text {n}", "good morning"]) for n in range(50)))
    assert all(second == pytest.approx(alone, abs=1e-5) for _, second in many)
    large = await encoder.encode([f"text {n % 50}" for n in range(100)])
    for n, vector in enumerate(large):
        assert vector == pytest.approx(many[n % 50][0], abs=1e-5)

    near, far = await encoder.encode(["good mornings", "quarterly revenue fell by 12%"])
    assert np.dot(alone, near) > np.dot(alone, far) + 0.2


async def test_identity_is_that_of_the_model(make: Make) -> None:
    first, second = make(), make()

    assert first.identity == second.identity
    assert "@" in first.identity


async def test_a_closed_encoder_is_unavailable(make: Make) -> None:
    encoder = make()
    with pytest.raises(EncoderUnavailable, match="open it first"):
        await encoder.encode(["too early"])
    await encoder.open()
    await encoder.open()
    assert len(await encoder.encode(["in time"])) == 1
    await encoder.close()
    await encoder.close()
    with pytest.raises(EncoderUnavailable, match="closed"):
        await encoder.encode(["too late"])
