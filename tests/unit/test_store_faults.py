"""The SQLite store when things go wrong: no room, cancelled callers, broken statements, a killed process."""

from __future__ import annotations

import asyncio
import random
import resource
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from ash.domain.errors import StoreError, StoreFull
from ash.domain.events import (
    Custom,
    Draft,
    Event,
    Origin,
    StateSnapshot,
    TextMessageContent,
    TextMessageEnd,
    TextMessageStart,
)
from ash.store.connections import read_only_uri
from ash.store.log import SqliteEventStore
from ash.store.projection_tables import LatestChanges
from ash.store.queries import SqliteReader


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ash.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteEventStore]:
    made = SqliteEventStore(path, clock=lambda: 1_000)
    await made.open()
    yield made
    await made.close()


def blob(size: int) -> Draft:
    return Draft(Custom("test.blob", {"text": "x" * size}))


def snapshot() -> Draft:
    return Draft(StateSnapshot(snapshot={"title": "T", "owner": "ada"}))


async def pragma(store: SqliteEventStore, name: str, value: int | None = None) -> int:
    """Set and get a pragma on the writer's connection, past SQLAlchemy's transaction."""
    assert store._connection is not None
    driver: Any = (await store._connection.get_raw_connection()).driver_connection
    ((answer,),) = await driver.execute_fetchall(f"PRAGMA {name}" + ("" if value is None else f" = {value}"))
    return int(answer)


# -- no room ----------------------------------------------------------------------------------------


async def test_a_full_database_refuses_and_goes_on_when_there_is_room(store: SqliteEventStore) -> None:
    kept = await store.append("s", [snapshot()])
    pages = await pragma(store, "page_count")
    most = await pragma(store, "max_page_count")
    await pragma(store, "max_page_count", pages + 20)
    outcomes = await asyncio.gather(
        *(store.append("s", [blob(30_000), blob(30_000)]) for _ in range(10)), return_exceptions=True
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert refused
    assert all(isinstance(error, StoreFull) for error in refused)
    assert str(store.path) in str(refused[0])
    assert "free space" in str(refused[0])
    kept += [record for outcome in outcomes if not isinstance(outcome, BaseException) for record in outcome]
    assert await store.read("s") == kept
    await pragma(store, "max_page_count", most)
    kept += await store.append("s", [blob(30_000)])
    assert [record.seq for record in kept] == list(range(1, len(kept) + 1))
    assert await store.read("s") == kept
    await store.close()
    reopened = SqliteEventStore(store.path, clock=lambda: 1_000)
    await reopened.open()
    assert await reopened.read("s") == kept
    await reopened.close()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes of this process beyond `size` fail with EFBIG (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_file_size_limit_counts_as_no_room(store: SqliteEventStore, path: Path) -> None:
    kept = await store.append("s", [snapshot()])
    wal = path.with_name("ash.db-wal")
    with file_size_limit(wal.stat().st_size + 50_000):
        with pytest.raises(StoreFull, match=r"disk I/O error"):
            await store.append("s", [blob(200_000)])
        assert await store.read("s") == kept
    kept += await store.append("s", [blob(200_000)])
    assert await store.read("s") == kept


# -- callers ----------------------------------------------------------------------------------------


async def test_a_cancelled_caller_breaks_nothing(store: SqliteEventStore) -> None:
    await store.append("s", [snapshot()])
    calls = [asyncio.create_task(store.append("s", [blob(number), blob(number)])) for number in range(40)]
    for _ in range(3):
        await asyncio.sleep(0)  # some are in a commit by now, others wait
    for call in calls[::2]:
        call.cancel()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[::2])
    records = {record.seq: record for record in await store.read("s")}
    for outcome in outcomes[1::2]:
        assert not isinstance(outcome, BaseException)
        assert [records[record.seq] for record in outcome] == outcome
    assert list(records) == list(range(1, len(records) + 1))
    written = Counter(
        len(record.event.value["text"]) for record in records.values() if isinstance(record.event, Custom)
    )
    assert set(written.values()) == {2}  # each as a whole, and once
    assert set(range(1, 40, 2)) <= set(written)


async def test_a_cancelled_reader_breaks_nothing(store: SqliteEventStore) -> None:
    written = await store.append("s", [snapshot(), *(blob(100) for _ in range(500))])
    for steps in range(1, 12):
        reading = [asyncio.create_task(store.read("s")) for _ in range(4)]
        for _ in range(steps):
            await asyncio.sleep(0)  # one step further into the read each round
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
    assert await store.read("s") == written


async def test_of_a_group_only_the_one_at_fault_fails(
    store: SqliteEventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = LatestChanges.write

    async def failing(self: LatestChanges, connection: AsyncConnection) -> None:
        await write(self, connection)
        if any(key[1] == "bad" for key in self._by_key):
            raise RuntimeError("broken statement")

    monkeypatch.setattr(LatestChanges, "write", failing)
    outcomes = await asyncio.gather(
        *(store.append(name, [snapshot()]) for name in ("a", "bad", "b")), return_exceptions=True
    )
    assert isinstance(outcomes[1], StoreError)
    assert "RuntimeError: broken statement" in str(outcomes[1])
    assert [await store.head(name) for name in ("a", "bad", "b")] == [1, None, 1]
    monkeypatch.undo()
    (record,) = await store.append("bad", [snapshot()])
    assert record.seq == 1


async def test_projections_that_lag_behind_the_log_are_named_and_rebuilt(
    store: SqliteEventStore, path: Path
) -> None:
    await store.append("s", [snapshot(), blob(1)])
    await store.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DELETE FROM sessions")
        connection.commit()
    await store.open()
    with pytest.raises(StoreError, match="rebuild"):
        await store.append("s", [blob(2)])
    assert await store.rebuild() == 2
    (record,) = await store.append("s", [blob(2)])
    assert record.seq == 3


async def test_when_the_writer_is_stopped_from_outside_its_callers_hear_it(store: SqliteEventStore) -> None:
    assert store._writer is not None
    waiting = [asyncio.create_task(store.append("s", [blob(1)])) for _ in range(600)]
    await asyncio.sleep(0)
    store._writer._task.cancel()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, StoreError) for outcome in outcomes)
    assert await store.read("s") == []
    with pytest.raises(StoreError, match="closed"):
        await store.append("s", [blob(1)])


