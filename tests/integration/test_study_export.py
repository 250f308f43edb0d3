"""`ash export`, `ash import` and `ash log --timeline` on a real database."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ash.cli.commands import app
from ash.domain.errors import AshError, DataFolderInUse, NotFound, StudyError
from ash.domain.events import Draft, Record
from ash.store.lock import DataFolderLock
from ash.store.log import SqliteEventStore
from ash.store.queries import SqliteReader
from ash.study.eval_log import write_eval
from ash.study.measures import session_measures
from ash.study.transcript import view
from tests.study_logs import LogBuilder, shifting_session

CONFIG = '[store]\npath = "data"\n[slices.nano]\ntier = "nano"\nmodel = "path:none.gguf"\n'


class World:
    """A data folder with two sessions, and the command line on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "config.toml").write_text(CONFIG)
        (folder / "data").mkdir()
        tools = LogBuilder("ses_2")
        tools.tool("c1", "search", '{"q": "x"}', "found")
        asyncio.run(self._store(shifting_session().records, tools.records))

    async def _store(self, *logs: list[Record]) -> None:
        now = 0
        store = SqliteEventStore(self.folder / "data" / "ash.db", clock=lambda: now)
        await store.open()
        for log in logs:
            for record in log:
                now = record.ts
                await store.append(record.session_id, [Draft(record.event, record.run_id, record.origin)])
        await store.close()

    def ash(self, *arguments: object) -> Result:
        """Run a command; what it raises on purpose comes back as it is."""
        line = [*map(str, arguments), "--config", str(self.folder / "config.toml")]
        result = CliRunner().invoke(app, line)
        if result.exception is not None and isinstance(result.exception, AshError):
            raise result.exception
        return result

    def records(self, session_id: str) -> list[Record]:
        """The log as the store has it."""

        async def read() -> list[Record]:
            async with SqliteReader(self.folder / "data" / "ash.db") as reader:
                return await reader.read(session_id)

        return asyncio.run(read())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize("name", ["csv", "markdown", "jsonl"])
def test_text_goes_to_standard_output_or_into_a_file(world: World, tmp_path: Path, name: str) -> None:
    shown = world.ash("export", "ses_1", "ses_2", "--format", name)
    assert shown.exit_code == 0
    assert "msg_4a" in shown.stdout
    target = tmp_path / "out.jsonl"
    assert world.ash("export", "ses_1", "ses_2", "--format", name, "--out", target).exit_code == 0
    assert target.read_bytes() == shown.stdout_bytes


def test_a_binary_format_needs_a_file(world: World) -> None:
    result = world.ash("export", "ses_1", "--format", "parquet")
    assert result.exit_code == 2
    assert "--out" in result.output


def test_a_file_that_exists_stays_and_force_overwrites_it(world: World, tmp_path: Path) -> None:
    target = tmp_path / "talk.md"
    target.write_text("old")
    with pytest.raises(StudyError, match="--force"):
        world.ash("export", "ses_1", "--format", "markdown", "--out", target)
    assert target.read_text() == "old"
    world.ash("export", "ses_1", "--format", "markdown", "--out", target, "--force")
    assert target.read_text().startswith("# A talk")


def test_an_unknown_session_is_named(world: World) -> None:
    with pytest.raises(NotFound, match="no session ses_9"):
        world.ash("export", "ses_1", "ses_9")


def test_redaction_and_its_names(world: World) -> None:
    shown = world.ash("export", "ses_1", "--format", "markdown", "--redact", "--name", "trie").stdout
    assert "ada" not in shown
    assert "A [name-2] stores keys" in shown
    assert world.ash("export", "ses_1", "--name", "trie").exit_code == 2


def test_an_export_comes_back_read_only_and_gives_the_same_measures(world: World, tmp_path: Path) -> None:
    target = tmp_path / "talk.jsonl"
    world.ash("export", "ses_1", "ses_2", "--out", target)
    with pytest.raises(StudyError, match="--as-new"):
        world.ash("import", target)
    shown = world.ash("import", target, "--as-new").stdout.split()
    names = [word.rstrip(":") for word in shown if word.startswith("ses_")]
    assert len(names) == 2
    for old, new in zip(("ses_1", "ses_2"), names, strict=True):
        before, after = view(old, world.records(old)), view(new, world.records(new))
        assert session_measures(after) == pytest.approx(session_measures(before), nan_ok=True)
        assert [message.message_id for message in after.messages] == [
            message.message_id for message in before.messages
        ]
        assert world.records(new)[0].event.snapshot["readOnly"] is True  # type: ignore[union-attr]  # the first event is a snapshot


