"""What every event store must do: the shipped fake and SQLite."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from ash.domain.errors import InvalidRequest, NotFound, StoreError
from ash.domain.events import (
    Cancelled,
    Custom,
    Draft,
    Event,
    InputValue,
    Interrupted,
    ModeValue,
    Origin,
    QueueValue,
    RouteValue,
    RunError,
    RunFinished,
    RunStarted,
    StateDelta,
    StateSnapshot,
    Success,
    TextMessageContent,
    TextMessageEnd,
    TextMessageStart,
    TokenUsage,
)
from ash.domain.ports import EventStore
from ash.domain.values import MessageRow, RunRow, SessionRow
from ash.store.log import SqliteEventStore
from ash.store.memory import MemoryEventStore


class Clock:
    """Milliseconds that the test sets."""

    def __init__(self) -> None:
        self.now = 1_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Callable[[], EventStore]:
    """Stores over the same data: a second one is what a restarted process would open."""
    memory = MemoryEventStore(clock=clock)
    if request.param == "memory":
        return lambda: memory
    return lambda: SqliteEventStore(tmp_path / "ash.db", clock=clock)


@pytest.fixture
async def store(make: Callable[[], EventStore]) -> AsyncIterator[EventStore]:
    made = make()
    await made.open()
    yield made
    await made.close()


def snapshot(**fields: Any) -> Draft:
    state: dict[str, Any] = {
        "title": "Talk",
        "owner": "ada",
        "persona": None,
        "pinnedSlice": None,
        "goals": {},
        "autonomy": None,
    }
    return Draft(StateSnapshot(snapshot={**state, **fields}))


def answer(message_id: str, *texts: str, run_id: str = "r1") -> list[Draft]:
    events: list[Event] = [TextMessageStart(message_id, "assistant")]
    events += [TextMessageContent(message_id, text) for text in texts]
    events.append(TextMessageEnd(message_id))
    return [Draft(event, run_id, Origin.USER) for event in events]


def asked(message_id: str, text: str, run_id: str, *, queued: bool = False) -> Draft:
    value = InputValue(message_id=message_id, text=text, principal="ada", run_id=run_id)
    return Draft(value.event(), None if queued else run_id, Origin.USER)


def started(run_id: str, message_id: str | None = None, origin: Origin = Origin.USER) -> Draft:
    metadata = None if message_id is None else {"messageId": message_id}
    return Draft(RunStarted("s", run_id, metadata=metadata), run_id, origin)


def finished(run_id: str) -> Draft:
    return Draft(RunFinished("s", run_id, Success()), run_id, Origin.USER)


def tick(number: int) -> Draft:
    return Draft(Custom("test.tick", {"number": number}))


async def everything(store: EventStore, session_id: str) -> tuple[object, ...]:
    return (
        await store.session(session_id),
        await store.runs(session_id),
        await store.messages(session_id),
        await store.read(session_id),
        await store.unfinished(),
    )


# -- the log -------------------------------------------------------------------------------------------


async def test_append_numbers_and_dates_the_drafts_and_read_gives_them_back(
    store: EventStore, clock: Clock
) -> None:
    first = await store.append("s", [snapshot(), tick(1)])
    clock.now = 2_000
    second = await store.append("s", [tick(2)])
    assert [(record.seq, record.ts) for record in first + second] == [(1, 1_000), (2, 1_000), (3, 2_000)]
    assert [record.event for record in first] == [snapshot().event, tick(1).event]
    assert await store.read("s") == first + second
    assert await store.head("s") == 3


async def test_time_never_runs_backwards_within_a_session(store: EventStore, clock: Clock) -> None:
    await store.append("s", [snapshot()])
    clock.now = 400
    (record,) = await store.append("s", [tick(1)])
    (other,) = await store.append("other", [snapshot()])
    assert (record.ts, other.ts) == (1_000, 400)


async def test_concurrent_appends_are_numbered_in_the_order_of_the_calls(store: EventStore) -> None:
    calls = [store.append(f"s{number % 3}", [tick(number), tick(number)]) for number in range(900)]
    results = await asyncio.gather(*calls)
    for session in range(3):
        records = [record for number in range(session, 900, 3) for record in results[number]]
        assert [record.seq for record in records] == list(range(1, 601))
        assert await store.read(f"s{session}") == records


async def test_an_empty_append_writes_nothing(store: EventStore) -> None:
    assert await store.append("s", []) == []
    assert await store.head("s") is None


async def test_an_unknown_session_is_empty(store: EventStore) -> None:
    assert await store.read("nobody") == []
    assert await everything(store, "nobody") == (None, [], [], [], [])
    assert await store.run("nobody", "r1") is None
    assert await store.search("word", session_id="nobody") == []


async def test_read_takes_a_start_and_a_limit(store: EventStore) -> None:
    records = await store.append("s", [snapshot(), *(tick(number) for number in range(9))])
    assert await store.read("s", 4) == records[4:]
    assert await store.read("s", 4, 2) == records[4:6]
    assert await store.read("s", 0, 0) == []
    assert await store.read("s", 10) == []


async def test_readers_cannot_tell_that_a_message_was_compacted(store: EventStore, clock: Clock) -> None:
    drafts = [snapshot(), *answer("m1", "Snow", "", " in ", "\N{SNOWMAN}\U0001f600é", "\x00."), tick(1)]
    records = []
    for draft in drafts:
        clock.now += 7
        records += await store.append("s", [draft])
    assert [record.event for record in records] == [draft.event for draft in drafts]
    for after_seq in range(len(records) + 1):
        for limit in (1, 2, 3, 100, None):
            expected = records[after_seq:][:limit]
            assert await store.read("s", after_seq, limit) == expected


async def test_messages_written_side_by_side_keep_their_order(store: EventStore) -> None:
    first, second = answer("a", "1", "2", "3"), answer("b", "x", "y", "z")
    drafts = [draft for pair in zip(first, second, strict=True) for draft in pair]
    records = await store.append("s", [snapshot(), *drafts])
    for after_seq in range(len(records) + 1):
        for limit in (1, 2, 5, None):
            assert await store.read("s", after_seq, limit) == records[after_seq:][:limit]


# -- what cannot be stored -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        Draft(Custom("test.bad", {"text": "\ud800"})),
        Draft(Custom("test.bad", {"object": object()})),
        Draft(TextMessageContent("m", None)),  # type: ignore[arg-type]  # a caller without a type checker
        Draft(Custom("test.bad", {}), run_id="\ud800"),
        Draft(Custom("ash.input", {"text": "no other fields"})),
        Draft(Custom("ash.route", {})),
        Draft(StateDelta(delta=[{"op": "replace", "path": "/title", "value": 7}])),
    ],
    ids=["surrogate", "object", "wrong type", "run id", "input", "route", "title"],
)
async def test_only_the_caller_with_a_bad_draft_fails(store: EventStore, bad: Draft) -> None:
    await store.append("s", [snapshot()])
    outcomes = await asyncio.gather(
        store.append("s", [tick(1)]),
        store.append("s", [tick(2), bad, tick(3)]),
        store.append("s", [tick(4)]),
        return_exceptions=True,
    )
    assert isinstance(outcomes[1], StoreError)
    assert "draft 2 of 3" in str(outcomes[1])
    records = await store.read("s", 1)
    assert [(record.seq, record.event) for record in records] == [(2, tick(1).event), (3, tick(4).event)]


# -- life ------------------------------------------------------------------------------------------------


async def test_a_store_that_is_not_open_refuses(make: Callable[[], EventStore]) -> None:
    store = make()
    for _ in range(2):
        for call in (
            lambda: store.append("s", [tick(1)]),
            lambda: store.append("s", []),
            lambda: store.read("s"),
            lambda: store.head("s"),
            store.sessions,
            store.unfinished,
            lambda: store.search("word", session_id="s"),
            lambda: store.fork("s", "t", 1),
            lambda: store.delete("s"),
            store.rebuild,
        ):
            with pytest.raises(StoreError, match="open"):
                await call()
        await store.open()
        await store.close()


async def test_close_commits_what_was_accepted(make: Callable[[], EventStore]) -> None:
    store = make()
    await store.open()
    accepted = [asyncio.create_task(store.append("s", [tick(number)])) for number in range(50)]
    await asyncio.sleep(0)  # lets every task call append
    await store.close()
    await asyncio.gather(*accepted)
    again = make()
    await again.open()
    assert await again.head("s") == 50
    await again.close()


async def test_a_restarted_process_goes_on_where_the_last_one_stopped(make: Callable[[], EventStore]) -> None:
    first = make()
    await first.open()
    whole = answer("m1", "one ", "two ", "three")
    await first.append("s", [snapshot(), started("r1"), asked("i2", "later", "r2", queued=True), *whole[:3]])
    await first.close()
    second = make()
    await second.open()
    await second.append("s", [*whole[3:], finished("r1"), started("r2"), finished("r2")])
    assert [row.text for row in await second.messages("s")] == ["later", "one two three"]
    assert [row.state for row in await second.runs("s")] == ["success", "success"]
    assert await second.unfinished() == []
    assert [record.event for record in await second.read("s", 3)] == [
        draft.event for draft in [*whole, finished("r1"), started("r2"), finished("r2")]
    ]
    await second.close()


# -- projections -----------------------------------------------------------------------------------------


async def test_one_turn_in_the_projections(store: EventStore, clock: Clock) -> None:
    await store.append("s", [snapshot(persona="A poet.", pinnedSlice="nano")])
    clock.now = 2_000
    route = RouteValue(
        slice="turbo",
        intent="poetry",
        probabilities={"poetry": 0.9},
        alternatives=[],
        switched=True,
        reason="harder",
        router_ms=1.5,
    )
    spoken = ModeValue(message_id="m1", probabilities={}, mode="creative", genre="poetry")
    heard = ModeValue(message_id="i1", probabilities={}, mode="analytic", genre=None, role="user")
    usage = [
        TokenUsage(input_tokens=10, output_tokens=4, cached_input_tokens=6),
        TokenUsage(input_tokens=5, output_tokens=1),
    ]
    await store.append(
        "s",
        [
            asked("i1", "A poem, please.", "r1"),
            started("r1", "i1"),
            Draft(route.event(), "r1", Origin.USER),
            *answer("m1", "Roses ", "are red."),
            Draft(spoken.event(), "r1", Origin.USER),
            Draft(heard.event(), "r1", Origin.USER),
        ],
    )
    running = await store.session("s")
    assert running is not None
    assert running.state == "running"
    assert await store.unfinished() == ["s"]
    clock.now = 3_000
    await store.append("s", [Draft(RunFinished("s", "r1", Success(), usage=usage), "r1", Origin.USER)])
    assert await store.session("s") == SessionRow(
        session_id="s",
        title="Talk",
        owner="ada",
        persona="A poet.",
        pinned_slice="nano",
        state="idle",
        mode="creative",
        slice="turbo",
        head_seq=11,
        created_at=1_000,
        updated_at=3_000,
    )
    run = RunRow(
        session_id="s",
        run_id="r1",
        origin="user",
        state="success",
        input_message_id="i1",
        slice="turbo",
        intent="poetry",
        error_code=None,
        started_seq=3,
        ended_seq=11,
        input_tokens=15,
        cached_tokens=6,
        output_tokens=5,
    )
    assert await store.runs("s") == [run]
    assert await store.run("s", "r1") == run
    rows = [
        MessageRow("s", "i1", "r1", "user", "A poem, please.", 2, 2_000),
        MessageRow("s", "m1", "r1", "assistant", "Roses are red.", 8, 2_000),
    ]
    assert await store.messages("s") == rows
    assert await store.messages("s", 2) == rows[1:]
    assert await store.unfinished() == []


@pytest.mark.parametrize(
    ("event", "state", "code"),
    [
        (RunFinished("s", "r1", Success()), "success", None),
        (RunFinished("s", "r1", Cancelled()), "cancelled", None),
        (RunFinished("s", "r1", Interrupted(interrupts=[])), "interrupt", None),
        (RunError("it broke", code="slice_error"), "error", "slice_error"),
    ],
)
async def test_how_runs_end(store: EventStore, event: Event, state: str, code: str | None) -> None:
    await store.append("s", [snapshot(), started("r1", origin=Origin.TICK), Draft(event, "r1", Origin.TICK)])
    run = await store.run("s", "r1")
    assert run is not None
    assert (run.origin, run.state, run.error_code, run.ended_seq) == ("tick", state, code, 3)
    assert (run.input_tokens, run.cached_tokens, run.output_tokens) == (None, None, None)


async def test_queued_input_waits_until_it_is_started_or_removed(store: EventStore) -> None:
    async def state() -> str:
        row = await store.session("s")
        assert row is not None
        return row.state

    await store.append("s", [snapshot(), asked("i1", "now", "r1"), started("r1", "i1")])
    await store.append("s", [asked("i2", "next", "r2", queued=True), asked("i3", "last", "r3", queued=True)])
    assert await state() == "running"
    await store.append("s", [finished("r1")])
    assert await state() == "queued"
    assert await store.unfinished() == ["s"]
    await store.append("s", [started("r2", "i2"), finished("r2")])
    assert await state() == "queued"
    await store.append("s", [Draft(QueueValue(queue=[], removed=["r3"]).event())])
    assert await state() == "idle"
    assert await store.unfinished() == []


async def test_state_deltas_change_the_session(store: EventStore) -> None:
    await store.append("s", [snapshot(persona="old", pinnedSlice="nano")])
    delta: list[dict[str, Any]] = [
        {"op": "replace", "path": "/title", "value": "New"},
        {"op": "add", "path": "/owner", "value": "grace"},
        {"op": "replace", "path": "/persona", "value": None},
        {"op": "remove", "path": "/pinnedSlice"},
        {"op": "add", "path": "/goals/g1", "value": {"text": "rest"}},
    ]
    await store.append("s", [Draft(StateDelta(delta=delta))])
    row = await store.session("s")
    assert row is not None
    assert (row.title, row.owner, row.persona, row.pinned_slice) == ("New", "grace", None, None)


async def test_events_of_things_that_are_not_open_change_no_rows(store: EventStore) -> None:
    await store.append(
        "s",
        [
            snapshot(),
            finished("never started"),
            Draft(RunError("x", code="y")),
            Draft(TextMessageContent("never started", "x")),
            Draft(TextMessageEnd("never started")),
        ],
    )
    assert await store.runs("s") == []
    assert await store.messages("s") == []
    assert len(await store.read("s")) == 5


async def test_rebuild_gives_the_same_rows(store: EventStore) -> None:
    await store.append("s", [snapshot(), asked("i1", "hello", "r1"), started("r1"), *answer("m1", "a", "b")])
    await store.append("t", [snapshot(title="Other"), asked("i2", "waits", "r2", queued=True)])
    before = [await everything(store, name) for name in ("s", "t")]
    assert await store.rebuild() == 9
    assert [await everything(store, name) for name in ("s", "t")] == before
    assert [match.message_id for match in await store.search("ab", session_id="s")] == ["m1"]
    (record,) = await store.append("s", [finished("r1")])
    assert record.seq == 8


# -- lists and search --------------------------------------------------------------------------------------


async def test_pages_of_sessions_are_complete_and_in_order(store: EventStore, clock: Clock) -> None:
    for number in range(7):
        clock.now = 1_000 + number // 3  # ties
        await store.append(f"s{number}", [snapshot(owner="ada" if number % 2 else "bob")])
    listed: list[str] = []
    cursor = None
    while True:
        page, cursor = await store.sessions(limit=2, cursor=cursor)
        listed += [row.session_id for row in page]
        if cursor is None:
            break
    assert listed == ["s6", "s3", "s4", "s5", "s0", "s1", "s2"]
    page, cursor = await store.sessions(owner="ada", limit=3)
    assert ([row.session_id for row in page], cursor) == (["s3", "s5", "s1"], None)


@pytest.mark.parametrize("cursor", ["", "nonsense", "bm9uc2Vuc2U=", "WzEsMl0=", "Wy0xLCJzIl0=", "\ud800"])
async def test_foreign_cursors_are_refused(store: EventStore, cursor: str) -> None:
    with pytest.raises(InvalidRequest, match="cursor"):
        await store.sessions(cursor=cursor)


async def test_a_page_holds_at_least_one_session(store: EventStore) -> None:
    with pytest.raises(InvalidRequest, match="at least one"):
        await store.sessions(limit=0)


async def test_search_finds_words_whatever_their_case_and_accents(store: EventStore) -> None:
    await store.append("s", [snapshot(), asked("i1", "The café is a state-of-the-art place", "r1")])
    await store.append("s", answer("m1", "An art ", "of the café: a state"))
    await store.append("other", [snapshot(), asked("i9", "café", "r9")])

    async def found(query: str) -> set[str]:
        return {match.message_id for match in await store.search(query, session_id="s")}

    assert await found("CAFE") == {"i1", "m1"}
    assert await found("cafe place") == {"i1"}
    assert await found("state-of-the-art") == {"i1"}
    assert await found("art, state!") == {"i1", "m1"}
    assert await found("caf") == set()
    (match,) = await store.search("place", session_id="s")
    assert (match.role, match.seq, match.session_id) == ("user", 2, "s")
    assert "[place]" in match.snippet
    assert len(await store.search("cafe", session_id="s", limit=1)) == 1
    assert await store.search("cafe", session_id="s", limit=0) == []


@pytest.mark.parametrize(
    "query",
    [
        "",
        " ",
        "...",
        '"',
        "'",
        "*",
        "(",
        "AND",
        "NEAR(",
        "text:",
        "a\x00b",
        '"unclosed',
        "-x",
        "\ud800",
        "^",
        "x " * 9_000,
    ],
)
async def test_any_text_is_a_valid_query(store: EventStore, query: str) -> None:
    await store.append("s", [snapshot(), asked("i1", "something else", "r1")])
    assert await store.search(query, session_id="s") == []


# -- fork and delete -----------------------------------------------------------------------------------------


async def test_a_fork_is_a_copy_up_to_its_seq(store: EventStore) -> None:
    await store.append(
        "s", [snapshot(), started("r1"), *answer("m1", "one ", "two ", "three"), finished("r1")]
    )
    original = await everything(store, "s")
    for at_seq in range(1, 9):
        new_id = f"fork at {at_seq}"
        assert await store.fork("s", new_id, at_seq) == at_seq
        copies = await store.read(new_id)
        assert [(record.seq, record.ts, record.event) for record in copies] == [
            (record.seq, record.ts, record.event) for record in (await store.read("s"))[:at_seq]
        ]
        assert {record.session_id for record in copies} == {new_id}
        row = await store.session(new_id)
        assert row is not None
        assert (row.head_seq, row.state) == (at_seq, "running" if 2 <= at_seq < 8 else "idle")
        assert len(await store.messages(new_id)) == (1 if at_seq >= 7 else 0)
    assert (await everything(store, "s"))[:4] == original[:4]


async def test_a_message_cut_by_a_fork_can_be_finished_there(store: EventStore) -> None:
    whole = answer("m1", "one ", "two ", "three")
    await store.append("s", [snapshot(), *whole])
    await store.fork("s", "t", 4)
    await store.append("t", [*answer("m1", "2", "3")[1:], *answer("m2", "x", "y")])
    assert [row.text for row in await store.messages("t")] == ["one two 23", "xy"]
    assert [row.text for row in await store.messages("s")] == ["one two three"]
    expected = [*whole[:3], *answer("m1", "2", "3")[1:], *answer("m2", "x", "y")]
    assert [record.event for record in await store.read("t", 1)] == [draft.event for draft in expected]
    assert [match.session_id for match in await store.search("23", session_id="t")] == ["t"]


async def test_what_cannot_be_forked(store: EventStore) -> None:
    await store.append("s", [snapshot()])
    with pytest.raises(NotFound):
        await store.fork("nobody", "t", 5)
    with pytest.raises(NotFound):
        await store.fork("s", "t", 0)
    assert await store.head("t") is None
    with pytest.raises(InvalidRequest, match="exists"):
        await store.fork("s", "s", 1)


async def test_delete_removes_everything_of_the_session_alone(store: EventStore) -> None:
    for name in ("s", "t"):
        await store.append(
            name, [snapshot(), asked("i1", "hello", "r1", queued=True), *answer("m1", "a", "b")]
        )
        await store.append(name, [Draft(TextMessageStart("m2", "assistant")), started("r2")])
    kept = (await everything(store, "t"))[:4]
    await store.delete("s")
    assert await everything(store, "s") == (None, [], [], [], ["t"])
    assert await store.search("hello", session_id="s") == []
    assert (await everything(store, "t"))[:4] == kept
    with pytest.raises(NotFound):
        await store.delete("s")


async def test_a_deleted_id_starts_anew(store: EventStore) -> None:
    await store.append("s", [snapshot(), started("r1"), *answer("m1", "a")[:2]])
    _, _, records = await asyncio.gather(
        store.append("s", [tick(1)]), store.delete("s"), store.append("s", [snapshot(title="Second")])
    )
    assert [record.seq for record in records] == [1]
    row = await store.session("s")
    assert row is not None
    assert (row.title, row.state, row.head_seq) == ("Second", "idle", 1)
