"""SQLite against the in-memory store, which keeps every record as it came: any history reads the same."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ash.domain.events import (
    Cancelled,
    Custom,
    Draft,
    Event,
    InputValue,
    Origin,
    QueueValue,
    RunError,
    RunFinished,
    RunStarted,
    StateSnapshot,
    TextMessageContent,
    TextMessageEnd,
    TextMessageStart,
    TokenUsage,
)
from ash.domain.ports import EventStore
from ash.store import log as log_module
from ash.store.log import SqliteEventStore
from ash.store.memory import MemoryEventStore

message_ids = st.sampled_from(["m1", "m2", "m3"])
run_ids = st.sampled_from(["r1", "r2"])
deltas = st.builds(TextMessageContent, message_ids, st.text(max_size=6))
events = st.one_of(
    # Weighted towards what is compacted.
    deltas,
    deltas,
    deltas,
    st.builds(TextMessageStart, message_ids, st.sampled_from(["assistant", "user"])),
    st.builds(TextMessageEnd, message_ids),
    st.builds(TextMessageEnd, message_ids),
    st.builds(RunStarted, st.just("s"), run_ids),
    st.builds(
        RunFinished,
        st.just("s"),
        run_ids,
        st.just(Cancelled()),
        usage=st.none()
        | st.lists(st.builds(TokenUsage, input_tokens=st.none() | st.integers(0, 9)), max_size=2),
    ),
    st.builds(RunError, st.just("broken"), code=st.just("internal")),
    st.builds(Custom, st.just("test.other"), st.dictionaries(st.text(max_size=2), st.integers(), max_size=1)),
    st.builds(
        lambda message_id, run_id: InputValue(message_id, "words", "ada", run_id).event(),
        message_ids,
        run_ids,
    ),
    st.builds(lambda run_id: QueueValue(queue=[], removed=[run_id]).event(), run_ids),
)
drafts = st.builds(Draft, events, st.none() | run_ids, st.none() | st.sampled_from(Origin))
wild_histories = st.lists(st.lists(drafts, max_size=12), min_size=1, max_size=6)


@st.composite
def side_by_side(draw: st.DrawFn) -> list[list[Draft]]:
    """Whole messages of one run, written at the same time, in groups of any size."""
    lanes: list[list[Event]] = [[Custom("test.other", {}) for _ in range(draw(st.integers(0, 4)))]]
    for message_id in ("m1", "m2", "m3"):
        texts = draw(st.lists(st.text(max_size=4), max_size=5))
        contents = [TextMessageContent(message_id, text) for text in texts]
        lanes.append([TextMessageStart(message_id, "assistant"), *contents, TextMessageEnd(message_id)])
    merged: list[list[Draft]] = [[]]
    while lanes := [lane for lane in lanes if lane]:
        lane = draw(st.sampled_from(lanes))
        merged[-1].append(Draft(lane.pop(0), "r1", Origin.USER))
        if draw(st.booleans()):
            merged.append([])
    return merged


histories = wild_histories | side_by_side()

examples = itertools.count()


class Clock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def stores(tmp_path: Path, clock: Clock) -> AsyncIterator[tuple[SqliteEventStore, MemoryEventStore]]:
    sqlite, memory = SqliteEventStore(tmp_path / "ash.db", clock=clock), MemoryEventStore(clock=clock)
    await sqlite.open()
    await memory.open()
    yield sqlite, memory
    await sqlite.close()
    await memory.close()


async def rows(store: EventStore, session_id: str) -> tuple[object, ...]:
    messages = await store.messages(session_id)
    return (
        await store.session(session_id),
        await store.runs(session_id),
        messages,
        await store.head(session_id),
    )


# One database serves all examples, each with sessions of its own: opening one costs more than the example.
shared_database = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)


@shared_database
@given(history=histories, forget=st.booleans(), cut=st.integers(1, 60), small_pages=st.integers(1, 5))
async def test_any_history_reads_the_same(
    stores: tuple[SqliteEventStore, MemoryEventStore],
    clock: Clock,
    history: list[list[Draft]],
    forget: bool,
    cut: int,
    small_pages: int,
) -> None:
    sqlite, memory = stores
    session_id = f"s{next(examples)}"
    first = Draft(StateSnapshot(snapshot={"title": "T", "owner": session_id}))
    for group in [[first], *history]:
        clock.now += len(group)
        assert await sqlite.append(session_id, group) == await memory.append(session_id, group)
        if forget:
            assert sqlite._writer is not None
            sqlite._writer._states.clear()  # as after a restart
    await compare(sqlite, memory, session_id)

    fork_id = f"{session_id}-fork"
    at_seq = min(cut, await memory.head(session_id) or 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_module, "REPLAY_EVENTS", small_pages)
        assert await sqlite.fork(session_id, fork_id, at_seq) == await memory.fork(
            session_id, fork_id, at_seq
        )
    await compare(sqlite, memory, fork_id)
    for group in history:
        assert await sqlite.append(fork_id, group) == await memory.append(fork_id, group)
    await compare(sqlite, memory, fork_id)

    for name in (session_id, fork_id):
        await sqlite.delete(name)
        await memory.delete(name)


async def compare(sqlite: SqliteEventStore, memory: MemoryEventStore, session_id: str) -> None:
    records = await memory.read(session_id)
    assert await sqlite.read(session_id) == records
    for after_seq in range(0, len(records), 3):
        for limit in (1, 2, 7):
            assert await sqlite.read(session_id, after_seq, limit) == records[after_seq:][:limit]
    live = await rows(sqlite, session_id)
    assert live == await rows(memory, session_id)
    assert await sqlite.unfinished() == await memory.unfinished()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_module, "REPLAY_EVENTS", 3)
        assert await sqlite.rebuild() == await memory.rebuild()
    assert await rows(sqlite, session_id) == live


# Letters that both know: SQLite 3.40 carries the tables of an older Unicode than Python.
written = st.text("abAB éÉß-_'\".,\x00\n12ё", max_size=24)


@shared_database
@given(texts=st.lists(written, min_size=1, max_size=4), query=written)
async def test_search_finds_the_same_messages(
    stores: tuple[SqliteEventStore, MemoryEventStore], texts: list[str], query: str
) -> None:
    sqlite, memory = stores
    session_id = f"s{next(examples)}"
    inputs = [
        Draft(InputValue(f"m{number}", text, "ada", "r1").event(), "r1") for number, text in enumerate(texts)
    ]
    found = []
    for store in (sqlite, memory):
        await store.append(session_id, inputs)
        matches = await store.search(query, session_id=session_id)
        assert all("[" in match.snippet and "]" in match.snippet for match in matches)
        found.append({match.message_id for match in matches})
    assert found[0] == found[1]
    own = {match.message_id for match in await sqlite.search(texts[0], session_id=session_id)}
    assert "m0" in own or not any(character.isalnum() for character in texts[0])
