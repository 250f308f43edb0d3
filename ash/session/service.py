"""All sessions of a server: who may do what, which of them are in memory, and what happens at a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from ash.domain.errors import Forbidden, InvalidRequest, NotFound, ShuttingDown, SliceUnavailable, TooLarge
from ash.domain.events import Draft, InputValue, QueueValue, StateDelta
from ash.domain.ports import EventStore
from ash.domain.values import Match, Principal, Role, SessionRow
from ash.modes.filter import ModeFilter
from ash.session.agent import Agent
from ash.session.fanout import Subscription
from ash.session.modes import ModeTracker
from ash.session.session import Receipt, Session, created
from ash.session.turn import TurnPorts

log = structlog.get_logger(__name__)

MINIMUM_RESIDENCY_S = 60.0
"""A session stays in memory at least this long, so that none is dropped between a look-up and its use."""

WHEN_BUSY = ("enqueue", "interrupt", "reject", "steer")


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """How much one server takes on.

    Attributes:
        resume_interrupted: answer the input of a cut-off run again after a restart.
        resident_sessions: idle sessions kept in memory; more are dropped, least recently used first.
        queue_length: inputs that may wait in one session.
        prompt_bytes: the longest input text, in UTF-8 bytes.
    """

    resume_interrupted: bool = True
    resident_sessions: int = 1000
    queue_length: int = 64
    prompt_bytes: int = 1024 * 1024


class Sessions:
    """The service behind the gateway. Every method may raise the RequestErrors of its port's docstring."""

    def __init__(
        self,
        store: EventStore,
        ports: TurnPorts,
        mode_filter: Callable[[], ModeFilter],
        limits: SessionLimits,
    ) -> None:
        self._store = store
        self._ports = ports
        self._mode_filter = mode_filter
        self._limits = limits
        self._agents: dict[str, Agent] = {}
        self._loading: dict[str, asyncio.Task[Agent]] = {}
        self._deleting: set[str] = set()
        self._stopping = False

    # -- life of the server --------------------------------------------------------------------------

    async def recover(self) -> int:
        """End the runs that a crash cut off and start what must go on; returns how many sessions.

        Must be finished before new input is accepted.
        """
        unfinished = await self._store.unfinished()
        for session_id in unfinished:
            agent = await self._agent(session_id)
            await agent.recover(resume=self._limits.resume_interrupted, run_id=self._ports.new_id("run"))
        for session_id in unfinished:
            self._agents[session_id].wake()
        if unfinished:
            log.info("recovered", sessions=len(unfinished))
        return len(unfinished)

    async def stop(self) -> None:
        """Take no more input and leave off; open runs are recovered at the next start."""
        self._stopping = True
        error = ShuttingDown("the server is shutting down")
        await asyncio.gather(*(agent.halt(error) for agent in self._agents.values()))

    def refuse_input(self) -> None:
        """From now on prompts raise ShuttingDown; runs in progress go on."""
        self._stopping = True

    # -- sessions ------------------------------------------------------------------------------------

    async def new_session(
        self,
        principal: Principal,
        *,
        title: str | None,
        persona: str | None,
        slice_name: str | None,
        goals: Sequence[str],
    ) -> str:
        """Create a session owned by `principal`; returns its id."""
        self._accepting()
        if slice_name is not None:
            self._known_slice(slice_name)
        session_id = self._ports.new_id("ses")
        first = created(
            session_id,
            title=title or "",
            owner=principal.name,
            persona=persona,
            pinned_slice=slice_name,
            goals={self._ports.new_id("goal"): {"text": text, "state": "open"} for text in goals},
        )
        await self._store.append(session_id, [first])
        return session_id

    async def list_sessions(
        self, principal: Principal, *, limit: int, cursor: str | None
    ) -> tuple[list[SessionRow], str | None]:
        """A page of the sessions that `principal` may see."""
        owner = principal.name if principal.role is Role.MEMBER else None
        return await self._store.sessions(owner=owner, limit=limit, cursor=cursor)

    async def attach(
        self, principal: Principal, session_id: str, *, after_seq: int, max_buffered: int
    ) -> Subscription:
        """Follow a session from `after_seq` on."""
        agent = await self._readable(principal, session_id)
        subscription = Subscription(
            agent.hub,
            self._store,
            after_seq=after_seq,
            max_buffered=max_buffered,
            state=agent.session.state,
            queue=list(agent.session.queue),
        )
        agent.hub.add(subscription)
        return subscription

    async def fork(self, principal: Principal, session_id: str, at_seq: int | None) -> str:
        """Copy a session up to `at_seq` (None: all of it); the copy starts idle."""
        self._accepting()
        source = await self._writable(principal, session_id, may_be_read_only=True)
        new_id = self._ports.new_id("ses")
        await self._store.fork(session_id, new_id, source.session.head_seq if at_seq is None else at_seq)
        agent = await self._agent(new_id)
        session = agent.session

        def settle() -> tuple[Sequence[Draft], None]:
            drafts = session.recover(resume=False, run_id="")
            if session.queue:
                drafts.append(Draft(QueueValue(queue=[], removed=list(session.queue)).event()))
            drafts.append(patch("/title", f"{session.title or session_id} (fork)"))
            if session.read_only:
                drafts.append(patch("/readOnly", False))
            if session.owner != principal.name:
                drafts.append(patch("/owner", principal.name))
            return drafts, None

        await agent.transact(settle)
        return new_id

    async def delete(self, principal: Principal, session_id: str) -> None:
        """Delete a session for good; an active run is stopped first."""
        agent = await self._writable(principal, session_id, may_be_read_only=True)
        self._deleting.add(session_id)
        try:
            await agent.halt(NotFound(f"session {session_id} was deleted"))
            self._agents.pop(session_id, None)
            agent.hub.close()
            await self._store.delete(session_id)
            await self._ports.slices.forget(session_id)
        finally:
            self._deleting.discard(session_id)

    # -- runs ----------------------------------------------------------------------------------------

    async def prompt(
        self,
        principal: Principal,
        session_id: str,
        *,
        text: str,
        images: Sequence[dict[str, str]],
        idempotency_key: str | None,
        when_busy: str,
    ) -> Receipt:
        """Take an input; returns once it is committed."""
        self._accepting()
        if when_busy not in WHEN_BUSY:
            raise InvalidRequest(f"whenBusy is {when_busy!r}; it must be one of {', '.join(WHEN_BUSY)}")
        size = len(text.encode())
        if size > self._limits.prompt_bytes:
            raise TooLarge(
                f"the prompt has {size} bytes; at most {self._limits.prompt_bytes} are taken "
                "(session.prompt_bytes)",
                limit=self._limits.prompt_bytes,
            )
        agent = await self._writable(principal, session_id)
        value = InputValue(
            message_id=self._ports.new_id("msg"),
            text=text,
            principal=principal.name,
            run_id=self._ports.new_id("run"),
            idempotency_key=idempotency_key,
            when_busy=when_busy,
            images=list(images) or None,
        )

        def decide() -> tuple[Sequence[Draft], tuple[Receipt, str | None]]:
            submission = agent.session.submit(value, queue_limit=self._limits.queue_length)
            return submission.drafts, (submission.receipt, submission.interrupts)

        receipt, interrupts = await agent.transact(decide)
        if interrupts is not None:
            agent.stop_run(interrupts)
        agent.wake()
        return receipt

    async def cancel(self, principal: Principal, session_id: str, run_id: str | None) -> list[str]:
        """Cancel a run, or all of them; returns the ids, queued ones first."""
        agent = await self._writable(principal, session_id)

        def decide() -> tuple[Sequence[Draft], tuple[list[str], str | None]]:
            cancellation = agent.session.cancel(run_id)
            return cancellation.drafts, (cancellation.run_ids, cancellation.stop)

        cancelled, stop = await agent.transact(decide)
        if stop is not None:
            agent.stop_run(stop)
        return cancelled

    async def resume_run(
        self,
        principal: Principal,
        session_id: str,
        *,
        interrupt_id: str,
        approve: bool,
        payload: object,
    ) -> str:
        """Answer an interrupt. No run of this version waits for a decision, so every id is unknown."""
        await self._writable(principal, session_id)
        raise NotFound(f"no run of session {session_id} waits for a decision with id {interrupt_id}")

    # -- goals, autonomy, memory ---------------------------------------------------------------------

    async def add_goal(self, principal: Principal, session_id: str, text: str) -> str:
        """Give the agent a goal; returns its id."""
        agent = await self._writable(principal, session_id)
        goal_id = self._ports.new_id("goal")
        await agent.commit([patch(f"/goals/{goal_id}", {"text": text, "state": "open"}, op="add")])
        return goal_id

    async def list_goals(self, principal: Principal, session_id: str) -> list[dict[str, Any]]:
        """The goals, oldest first: goalId, text, state."""
        agent = await self._readable(principal, session_id)
        return [{"goalId": goal_id, **goal} for goal_id, goal in agent.session.goals.items()]

    async def close_goal(self, principal: Principal, session_id: str, goal_id: str) -> None:
        """Mark a goal as closed."""
        agent = await self._writable(principal, session_id)
        if goal_id not in agent.session.goals:
            raise NotFound(f"no goal {goal_id} in session {session_id}; goal/list shows the goals")
        await agent.commit([patch(f"/goals/{goal_id}/state", "closed")])

    async def set_autonomy(
        self,
        principal: Principal,
        session_id: str,
        *,
        enabled: bool,
        interval_s: float | None,
        budget: int | None,
    ) -> dict[str, Any]:
        """Record whether the agent goes on by itself; returns the setting in force."""
        agent = await self._writable(principal, session_id)
        setting = {**agent.session.autonomy, "enabled": enabled}
        if interval_s is not None:
            setting["intervalS"] = interval_s
        if budget is not None:
            setting["budget"] = budget
        await agent.commit([patch("/autonomy", setting)])
        return setting

    async def search_memory(
        self, principal: Principal, session_id: str, query: str, limit: int
    ) -> list[Match]:
        """Full-text search over the session's messages."""
        await self._readable(principal, session_id)
        return await self._store.search(query, session_id=session_id, limit=limit)

    # -- agents in memory ----------------------------------------------------------------------------

    def _accepting(self) -> None:
        if self._stopping:
            raise ShuttingDown("the server is shutting down; connect again in a moment")

    def _known_slice(self, name: str) -> None:
        names = [facts.name for facts in self._ports.slices.facts()]
        if name not in names:
            raise SliceUnavailable(f"there is no slice {name!r}; the slices are {', '.join(names)}")

    async def _readable(self, principal: Principal, session_id: str) -> Agent:
        agent = await self._agent(session_id)
        if principal.role is Role.MEMBER and agent.session.owner != principal.name:
            raise Forbidden(f"session {session_id} belongs to someone else")
        return agent

    async def _writable(
        self, principal: Principal, session_id: str, *, may_be_read_only: bool = False
    ) -> Agent:
        if principal.role is Role.OBSERVER:
            raise Forbidden("an observer token reads only")
        agent = await self._readable(principal, session_id)
        if agent.session.read_only and not may_be_read_only:
            raise Forbidden(f"session {session_id} was imported and is read-only; fork it to go on")
        return agent

    async def _agent(self, session_id: str) -> Agent:
        """The live session, loaded from the log if need be; concurrent callers share one load."""
        if session_id in self._deleting:
            raise NotFound(f"session {session_id} was deleted")
        if session_id in self._agents:
            agent = self._agents[session_id]
            agent.last_used_s = self._ports.monotonic()
            return agent
        if session_id not in self._loading:
            task = asyncio.ensure_future(self._load(session_id))
            self._loading[session_id] = task
            task.add_done_callback(lambda _: self._loading.pop(session_id, None))
        return await asyncio.shield(self._loading[session_id])

    async def _load(self, session_id: str) -> Agent:
        session, tracker = Session(session_id), ModeTracker(self._mode_filter())
        for record in await self._store.read(session_id):
            session.apply(record)
            tracker.apply(record)
        if not session.exists:
            raise NotFound(f"no session {session_id}; session/list shows the sessions")
        agent = Agent(session, tracker, self._store, self._ports)
        self._make_room()
        self._agents[session_id] = agent
        return agent

    def _make_room(self) -> None:
        excess = len(self._agents) + 1 - self._limits.resident_sessions
        if excess <= 0:
            return
        cutoff_s = self._ports.monotonic() - MINIMUM_RESIDENCY_S
        idle = [agent for agent in self._agents.values() if not agent.busy and agent.last_used_s < cutoff_s]
        for agent in sorted(idle, key=lambda each: each.last_used_s)[:excess]:
            del self._agents[agent.session.session_id]


def patch(path: str, value: object, *, op: str = "replace") -> Draft:
    """A STATE_DELTA with one operation."""
    return Draft(StateDelta(delta=[{"op": op, "path": path, "value": value}]))
