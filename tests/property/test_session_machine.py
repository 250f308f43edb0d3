"""The session's state machine against random lives: inputs, turns, cancels, crashes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ash.domain.errors import Busy, NotFound
from ash.domain.events import (
    TERMINAL,
    Cancelled,
    Custom,
    Draft,
    Event,
    InputValue,
    Record,
    RunError,
    RunFinished,
    RunStarted,
    StepFinished,
    StepStarted,
    Success,
    TextMessageContent,
    TextMessageEnd,
    TextMessageStart,
    ToolCallResult,
    ToolCallStart,
)
from ash.session.session import RESUME_LIMIT, Receipt, Session, created

QUEUE_LIMIT = 4


def facts(session: Session) -> dict[str, object]:
    active = session.active
    return {
        "state": session.state,
        "queue": session.queue,
        "active": None
        if active is None
        else (active.run_id, active.message_id, active.steps, active.resumes),
        "open": None if active is None else (active.open_message, active.open_tools, active.steered),
        "prompt": session.transcript.prompt("persona"),
        "head": session.head_seq,
    }


class SessionLife(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.session = Session("ses")
        self.records: list[Record] = []
        self.numbers = 0
        self.receipts: dict[str, Receipt] = {}
        self.accepted: set[str] = set()
        self.removed: set[str] = set()
        first = created("ses", title="", owner="me", persona=None, pinned_slice=None, goals={})
        self.commit([first])

    def fresh(self, prefix: str) -> str:
        self.numbers += 1
        return f"{prefix}{self.numbers}"

    def commit(self, drafts: Sequence[Draft]) -> None:
        for draft in drafts:
            record = Record("ses", len(self.records) + 1, 0, draft.run_id, draft.origin, draft.event)
            self.records.append(record)
            self.session.apply(record)

    def in_run(self, *events: Event) -> None:
        active = self.session.active
        assert active is not None
        self.commit([Draft(event, run_id=active.run_id, origin=active.origin) for event in events])

    @rule(
        when_busy=st.sampled_from(["enqueue", "interrupt", "reject", "steer"]),
        key=st.none() | st.sampled_from(["k1", "k2", "k3"]),
    )
    def submit(self, when_busy: str, key: str | None) -> None:
        value = InputValue(
            message_id=self.fresh("msg"),
            text="text",
            principal="me",
            run_id=self.fresh("run"),
            idempotency_key=key,
            when_busy=when_busy,
        )
        known = self.receipts.get(key) if key else None
        busy = self.session.active is not None or bool(self.session.queue)
        try:
            submission = self.session.submit(value, queue_limit=QUEUE_LIMIT)
        except Busy:
            assert known is None
            assert busy
            assert when_busy == "reject" or len(self.session.queue) >= QUEUE_LIMIT
            return
        if known is not None:
            assert (submission.receipt, submission.drafts) == (known, [])
            return
        self.commit(submission.drafts)
        self.accepted.add(submission.receipt.run_id)
        if key:
            self.receipts[key] = submission.receipt
        assert submission.receipt.disposition == (
            "started" if value.run_id not in self.session.queue else "queued"
        )
        if when_busy == "interrupt" and self.session.active and self.session.active.run_id != value.run_id:
            assert submission.interrupts == self.session.active.run_id
            assert self.session.queue[0] == value.run_id

    @rule()
    def start_next(self) -> None:
        front = self.session.queue[:1]
        was_active = self.session.active
        self.commit(self.session.start_next())
        if was_active is None and front:
            assert self.session.active is not None
            assert self.session.active.run_id == front[0]

    @precondition(lambda self: self.session.active is not None and not self.session.active.steps)
    @rule(words=st.lists(st.sampled_from([" a", " b", "\n"]), min_size=0, max_size=3), whole=st.booleans())
    def speak(self, words: list[str], whole: bool) -> None:
        message = self.fresh("msg")
        self.in_run(StepStarted("generate"), TextMessageStart(message, "assistant"))
        for word in words:
            self.in_run(TextMessageContent(message, word))
        if whole:
            self.in_run(TextMessageEnd(message), StepFinished("generate"))
            if words:
                assert self.session.transcript.text_of(message) == "".join(words)

    @precondition(lambda self: self.session.active is not None)
    @rule(answered=st.booleans())
    def call_tool(self, answered: bool) -> None:
        call = self.fresh("call")
        self.in_run(ToolCallStart(call, "tool"))
        if answered:
            self.in_run(ToolCallResult(self.fresh("msg"), call, "done"))

    @precondition(lambda self: self.session.active is not None)
    @rule(how=st.sampled_from(["success", "cancelled", "error"]))
    def finish(self, how: str) -> None:
        active = self.session.active
        assert active is not None
        outcome = Success() if how == "success" else Cancelled()
        terminal = RunError("failed", "x") if how == "error" else RunFinished("ses", active.run_id, outcome)
        self.commit(self.session.finish(terminal))
        assert self.session.active is None

    @rule(everything=st.booleans())
    def cancel(self, everything: bool) -> None:
        queued = list(self.session.queue)
        active = self.session.active.run_id if self.session.active else None
        cancellation = self.session.cancel(None if everything or not queued else queued[-1])
        self.commit(cancellation.drafts)
        expected = [*queued, *([active] if active else [])] if everything or not queued else [queued[-1]]
        assert cancellation.run_ids == expected
        assert cancellation.stop == (active if active in expected else None)
        self.removed |= set(expected) - {active}
        with pytest.raises(NotFound):
            self.session.cancel("run-unknown")

    @rule(resume=st.booleans())
    def crash(self, resume: bool) -> None:
        """Everything in memory is lost; what is committed comes back."""
        lost = self.session
        self.session = Session("ses")
        for record in self.records:
            self.session.apply(record)
        assert facts(self.session) == facts(lost)
        active = self.session.active
        unknown = bool(active and active.open_tools)
        resumes = active.resumes if active else 0
        self.commit(self.session.recover(resume=resume, run_id=self.fresh("run")))
        again = self.session.active
        if active is None or not resume or unknown or resumes >= RESUME_LIMIT:
            assert again is None
        else:
            assert again is not None
            assert (again.origin, again.message_id) == ("resume", active.message_id)
            assert self.session.transcript.prompt(None)[-1].role == "user"

    @invariant()
    def the_log_is_well_formed(self) -> None:
        open_run: str | None = None
        ended: set[str] = set()
        steps: list[str] = []
        message: str | None = None
        for record in self.records:
            event = record.event
            if isinstance(event, RunStarted):
                assert open_run is None, "two runs at once"
                assert event.run_id not in ended, "a run that started twice"
                open_run = event.run_id
                continue
            if record.run_id is None:
                continue
            assert record.run_id == open_run, "an event outside of its run"
            match event:
                case StepStarted(step_name=name):
                    steps.append(name)
                case StepFinished(step_name=name):
                    assert steps.pop() == name
                case TextMessageStart(message_id=opened):
                    assert message is None
                    message = opened
                case TextMessageEnd(message_id=closed):
                    assert message == closed
                    message = None
                case Custom():
                    pass
            if isinstance(event, TERMINAL):
                assert not steps
                assert message is None
                ended.add(record.run_id)
                open_run = None

    @invariant()
    def no_accepted_input_is_lost(self) -> None:
        started = {record.event.run_id for record in self.records if isinstance(record.event, RunStarted)}
        assert len(set(self.session.queue)) == len(self.session.queue)
        assert (
            self.accepted == started & self.accepted | set(self.session.queue) | self.removed & self.accepted
        )


TestSessionLife = SessionLife.TestCase