def test_a_session_that_is_gone_comes_back_under_its_own_id(world: World, tmp_path: Path) -> None:
    target = tmp_path / "talk.jsonl"
    world.ash("export", "ses_1", "--out", target)
    before = world.records("ses_1")

    async def delete() -> None:
        store = SqliteEventStore(world.folder / "data" / "ash.db", clock=lambda: 0)
        await store.open()
        await store.delete("ses_1")
        await store.close()

    asyncio.run(delete())
    world.ash("import", target)
    after = world.records("ses_1")
    assert after[1:] == before[1:]


def test_an_import_beside_a_running_server_is_refused(world: World, tmp_path: Path) -> None:
    target = tmp_path / "talk.jsonl"
    world.ash("export", "ses_1", "--out", target)
    with DataFolderLock(world.folder / "data"), pytest.raises(DataFolderInUse):
        world.ash("import", target, "--as-new")


def test_a_store_that_fails_in_the_middle_keeps_no_part_of_a_session(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "talk.jsonl"
    world.ash("export", "ses_1", "--out", target)
    text = target.read_text().replace("ses_1", "ses_7")
    target.write_text(text)
    events = tmp_path / "talk.events.jsonl"
    events.write_text(events.read_text().replace("ses_1", "ses_7"))
    append, calls = SqliteEventStore.append, 0

    async def failing(self: SqliteEventStore, session_id: str, drafts: list[Draft]) -> list[Record]:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise StudyError("a fault on purpose")
        return await append(self, session_id, drafts)

    monkeypatch.setattr(SqliteEventStore, "append", failing)
    with pytest.raises(StudyError, match="on purpose"):
        world.ash("import", target)
    assert world.records("ses_7") == []


def test_a_missing_file_is_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"nothing\.jsonl cannot be read"):
        world.ash("import", tmp_path / "nothing.jsonl")


def test_the_timeline_of_a_stored_session_has_no_colour_in_a_pipe(world: World) -> None:
    shown = world.ash("log", "ses_1", "--timeline").stdout
    assert "AAA|CCC" in shown
    assert "\x1b" not in shown


# -- inspect -----------------------------------------------------------------------------------------------


def test_an_eval_file_opens_with_its_samples_messages_spans_and_scores(world: World, tmp_path: Path) -> None:
    inspect_log = pytest.importorskip("inspect_ai.log", reason="the extra `inspect` is not installed")
    target = tmp_path / "talk.eval"
    assert world.ash("export", "ses_1", "ses_2", "--format", "inspect", "--out", target).exit_code == 0
    log = inspect_log.read_eval_log(str(target))
    assert log.status == "success"
    first, second = log.samples
    assert [message.id for message in first.messages][:3] == ["persona:ses_1", "msg_1u", "msg_1a"]
    assert [(event.type, event.name) for event in first.events if event.event == "span_begin"] == [
        ("mode", "analytic"),
        ("mode", "creative country"),
    ]
    (shift,) = [event for event in first.events if event.event == "info"]
    assert shift.source == "ash.mode_shift"
    assert shift.data["onsetMessageId"] == "msg_4a"
    assert first.scores["shifts"].value == 1
    assert first.scores["share_creative"].value == 0.5
    begun = [event.id for event in first.events if event.event == "span_begin"]
    assert begun == [event.id for event in first.events if event.event == "span_end"]
    calls = [event for event in first.events if event.event == "model"]
    assert [event.output.completion for event in calls] == [
        message.text for message in view("ses_1", world.records("ses_1")).answers
    ]
    assert {event.span_id for event in calls} == set(begun)
    assert [event.function for event in second.events if event.event == "tool"] == ["search"]
    assert second.messages[-1].text == "found"


def test_an_empty_session_and_none_in_inspect(tmp_path: Path) -> None:
    inspect_log = pytest.importorskip("inspect_ai.log", reason="the extra `inspect` is not installed")
    target = tmp_path / "empty.eval"
    write_eval([view("ses_9", [])], target)
    (sample,) = inspect_log.read_eval_log(str(target)).samples
    assert (sample.id, sample.messages, sample.events) == ("ses_9", [], [])
    with pytest.raises(StudyError, match="no sessions"):
        write_eval([], target)


def test_the_name_of_an_eval_file_ends_in_eval(world: World, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"ends in \.eval"):
        world.ash("export", "ses_1", "--format", "inspect", "--out", tmp_path / "talk.zip")
