"""Fetching models, against a stand-in for the Hub: good downloads, broken ones, and everything refused."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from huggingface_hub import close_session, constants

from ash.config import load
from ash.domain.errors import ModelFileError
from ash.slices import models
from ash.slices.models import HubReference, locate_model
from ash.slices.pull import HubCache, HubFile, Pulled
from tests.gguf_files import GOOD, gguf, large, tensor, text_key
from tests.integration.hub_stand_in import COMMIT, TOKEN, StandInHub, serving, sha256

BODY = large(5_000_000)
FILE = "model-q4_0.gguf"
REFERENCE = HubReference("org/model", FILE)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tokens and settings of whoever runs the tests."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest_asyncio.fixture
async def hub() -> AsyncIterator[StandInHub]:
    async with serving(StandInHub({FILE: BODY, "other-q8_0.gguf": GOOD, "README.md": b"text"})) as hub:
        yield hub
    # Its connections would be found open by whatever test comes next.
    close_session()


class Steps:
    """Progress, noted."""

    def __init__(self) -> None:
        self.noted: list[tuple[str, int]] = []

    def __call__(self, file: HubFile, present: int) -> None:
        self.noted.append((file.name, present))


async def pull(
    hub: StandInHub,
    folder: Path,
    reference: HubReference = REFERENCE,
    *,
    digest: str | None = None,
    steps: Steps | None = None,
) -> Pulled:
    cache = HubCache(folder, endpoint=hub.endpoint, retry_wait_s=0)
    offer = await asyncio.to_thread(cache.look_up, reference, sha256=digest)
    return await asyncio.to_thread(cache.download, offer, progress=steps or Steps(), sha256=digest)


def partial(folder: Path, digest: str = sha256(BODY)) -> Path:
    return folder / "models--org--model" / "blobs" / f"{digest}.incomplete"


async def test_a_file_comes_into_the_cache(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps()
    pulled = await pull(hub, tmp_path, steps=steps)
    assert pulled.path.read_bytes() == BODY
    assert pulled.sha256 == sha256(BODY)
    assert pulled.verified
    amounts = [present for _, present in steps.noted]
    assert amounts == sorted(amounts)
    assert (amounts[0], amounts[-1]) == (0, len(BODY))
    assert len(amounts) > 3
    # A slice finds it there, by branch and by commit.
    look_up = models.try_to_load_from_cache
    monkeypatch.setattr(
        models,
        "try_to_load_from_cache",
        lambda repository, file, revision: look_up(repository, file, cache_dir=tmp_path, revision=revision),
    )
    for reference in (f"hf:org/model/{FILE}", f"hf:org/model@{COMMIT}/{FILE}"):
        assert locate_model(reference, cache_folder=tmp_path).samefile(pulled.path)
    with pytest.raises(ModelFileError, match=f"ash slices pull hf:org/model@v1/{FILE}"):
        locate_model(f"hf:org/model@v1/{FILE}", cache_folder=tmp_path)
    # And a second pull downloads nothing.
    hub.ranges.clear()
    assert await pull(hub, tmp_path) == pulled
    assert hub.ranges == []


async def test_what_an_offer_says(hub: StandInHub, tmp_path: Path) -> None:
    hub.card = {"license": "other", "license_name": "gemma\x1b[2J", "license_link": "https://licence.example"}
    offer = HubCache(tmp_path, endpoint=hub.endpoint).look_up
    said = await asyncio.to_thread(offer, REFERENCE)
    assert said.licence == "gemma[2J"  # without what would control a terminal
    assert said.licence_url == "https://licence.example"
    assert said.commit == COMMIT
    assert said.missing_bytes == len(BODY)
    assert not said.gated
    assert list(tmp_path.iterdir()) == []
    hub.card, hub.tags = {}, ["gguf", "license:mit"]
    assert (await asyncio.to_thread(offer, REFERENCE)).licence == "mit"
    hub.tags = []
    assert (await asyncio.to_thread(offer, REFERENCE)).licence is None


async def test_a_connection_that_breaks_is_continued(hub: StandInHub, tmp_path: Path) -> None:
    hub.cut_after = [1_500_000, 0, 1_000_000]
    assert (await pull(hub, tmp_path)).path.read_bytes() == BODY
    first, *rest = hub.ranges
    assert first is None
    assert len(rest) == 3
    assert all(header is not None and header.startswith("bytes=") for header in rest)


async def test_a_connection_that_breaks_again_and_again(hub: StandInHub, tmp_path: Path) -> None:
    hub.cut_after = [2_000_000, *[0] * 6]
    with pytest.raises(ModelFileError, match=r"cannot be reached .* goes on where it stopped"):
        await pull(hub, tmp_path)
    kept = partial(tmp_path).read_bytes()
    assert kept
    assert kept == BODY[: len(kept)]
    # The next call goes on.
    hub.cut_after, hub.ranges = [], []
    steps = Steps()
    assert (await pull(hub, tmp_path, steps=steps)).path.read_bytes() == BODY
    assert hub.ranges == [f"bytes={len(kept)}-"]
    assert steps.noted[0] == (FILE, len(kept))
    assert not partial(tmp_path).exists()


async def test_a_server_that_does_not_continue_sends_all_again(hub: StandInHub, tmp_path: Path) -> None:
    hub.ignores_range = True
    hub.cut_after = [3_000_000]
    steps = Steps()
    assert (await pull(hub, tmp_path, steps=steps)).path.read_bytes() == BODY
    amounts = [present for _, present in steps.noted]
    assert amounts != sorted(amounts)


async def test_errors_of_the_server_are_tried_again(hub: StandInHub, tmp_path: Path) -> None:
    hub.fails = 3
    assert (await pull(hub, tmp_path)).path.read_bytes() == BODY
    hub.files[FILE] = BODY[:-4] + b"anew"
    hub.fails = 100
    with pytest.raises(ModelFileError, match="answered with HTTP 500; run this again later"):
        await pull(hub, tmp_path)


@pytest.mark.parametrize("size", [len(BODY), len(BODY) + 10])
async def test_a_damaged_partial_file_is_found_out(hub: StandInHub, tmp_path: Path, size: int) -> None:
    partial(tmp_path).parent.mkdir(parents=True)
    partial(tmp_path).write_bytes(b"x" * size)
    if size > len(BODY):
        # It cannot be a part of this file: from the beginning.
        assert (await pull(hub, tmp_path)).path.read_bytes() == BODY
        return
    with pytest.raises(ModelFileError, match=f"instead of {sha256(BODY)}; it was removed"):
        await pull(hub, tmp_path)
    assert (await pull(hub, tmp_path)).path.read_bytes() == BODY


async def test_wrong_content_is_removed(hub: StandInHub, tmp_path: Path) -> None:
    hub.stated[FILE] = "a" * 64
    with pytest.raises(ModelFileError, match=f"{FILE} has sha256 {sha256(BODY)} instead of {'a' * 64}"):
        await pull(hub, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_a_file_that_changed_in_the_cache_is_removed(hub: StandInHub, tmp_path: Path) -> None:
    path = (await pull(hub, tmp_path)).path
    blob = path.resolve()
    blob.write_bytes(BODY[::-1])
    with pytest.raises(ModelFileError, match="removed from the cache"):
        await pull(hub, tmp_path)
    assert not blob.exists()
    assert (await pull(hub, tmp_path)).path.read_bytes() == BODY


async def test_more_than_was_announced_is_not_written(hub: StandInHub, tmp_path: Path) -> None:
    hub.extra = b"more" * 1_000_000
    hub.stated[FILE] = sha256(BODY)
    with pytest.raises(ModelFileError, match=f"more than the {len(BODY)} bytes"):
        await pull(hub, tmp_path)
    assert partial(tmp_path).stat().st_size == 0


async def test_a_given_digest(hub: StandInHub, tmp_path: Path) -> None:
    assert (await pull(hub, tmp_path, digest=sha256(BODY).upper())).verified
    with pytest.raises(ModelFileError, match="nothing was downloaded"):
        await pull(hub, tmp_path, digest="b" * 64)
    with pytest.raises(ModelFileError, match="no sha256 digest"):
        await pull(hub, tmp_path, digest="b" * 63)
    # Outside of LFS the Hub states none.
    hub.stated["other-q8_0.gguf"] = None
    other = HubReference("org/model", "other-q8_0.gguf")
    assert not (await pull(hub, tmp_path, other)).verified
    assert (await pull(hub, tmp_path, other, digest=sha256(GOOD))).verified
    with pytest.raises(ModelFileError, match=f"instead of {'b' * 64}"):
        await pull(hub, tmp_path, other, digest="b" * 64)


async def test_all_parts_of_a_split_model_come(hub: StandInHub, tmp_path: Path) -> None:
    parts = {f"Q8/m-0000{number}-of-00003.gguf": GOOD + bytes([number]) for number in (1, 2, 3)}
    hub.files.update(parts)
    pulled = await pull(hub, tmp_path, HubReference("org/model", "Q8/m-00002-of-00003.gguf"))
    assert pulled.path.name == "m-00001-of-00003.gguf"
    assert {path.name: path.read_bytes() for path in pulled.path.parent.iterdir()} == {
        Path(name).name: body for name, body in parts.items()
    }
    assert locate_model(f"path:{pulled.path}", cache_folder=tmp_path) == pulled.path
    del hub.files["Q8/m-00003-of-00003.gguf"]
    with pytest.raises(ModelFileError, match=r"there is no Q8/m-00003-of-00003\.gguf"):
        await pull(hub, tmp_path, HubReference("org/model", "Q8/m-00001-of-00003.gguf"))
    (pulled.path.parent / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(ModelFileError, match=r"m-00002-of-00003\.gguf is not beside it"):
        locate_model(f"path:{pulled.path}", cache_folder=tmp_path)


async def test_what_is_no_model_file_is_named(hub: StandInHub, tmp_path: Path) -> None:
    hub.files["odd.gguf"] = b"<html>"
    with pytest.raises(ModelFileError, match="is not a GGUF file"):
        await pull(hub, tmp_path, HubReference("org/model", "odd.gguf"))


async def test_a_missing_file_lists_those_there_are(hub: StandInHub, tmp_path: Path) -> None:
    hub.files["\x1b[31mred.gguf"] = b"x"
    with pytest.raises(ModelFileError) as caught:
        await pull(hub, tmp_path, HubReference("org/model", "absent.gguf"))
    assert str(caught.value).splitlines() == [
        "there is no absent.gguf in org/model; its GGUF files are:",
        "  [31mred.gguf (0 MB)",
        f"  {FILE} (5 MB)",
        "  other-q8_0.gguf (0 MB)",
    ]
    hub.files = {}
    with pytest.raises(ModelFileError, match="it has no GGUF files"):
        await pull(hub, tmp_path)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (HubReference("org/absent", FILE), "there is no repository org/absent .* HF_TOKEN"),
        (HubReference("org/model", FILE, "v9"), "org/model has no revision 'v9'"),
        (HubReference("o rg/mo del", FILE), "no name of a repository"),
    ],
)
async def test_what_does_not_exist(
    hub: StandInHub, tmp_path: Path, reference: HubReference, reason: str
) -> None:
    with pytest.raises(ModelFileError, match=reason):
        await pull(hub, tmp_path, reference)


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", COMMIT])
async def test_a_revision_is_part_of_the_reference(hub: StandInHub, tmp_path: Path, revision: str) -> None:
    reference = HubReference("org/model", FILE, revision)
    assert HubReference.parse(str(reference).removeprefix("hf:")) == reference
    path = (await pull(hub, tmp_path, reference)).path
    found = models.try_to_load_from_cache("org/model", FILE, cache_dir=tmp_path, revision=revision)
    assert found == str(path)


async def test_a_gated_repository(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated = True
    with pytest.raises(ModelFileError, match=r"is gated: sign in at .*/org/model and accept .* HF_TOKEN"):
        await pull(hub, tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.tokens.clear()
    assert (await pull(hub, tmp_path)).path.read_bytes() == BODY
    # The token is for the Hub alone.
    assert dict(hub.tokens) == {
        "api": f"Bearer {TOKEN}",
        "resolve": f"Bearer {TOKEN}",
        "cdn": None,
    }


@pytest.mark.parametrize(
    ("status", "reason"), [(500, "HTTP 500; run this again later"), (403, "check HF_TOKEN")]
)
async def test_a_hub_that_refuses(hub: StandInHub, tmp_path: Path, status: int, reason: str) -> None:
    hub.api_status = status
    with pytest.raises(ModelFileError, match=reason):
        await pull(hub, tmp_path)


@pytest.mark.parametrize(
    "body", ["<html>Sign in to the network</html>", "{}", "[]", '{"id": 3, "siblings": 4}']
)
async def test_an_answer_that_is_none_of_a_hub(hub: StandInHub, tmp_path: Path, body: str) -> None:
    hub.api_body = body
    with pytest.raises(ModelFileError, match="is HF_ENDPOINT right"):
        await pull(hub, tmp_path)


async def test_nobody_at_the_address(tmp_path: Path) -> None:
    hub = StandInHub()
    async with serving(hub):
        pass
    with pytest.raises(ModelFileError, match=r"http://127.0.0.1:\d+ cannot be reached .* check the network"):
        await pull(hub, tmp_path)


async def test_offline_mode(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelFileError, match="HF_HUB_OFFLINE is set; unset it"):
        await pull(hub, tmp_path)


async def test_a_disk_without_room(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "not" / "yet"
    usage = shutil.disk_usage(tmp_path)._replace(free=200_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ModelFileError, match=r"yet has 200 MB free; 5 MB are to come, .* HF_HOME"):
        await pull(hub, folder)
    assert hub.ranges == []


async def test_a_cache_that_cannot_be_written(hub: StandInHub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelFileError, match="cannot be written: Not a directory"):
        await pull(hub, tmp_path / "file")


async def test_two_at_once(hub: StandInHub, tmp_path: Path) -> None:
    hub.stall_after = 1_000_000
    first = asyncio.create_task(pull(hub, tmp_path))
    await hub.stalled.wait()
    with pytest.raises(ModelFileError, match=f"another process downloads {FILE}"):
        await pull(hub, tmp_path)
    hub.go_on.set()
    assert (await first).path.read_bytes() == BODY


async def ash(hub: StandInHub, home: Path, *arguments: str) -> asyncio.subprocess.Process:
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "COLUMNS": "200"}
    environment.pop("HF_HUB_OFFLINE", None)
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ash", "slices", "pull", *arguments),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def said(process: asyncio.subprocess.Process) -> str:
    output, _ = await process.communicate()
    return output.decode()


async def test_the_command_killed_and_run_again(hub: StandInHub, tmp_path: Path) -> None:
    base = gguf(
        [tensor("weight", (3_000_000,), 24, 0)], 3_000_000, keys=[text_key("general.architecture", "llama")]
    )
    hub.files["Base Model-Q4.gguf"] = base
    hub.stall_after = 2_000_000
    process = await ash(hub, tmp_path, "hf:org/model/Base Model-Q4.gguf", "--yes")
    await hub.stalled.wait()
    present = partial(tmp_path / "hub", sha256(base))
    while not present.exists() or present.stat().st_size == 0:  # noqa: ASYNC110 - what was sent has to arrive
        await asyncio.sleep(0)  # the child writes meanwhile
    process.kill()
    assert "Traceback" not in await said(process)
    kept = present.stat().st_size
    assert 0 < kept <= 2_000_000
    hub.stall_after, hub.ranges = None, []
    process = await ash(hub, tmp_path, "hf:org/model/Base Model-Q4.gguf", "--yes")
    output = await said(process)
    assert process.returncode == 0, output
    assert hub.ranges == [f"bytes={kept}-"]
    assert "licence apache-2.0" in output
    assert output.index("licence") < output.index("sha256")
    # What is shown can be pasted, once the tier is chosen.
    table = output[output.index("[slices.") :]
    (tmp_path / "config.toml").write_text(table.replace('tier = ""', 'tier = "nano"'))
    settings = load(tmp_path / "config.toml", {})
    spec = settings.slices["base_model_q4"]
    assert spec.model == "hf:org/model/Base Model-Q4.gguf"
    assert spec.sha256 == sha256(base)
    assert spec.template == "completion"
    assert spec.context == 4096


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((f"hf:org/model/{FILE}",), "Aborted"),
        (
            ("hf:org/model/absent.gguf", "--yes"),
            "ash: there is no absent.gguf in org/model; its GGUF files are:",
        ),
        (("org/model", "--yes"), "ash: 'org/model' cannot be fetched; write hf:ORG/REPO/FILE.gguf"),
        ((f"hf:org/model@v1/{FILE}", "--revision", "v2"), "leave out --revision"),
    ],
)
async def test_what_the_command_says_of_errors(
    hub: StandInHub, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    process = await ash(hub, tmp_path, *arguments)
    output = await said(process)
    assert reason in output
    assert "Traceback" not in output
    assert process.returncode == 1
    assert hub.ranges == []
