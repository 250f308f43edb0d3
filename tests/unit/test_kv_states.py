"""KV states in RAM and on disk: found again, within their budgets, and never trusted when damaged."""

import errno
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ash.slices.worker import states as states_module
from ash.slices.worker.sequence import SequenceRecord, TokenSequence
from ash.slices.worker.state_files import SavedState, StateFolder, file_name
from ash.slices.worker.states import StateStore


def saved(text: str = "abc", size: int = 100) -> SavedState:
    tokens = list(text.encode())
    record = SequenceRecord(tokens, list(range(1, len(tokens) + 1)), text.encode(), len(tokens) - 1)
    return SavedState(record, bytearray(text.encode() * size)[:size])


def write(folder: StateFolder, session: str, state: SavedState) -> None:
    written = folder.write(session, state)
    assert written is not None
    folder.publish(session, written)


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path / "kv", 10_000)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StateStore]:
    store = StateStore(ram_bytes=250, folder=StateFolder(tmp_path / "kv", 10_000))
    yield store
    store.close(5.0)


def test_a_state_is_read_as_it_was_written_also_by_the_next_process(
    folder: StateFolder, tmp_path: Path
) -> None:
    write(folder, "s/../1", saved("hello"))
    for reader in (folder, StateFolder(tmp_path / "kv", 10_000)):
        assert reader.read("s/../1") == saved("hello")
        assert reader.read("s2") is None
        assert reader.count == 1
        assert reader.total_bytes == (tmp_path / "kv" / file_name("s/../1")).stat().st_size


@pytest.mark.parametrize("where", [0, 8, 12, 14, 40, -1])
def test_a_damaged_file_is_dropped(
    folder: StateFolder, tmp_path: Path, where: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "s", saved())
    path = tmp_path / "kv" / file_name("s")
    data = bytearray(path.read_bytes())
    data[where] ^= 0xFF
    path.write_bytes(data)
    assert folder.read("s") is None
    assert not path.exists()
    assert folder.count == 0
    assert "is dropped" in capsys.readouterr().err


def test_a_damaged_token_is_noticed_as_well(folder: StateFolder, tmp_path: Path) -> None:
    write(folder, "s", saved("hello"))
    path = tmp_path / "kv" / file_name("s")
    path.write_bytes(path.read_bytes().replace(b"hell", b"help"))
    assert folder.read("s") is None


def test_a_disk_that_became_read_only_costs_nothing_but_a_word(
    folder: StateFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "s", saved())
    write(folder, "t", saved())

    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert folder.read("s") == saved()
    folder.remove("t")
    assert folder.read("t") is None
    assert "Read-only" in capsys.readouterr().err


@pytest.mark.parametrize("left", [0, 5, 11, 20, 100])
def test_a_truncated_file_is_dropped(folder: StateFolder, tmp_path: Path, left: int) -> None:
    write(folder, "s", saved())
    path = tmp_path / "kv" / file_name("s")
    path.write_bytes(path.read_bytes()[:left])
    assert folder.read("s") is None
    assert not path.exists()


def test_a_file_of_another_session_is_not_believed(folder: StateFolder, tmp_path: Path) -> None:
    write(folder, "a", saved())
    write(folder, "b", saved())
    (tmp_path / "kv" / file_name("a")).replace(tmp_path / "kv" / file_name("b"))
    assert folder.read("b") is None


def test_the_budget_drops_what_was_used_least_recently(tmp_path: Path) -> None:
    write(StateFolder(tmp_path, 10_000), "a", saved())
    size = (tmp_path / file_name("a")).stat().st_size
    folder = StateFolder(tmp_path, 3 * size)
    for session in "abc":
        write(folder, session, saved())
    assert folder.read("a") is not None
    write(folder, "d", saved())
    write(folder, "e", saved())
    assert [session for session in "abcde" if folder.read(session)] == ["a", "d", "e"]
    assert folder.total_bytes <= 3 * size
    assert len(list(tmp_path.iterdir())) == 3


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "half.tmp").write_bytes(b"half")
    StateFolder(tmp_path, 1000)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_the_state_only_and_is_said_once(
    folder: StateFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel then refuses to write, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        assert folder.write("s", saved(size=5000)) is None
        assert folder.write("s", saved(size=5000)) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "kv").iterdir()) == []
    assert capsys.readouterr().err.count("cannot be written") == 1
    write(folder, "s", saved())
    assert folder.read("s") == saved()


