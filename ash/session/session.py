"""The state machine of one session: no I/O, no clock, no tasks.

A `Session` is a fold over its log: `apply(record)` is the only method that changes it. The other methods
decide: they look at the state and return the drafts that must be committed for something to happen.
Because live operation and recovery fold the same records, a restart arrives at the same state.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from ash.domain.errors import Busy, NotFound
from ash.domain.events import (
    TERMINAL,
    CompactionValue,
    Custom,
    Draft,
    Event,
    InputValue,
    Origin,
    QueueValue,
    Record,
    RouteValue,
    RunError,
    RunFinished,
    RunStarted,
    StateDelta,
    StateSnapshot,
    StepFinished,
    StepStarted,
    TextMessageContent,
    TextMessageEnd,
    TextMessageStart,
    ToolCallResult,
    ToolCallStart,
)
from ash.session.transcript import Transcript

RESUME_LIMIT = 3
"""An input whose answer was cut off this often is not resumed again: it may be what kills the server."""


class Receipt(Struct, frozen=True):
    """What a client learns about its input. `disposition`: started or queued."""

    run_id: str
    message_id: str
    disposition: str


class ActiveRun(Struct):
    """The run in progress and everything that must be closed before it may end."""

    run_id: str
    origin: Origin
    message_id: str
    value: InputValue | None = None
    resumes: int = 0
    steps: list[str] = field(default_factory=list)
    open_message: str | None = None
    open_tools: list[str] = field(default_factory=list)
    steered: list[InputValue] = field(default_factory=list)


class Submission(Struct, frozen=True):
    """Decision about one input; `interrupts` is the run that must be stopped for it."""

    receipt: Receipt
    drafts: list[Draft]
    interrupts: str | None = None


class Cancellation(Struct, frozen=True):
    """Decision about a cancel; `stop` is the active run to stop, `run_ids` what the client is told."""

    run_ids: list[str]
    drafts: list[Draft]
    stop: str | None


class Session:
    """One agent's state, folded from its log."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.head_seq = 0
        self.owner = ""
        self.title = ""
        self.persona: str | None = None
        self.pinned_slice: str | None = None
        self.read_only = False
        self.goals: dict[str, dict[str, Any]] = {}
        self.autonomy: dict[str, Any] = {"enabled": False}
        self.queue: list[str] = []
        self.active: ActiveRun | None = None
        self.slice: str | None = None
        self.transcript = Transcript()
        self.history_tokens = 0
        self.last_answer_seq = 0
        self._inputs: dict[str, InputValue] = {}
        self._last_input: InputValue | None = None
        self._keys: dict[str, Receipt] = {}
        self._resumes: dict[str, int] = {}

    @property
    def exists(self) -> bool:
        """Whether the log holds anything of this session."""
        return self.head_seq > 0

    @property
    def state(self) -> str:
        """`running`, `queued` or `idle`, as `session/list` shows it."""
        if self.active is not None:
            return "running"
        return "queued" if self.queue else "idle"

    # -- decisions -----------------------------------------------------------------------------------

    def submit(self, value: InputValue, *, queue_limit: int) -> Submission:
        """Take an input; `value.when_busy` says what happens if a run is active.

        Raises:
            Busy: a run is active and `when_busy` is `reject`, or `queue_limit` inputs wait already.
        """
        key = value.idempotency_key
        if key is not None and key in self._keys:
            return Submission(receipt=self._keys[key], drafts=[])
        if self.active is None and not self.queue:
            started = self._started(value.run_id, Origin.USER, value.message_id)
            draft = Draft(value.event(), run_id=value.run_id, origin=Origin.USER)
            return Submission(Receipt(value.run_id, value.message_id, "started"), [started, draft])
        if value.when_busy == "reject":
            raise Busy("the session is busy with another run; send again later or use whenBusy=enqueue")
        if value.when_busy == "steer" and self.active is not None:
            return self._steer(self.active, value)
        if len(self.queue) >= queue_limit:
            raise Busy(
                f"{len(self.queue)} inputs already wait in session {self.session_id}; "
                "wait for answers, cancel some, or raise session.queue_length"
            )
        interrupt = value.when_busy == "interrupt"
        queue = [value.run_id, *self.queue] if interrupt else [*self.queue, value.run_id]
        drafts = [Draft(value.event(), origin=Origin.USER), Draft(QueueValue(queue=queue).event())]
        stop = self.active.run_id if interrupt and self.active is not None else None
        return Submission(Receipt(value.run_id, value.message_id, "queued"), drafts, interrupts=stop)

    def _steer(self, active: ActiveRun, value: InputValue) -> Submission:
        """Join the active run: its next generation sees the input. The run answers under its own id."""
        joined = InputValue(
            message_id=value.message_id,
            text=value.text,
            principal=value.principal,
            run_id=active.run_id,
            idempotency_key=value.idempotency_key,
            when_busy=value.when_busy,
            images=value.images,
        )
        receipt = Receipt(active.run_id, value.message_id, "started")
        return Submission(receipt, [Draft(joined.event(), run_id=active.run_id, origin=active.origin)])

    def start_next(self) -> list[Draft]:
        """Start the run at the front of the queue; nothing when a run is active or none waits."""
        if self.active is not None or not self.queue:
            return []
        run_id, *rest = self.queue
        value = self._inputs[run_id]
        return [
            self._started(run_id, Origin.USER, value.message_id),
            Draft(QueueValue(queue=rest).event()),
        ]

    def start_tick(self, run_id: str, message_id: str, text: str) -> list[Draft]:
        """Start a run of the agent's own; nothing when the session is busy."""
        if self.active is not None or self.queue:
            return []
        value = InputValue(message_id=message_id, text=text, principal="ash", run_id=run_id)
        draft = Draft(value.event(), run_id=run_id, origin=Origin.TICK)
        return [self._started(run_id, Origin.TICK, message_id), draft]

    def cancel(self, run_id: str | None) -> Cancellation:
        """Cancel one run, or with None all of them: the queued ones first, then the active one.

        Raises:
            NotFound: `run_id` is neither queued nor active.
        """
        active = self.active.run_id if self.active is not None else None
        if run_id is not None and run_id != active and run_id not in self.queue:
            raise NotFound(f"run {run_id} is neither queued nor active in session {self.session_id}")
        removed = [queued for queued in self.queue if run_id in (None, queued)]
        kept = [queued for queued in self.queue if queued not in removed]
        drafts = [Draft(QueueValue(queue=kept, removed=removed).event())] if removed else []
        stop = active if active is not None and run_id in (None, active) else None
        return Cancellation([*removed, *([stop] if stop else [])], drafts, stop)

    def finish(self, terminal: RunFinished | RunError) -> list[Draft]:
        """Close what the active run has open, then end it with `terminal`.

        Raises:
            AssertionError: no run is active.
        """
        active = self.active
        assert active is not None, "no run to finish"
        events: list[Event] = []
        if active.open_message is not None:
            events.append(TextMessageEnd(message_id=active.open_message))
        events.extend(StepFinished(step_name=name) for name in reversed(active.steps))
        events.append(terminal)
        return [Draft(event, run_id=active.run_id, origin=active.origin) for event in events]

    def recover(self, *, resume: bool, run_id: str) -> list[Draft]:
        """After a restart: end the run that was cut off and, if allowed, answer its input again.

        All drafts belong in one transaction: a second crash finds either none or all of them. The new run
        gets `run_id`. A run with a tool call of unknown outcome is never answered again by itself: the
        tool's side effect might be repeated.
        """
        active = self.active
        if active is None:
            return []
        unknown = list(active.open_tools)
        again = resume and not unknown and active.resumes < RESUME_LIMIT
        message = "the server stopped while this run was active; the text so far is kept"
        if unknown:
            message += f"; the outcome of tool call {', '.join(unknown)} is unknown and it is not repeated"
        elif resume and not again:
            message += f"; it was cut off {RESUME_LIMIT + 1} times and is not resumed again"
        metadata = {"unknownToolCalls": unknown} if unknown else None
        error = RunError(message=message, code="interrupted", metadata=metadata)
        drafts = self.finish(error)
        if again:
            parent = active.run_id
            drafts.append(self._started(run_id, Origin.RESUME, active.message_id, parent=parent))
        return drafts

    def _started(self, run_id: str, origin: Origin, message_id: str, *, parent: str | None = None) -> Draft:
        event = RunStarted(
            thread_id=self.session_id,
            run_id=run_id,
            parent_run_id=parent,
            metadata={"messageId": message_id},
        )
        return Draft(event, run_id=run_id, origin=origin)

    # -- the fold ------------------------------------------------------------------------------------

    def apply(self, record: Record) -> None:
        """Take one committed record into the state. Records arrive in seq order."""
        self.head_seq = record.seq
        event = record.event
        match event:
            case StateSnapshot(snapshot=snapshot):
                self._restore(snapshot)
            case StateDelta(delta=patch):
                for operation in patch:
                    self._patch(operation)
            case Custom():
                self._apply_custom(event, record)
            case RunStarted():
                self._apply_started(event, record)
            case _ if self.active is not None and record.run_id == self.active.run_id:
                self._apply_in_run(self.active, event, record)
            case _:
                pass

    def _apply_custom(self, event: Custom, record: Record) -> None:
        match event.name:
            case InputValue.event_name:
                self._take_input(InputValue.of(event), record)
            case QueueValue.event_name:
                value = QueueValue.of(event)
                self.queue = list(value.queue)
                for removed in value.removed:
                    self._inputs.pop(removed, None)
            case RouteValue.event_name:
                self.slice = RouteValue.of(event).slice
            case CompactionValue.event_name:
                self.transcript.drop_before(CompactionValue.of(event).first_kept)

    def _take_input(self, value: InputValue, record: Record) -> None:
        active = self.active
        if record.run_id is None:
            disposition = "queued"
            self._inputs[value.run_id] = value
            self.queue.append(value.run_id)
        else:
            disposition = "started"
            assert active is not None, "an input inside a run comes after its RUN_STARTED"
            if value.message_id == active.message_id:
                active.value = value
                self.transcript.add_input(value, active.run_id)
            else:
                active.steered.append(value)
        if value.idempotency_key is not None:
            receipt = Receipt(value.run_id, value.message_id, disposition)
            self._keys[value.idempotency_key] = receipt

    def _apply_started(self, event: RunStarted, record: Record) -> None:
        message_id = (event.metadata or {}).get("messageId", "")
        origin = record.origin or Origin.USER
        self.active = ActiveRun(event.run_id, origin, message_id)
        if origin is Origin.RESUME and event.parent_run_id is not None:
            self.active.resumes = self._resumes.get(event.parent_run_id, 0) + 1
            self.active.value = self._last_input
            self.transcript.forget_answers(event.parent_run_id)
            self._resumes = {event.run_id: self.active.resumes}
        elif event.run_id in self.queue:
            self.queue.remove(event.run_id)
            self.active.value = self._inputs.pop(event.run_id)
            self.transcript.add_input(self.active.value, event.run_id)

    def _apply_in_run(self, active: ActiveRun, event: Event, record: Record) -> None:
        match event:
            case StepStarted(step_name=name):
                active.steps.append(name)
                if name == "generate":
                    self._adopt_steered(active)
            case StepFinished(step_name=name):
                active.steps.remove(name)
            case TextMessageStart(message_id=message_id):
                active.open_message = message_id
                self.last_answer_seq = record.seq
                self.transcript.open_answer(message_id, active.run_id)
            case TextMessageContent(delta=delta):
                self.transcript.extend_answer(delta)
            case TextMessageEnd():
                active.open_message = None
                self.transcript.close_answer()
            case ToolCallStart(tool_call_id=call):
                active.open_tools.append(call)
            case ToolCallResult(tool_call_id=call) if call in active.open_tools:
                active.open_tools.remove(call)
            case _ if isinstance(event, TERMINAL):
                self._adopt_steered(active)
                self._last_input, self.active = active.value, None
                if isinstance(event, RunFinished) and event.usage:
                    self.history_tokens = event.usage[-1].total_tokens or 0

    def _adopt_steered(self, active: ActiveRun) -> None:
        """Steered inputs enter the prompt where the next generation begins, behind the answer before."""
        for value in active.steered:
            self.transcript.add_input(value, active.run_id)
        active.steered.clear()

    def _restore(self, snapshot: dict[str, Any]) -> None:
        self.title = snapshot.get("title") or ""
        self.owner = snapshot.get("owner") or ""
        self.persona = snapshot.get("persona")
        self.pinned_slice = snapshot.get("pinnedSlice")
        self.read_only = bool(snapshot.get("readOnly"))
        self.goals = dict(snapshot.get("goals") or {})
        self.autonomy = dict(snapshot.get("autonomy") or {"enabled": False})

    def _patch(self, operation: dict[str, Any]) -> None:
        """One JSON Patch operation on the state; a path that this version does not know changes nothing."""
        path, value = operation["path"], operation.get("value")
        match path.split("/")[1:]:
            case ["title"]:
                self.title = str(value)
            case ["owner"]:
                self.owner = str(value)
            case ["persona"]:
                self.persona = value
            case ["pinnedSlice"]:
                self.pinned_slice = value
            case ["readOnly"]:
                self.read_only = bool(value)
            case ["autonomy"]:
                self.autonomy = dict(value or {})
            case ["goals", goal_id] if operation["op"] == "remove":
                self.goals.pop(goal_id, None)
            case ["goals", goal_id]:
                self.goals[goal_id] = dict(value or {})
            case ["goals", goal_id, key] if goal_id in self.goals:
                self.goals[goal_id][key] = value


def created(
    session_id: str,
    *,
    title: str,
    owner: str,
    persona: str | None,
    pinned_slice: str | None,
    goals: dict[str, dict[str, Any]],
) -> Draft:
    """The first event of a session: its whole state."""
    assert session_id, "a session has an id before it has events"
    snapshot = {
        "title": title,
        "owner": owner,
        "persona": persona,
        "pinnedSlice": pinned_slice,
        "goals": goals,
        "autonomy": {"enabled": False},
    }
    return Draft(StateSnapshot(snapshot=snapshot))