# -- the file ---------------------------------------------------------------------------------------


async def test_a_finished_message_takes_one_row(store: SqliteEventStore, path: Path) -> None:
    texts = [TextMessageContent("m", "word ") for _ in range(50)]
    drafts: list[Event] = [TextMessageStart("m", "assistant"), *texts, TextMessageEnd("m")]
    await store.append("s", [snapshot()])
    for draft in drafts:
        await store.append("s", [Draft(draft, "r1", Origin.USER)])
    assert len(await store.read("s")) == 53
    with closing(sqlite3.connect(read_only_uri(path), uri=True)) as connection:
        kinds = [kind for (kind,) in connection.execute("SELECT type FROM events ORDER BY seq")]
    assert kinds == ["STATE_SNAPSHOT", "TEXT_MESSAGE_START", "ash.compacted_text", "TEXT_MESSAGE_END"]


async def test_what_is_deleted_leaves_the_file(store: SqliteEventStore, path: Path) -> None:
    await store.append("s", [snapshot(), Draft(Custom("test.secret", {"text": "quicksilver"}))])
    await store.delete("s")
    await store.close()
    assert b"quicksilver" not in path.read_bytes()


async def test_close_leaves_one_file(store: SqliteEventStore, path: Path) -> None:
    await store.append("s", [snapshot()])
    await store.close()
    assert [entry.name for entry in path.parent.iterdir()] == ["ash.db"]


async def test_the_writer_is_durable_and_readers_cannot_write(store: SqliteEventStore) -> None:
    assert await pragma(store, "synchronous") == 2
    assert await pragma(store, "secure_delete") == 1
    async with store._connect("testing") as connection:
        for name, expected in (("query_only", 1), ("wal_autocheckpoint", 0), ("journal_mode", "wal")):
            assert (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar_one() == expected
    with pytest.raises(StoreError, match="readonly"):
        async with store._connect("testing") as connection:
            await connection.exec_driver_sql("DELETE FROM events")


# -- the process ------------------------------------------------------------------------------------

_APPENDS_FOREVER = """
import asyncio, sys
from pathlib import Path
from ash.domain.events import (
    Draft, Origin, StateSnapshot, TextMessageContent, TextMessageEnd, TextMessageStart
)
from ash.store.log import SqliteEventStore

async def talk(store, session_id):
    await store.append(session_id, [Draft(StateSnapshot(snapshot={"title": session_id, "owner": "ada"}))])
    number = 0
    while True:
        number += 1
        events = [TextMessageStart(f"m{number}", "assistant")]
        events += [TextMessageContent(f"m{number}", f"{number}.{part} ") for part in range(4)]
        events.append(TextMessageEnd(f"m{number}"))
        for event in events:
            (record,) = await store.append(session_id, [Draft(event, "r1", Origin.USER)])
            print(session_id, record.seq, flush=True)

async def main():
    store = SqliteEventStore(Path(sys.argv[1]), clock=lambda: 1000)
    await store.open()
    await asyncio.gather(*(talk(store, f"s{number}") for number in range(3)))

asyncio.run(main())
"""


@pytest.mark.parametrize("round_number", range(3))
async def test_what_was_acknowledged_survives_sigkill(path: Path, round_number: int) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _APPENDS_FOREVER, str(path), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    acknowledged: dict[str, int] = {}

    def take(line: bytes) -> None:
        # The last line may be cut off; nobody could have acted on it.
        if line.endswith(b"\n") and not line.startswith(b"2"):
            session_id, seq = line.decode().split()
            acknowledged[session_id] = int(seq)

    for _ in range(random.randint(20, 400)):  # a random moment is the point; any must do
        take(await process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    for line in (await process.stdout.read()).splitlines(keepends=True):
        take(line)
    await process.wait()
    assert acknowledged

    # A reader that comes before the next server sees it all, and leaves the WAL to the writer.
    wal = path.with_name("ash.db-wal")
    size = wal.stat().st_size
    async with SqliteReader(path) as reader:
        for session_id, seq in acknowledged.items():
            assert (await reader.head(session_id) or 0) >= seq
    assert wal.stat().st_size == size

    store = SqliteEventStore(path, clock=lambda: 1_000)
    await store.open()
    for session_id, seq in acknowledged.items():
        records = await store.read(session_id)
        assert [record.seq for record in records] == list(range(1, len(records) + 1))
        assert len(records) >= seq
        finished = [record for record in records if isinstance(record.event, TextMessageEnd)]
        rows = await store.messages(session_id)
        assert [row.seq for row in rows] == [record.seq for record in finished]
        assert all(row.text.split() == [f"{row.message_id[1:]}.{part}" for part in range(4)] for row in rows)
        (record,) = await store.append(session_id, [blob(1)])
        assert record.seq == len(records) + 1
    await store.close()