def test_what_ram_has_no_room_for_is_on_disk(store: StateStore) -> None:
    for session in "abc":
        store.put(session, saved(session), keep=True)
    assert store.ram_bytes <= 3 * 100
    for session in "abc":
        assert store.take(session) == saved(session)
    assert store.take("d") is None


def test_a_state_saved_ahead_of_need_goes_to_the_disk_only(tmp_path: Path) -> None:
    store = StateStore(ram_bytes=1000, folder=StateFolder(tmp_path, 10_000))
    store.put("s", saved("first"), keep=False)
    store.put("s", saved("second"), keep=False)
    store.close(5.0)
    assert (store.ram_sessions, store.disk_sessions, store.unwritten_sessions) == (0, 1, 0)
    assert StateFolder(tmp_path, 10_000).read("s") == saved("second")


def test_a_state_that_is_on_disk_is_not_written_again(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, 10_000)
    written: list[str] = []
    publish = folder.publish
    folder.publish = lambda session, path: (written.append(session), publish(session, path))  # type: ignore[method-assign, assignment] # counts calls
    store = StateStore(ram_bytes=1000, folder=folder)
    store.put("s", saved(), keep=False)
    store.put("s", saved(), keep=True, is_saved=True)
    assert store.take("s") == saved()
    store.close(5.0)
    assert written == ["s"]


def test_a_slow_disk_bounds_what_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states_module, "_UNWRITTEN_BYTES", 250)
    folder = StateFolder(tmp_path, 10_000)
    go_on = threading.Event()
    write_now = folder.write
    folder.write = lambda session, state: go_on.wait(10) and write_now(session, state)  # type: ignore[method-assign, assignment, return-value] # waits
    store = StateStore(ram_bytes=0, folder=folder)
    for number in range(20):
        store.put(f"s{number}", saved(), keep=True)
    assert store.unwritten_sessions <= 3
    assert not store.accepts(100)
    go_on.set()
    assert store.accepts(100, wait=True)
    store.close(5.0)
    assert store.disk_sessions <= 3


def test_a_state_larger_than_the_queue_is_written_when_nothing_else_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states_module, "_UNWRITTEN_BYTES", 50)
    store = StateStore(ram_bytes=0, folder=StateFolder(tmp_path, 10_000))
    assert store.accepts(100)
    store.put("large", saved(), keep=False)
    store.close(5.0)
    assert store.disk_sessions == 1


def test_without_a_disk_the_oldest_are_lost(tmp_path: Path) -> None:
    store = StateStore(ram_bytes=250, folder=None)
    for session in "abc":
        store.put(session, saved(session), keep=True)
    assert [store.take(session) is not None for session in "abc"] == [False, True, True]
    assert store.ram_bytes == 0
    assert not store.accepts(1)
    store.close(0.0)


def test_a_forgotten_session_is_nowhere(store: StateStore, tmp_path: Path) -> None:
    store.put("s", saved("ram"), keep=True)
    store.forget("s")
    store.put("t", saved("disk"), keep=False)
    store.close(5.0)
    store.forget("t")
    assert store.take("s") is None
    assert store.take("t") is None
    assert list((tmp_path / "kv").iterdir()) == []


@pytest.mark.parametrize(
    "record",
    [
        SequenceRecord([1, 2], [1], b"ab", 0),
        SequenceRecord([1, 2], [1, 2], b"ab", 3),
        SequenceRecord([1, 2], [1, 2], b"a", 1),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(record: SequenceRecord) -> None:
    with pytest.raises(ValueError, match="record"):
        TokenSequence.of(record)


def test_a_record_is_a_copy() -> None:
    sequence = TokenSequence()
    sequence.append(7, b"x")
    record = sequence.record()
    sequence.append(8, b"y")
    assert record == SequenceRecord([7], [1], b"x", 0)
    assert TokenSequence.of(record).record() == record
