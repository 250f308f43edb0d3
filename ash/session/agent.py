"""A live session: its state, its subscribers, and the one task that works through its runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog

from ash.domain.errors import AshError, StoreError
from ash.domain.events import Cancelled, Draft, Record, RunError, RunFinished, Success
from ash.domain.ports import EventStore
from ash.session.account import Account
from ash.session.fanout import Hub
from ash.session.modes import ModeTracker
from ash.session.run import Run
from ash.session.session import Session
from ash.session.turn import TurnPorts, take_turn

log = structlog.get_logger(__name__)

T = TypeVar("T")

STORE_RETRY_S = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Pauses between attempts to end a run whose log is full; the last one repeats."""


class Agent:
    """One session in memory.

    Every change goes through `transact`: under the session's lock it decides on the state as of the log,
    commits, folds and publishes. One task answers the runs, one after the other.
    """

    def __init__(self, session: Session, tracker: ModeTracker, store: EventStore, ports: TurnPorts) -> None:
        self.session = session
        self.tracker = tracker
        self.hub = Hub(session.session_id, session.head_seq)
        self.last_used_s = ports.monotonic()
        self._store = store
        self._ports = ports
        self._lock = asyncio.Lock()
        self._run: Run | None = None
        self._task: asyncio.Task[None] | None = None
        self._commits: set[asyncio.Task[object]] = set()
        self._halted: AshError | None = None

    @property
    def busy(self) -> bool:
        """Whether a run is active, input waits, or somebody is attached."""
        return self.session.state != "idle" or len(self.hub) > 0 or bool(self._commits)

    async def transact(self, decide: Callable[[], tuple[Sequence[Draft], T]]) -> T:
        """Commit what `decide` wants and return its result.

        The commit is finished even if the caller is cancelled meanwhile (a client that leaves): the state
        in memory must not fall behind the log.

        Raises:
            StoreError: nothing was committed, the state is unchanged.
            RequestError: `decide` refused.
        """
        task = asyncio.ensure_future(self._transact(decide))
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)
        return await asyncio.shield(task)

    async def _transact(self, decide: Callable[[], tuple[Sequence[Draft], T]]) -> T:
        async with self._lock:
            if self._halted is not None:
                raise self._halted
            self.last_used_s = self._ports.monotonic()
            drafts, result = decide()
            if drafts:
                records = await self._store.append(self.session.session_id, drafts)
                for record in records:
                    self._fold(record)
                self.hub.publish(records)
            return result

    def _fold(self, record: Record) -> None:
        self.session.apply(record)
        self.tracker.apply(record)

    async def commit(self, drafts: Sequence[Draft]) -> None:
        """Commit drafts that need no decision."""
        await self.transact(lambda: (drafts, None))

    def wake(self) -> None:
        """Make sure that the runs are being worked on."""
        if self._halted is not None or self.session.state == "idle":
            return
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work(), name=f"session {self.session.session_id}")

    def stop_run(self, run_id: str) -> None:
        """Stop the active run if it is `run_id`; it ends as cancelled."""
        if self._run is not None and self._run.run_id == run_id:
            self._run.cancel()

    async def recover(self, *, resume: bool, run_id: str) -> None:
        """Settle what a crash cut off; a resume run gets `run_id`."""
        await self.transact(lambda: (self.session.recover(resume=resume, run_id=run_id), None))

    async def halt(self, error: AshError) -> None:
        """Leave off at once, as a crash would: the open run is recovered at the next start.

        Later changes raise `error`.
        """
        self._halted = error
        if self._run is not None:
            self._run.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._commits:
            await asyncio.gather(*self._commits, return_exceptions=True)

    async def _work(self) -> None:
        while self._halted is None:
            if self.session.active is None:
                await self.transact(lambda: (self.session.start_next(), None))
            if self.session.active is None:
                return
            run = self._run = Run(self.session, self.commit)
            with structlog.contextvars.bound_contextvars(
                session_id=self.session.session_id, run_id=run.run_id
            ):
                await self._execute(run)
            self._run = None

    async def _execute(self, run: Run) -> None:
        account = Account(started_s=self._ports.monotonic())
        log.info("run started", origin=run.origin)
        terminal = await self._answer(run, account)
        while not await self._end(run, terminal):
            run.take_steered()
            terminal = await self._answer(run, account)
        log.info(
            "run ended",
            outcome=type(terminal).__name__,
            slice=run.slice,
            **account.metadata(self._ports.monotonic()),
        )

    async def _answer(self, run: Run, account: Account) -> RunFinished | RunError:
        """Take one turn; whatever goes wrong becomes the run's terminal event, never the server's."""
        try:
            await take_turn(run, self._ports, self.tracker, account)
        except AshError as error:
            log.warning("run failed", kind=error.kind, reason=str(error))
            return RunError(message=str(error), code=error.kind, metadata=error.details() or None)
        except Exception:
            # A defect in one run must not end the session's task.
            log.exception("run failed by a defect")
            return RunError(message="internal error; the server's log has the details", code="internal")
        return RunFinished(
            thread_id=self.session.session_id,
            run_id=run.run_id,
            outcome=Cancelled() if run.cancelled else Success(),
            usage=account.usage,
            metadata=account.metadata(self._ports.monotonic()),
        )

    async def _end(self, run: Run, terminal: RunFinished | RunError) -> bool:
        """Commit the end of the run; False when a steered input still wants an answer.

        A log that takes nothing (full disk) is tried again until it does: the run must end exactly once.
        """

        def decide() -> tuple[Sequence[Draft], bool]:
            active = self.session.active
            assert active is not None
            if active.steered and isinstance(terminal, RunFinished) and not run.cancelled:
                return [], False
            return self.session.finish(terminal), True

        attempt = 0
        while True:
            try:
                return await self.transact(decide)
            except StoreError as error:
                pause_s = STORE_RETRY_S[min(attempt, len(STORE_RETRY_S) - 1)]
                log.warning("the end of the run is not logged yet", reason=str(error), retry_in_s=pause_s)
                attempt += 1
                await asyncio.sleep(pause_s)
