"""One session of a study, driven over the wire as any client would do it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from ash.domain.errors import StudyError
from ash.domain.ports import Clock
from ash.study.plan import Plan, Step, input_key, schedule
from ash.study.progress import FinishedSession

CLOSED = "the server closed the connection in the middle of a turn; run the study again to go on"


class Wire(Protocol):
    """An initialised connection of `ash.v1` (docs/protocol.md)."""

    async def request(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a method; raises AshError on a refusal or a closed connection."""

    def events(self) -> AsyncIterator[dict[str, Any]]:
        """The params of every `session/event`, until the connection closes."""


class Driver:
    """Runs one session of a study on a connection of its own.

    Protocol `ash.v1` gives every prompt the origin `user`, and the session layer starts no run by itself. So
    the neutral prompt of a self-directed turn is told apart by its idempotency key, which the log keeps (see
    ash.study.plan.step_of).
    """

    def __init__(self, wire: Wire, plan: Plan, condition: str, seed: int, clock: Clock) -> None:
        self._wire = wire
        self._plan = plan
        self._condition = condition
        self._seed = seed
        self._clock = clock
        self._ends: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._closed = False

    async def run(self, on_turn: Callable[[], None]) -> FinishedSession:
        """Run the session to its end; calls `on_turn` behind every answer.

        Raises:
            StudyError: a turn failed or the connection closed; says which.
            AshError: the server refused a request.
        """
        reading = asyncio.create_task(self._read())
        try:
            return await self._run(on_turn)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _run(self, on_turn: Callable[[], None]) -> FinishedSession:
        started_at = self._clock()
        steps = schedule(self._plan, self._condition, self._seed)
        created = await self._wire.request(
            "session/new",
            title=f"{self._plan.name} {self._condition} {self._seed}",
            persona=self._plan.persona,
            slice=self._plan.slice,
        )
        session_id = str(created["sessionId"])
        await self._attach(session_id, 0)
        fork_seq = await self._turn(session_id, steps[0])
        on_turn()
        continuations = []
        for step in steps[1:]:
            if self._condition == "no_memory":
                continuations.append(await self._forked_turn(session_id, fork_seq, step))
            else:
                await self._turn(session_id, step)
            on_turn()
        return FinishedSession(
            condition=self._condition,
            seed=self._seed,
            session_id=session_id,
            started_at=started_at,
            finished_at=self._clock(),
            continuations=tuple(continuations),
            fork_seq=fork_seq if continuations else None,
        )

    async def _forked_turn(self, session_id: str, fork_seq: int, step: Step) -> str:
        """A turn of an agent that remembers the opening only; returns the id of the copy that holds it."""
        forked = await self._wire.request("session/fork", sessionId=session_id, atSeq=fork_seq)
        copy = str(forked["sessionId"])
        await self._attach(copy, fork_seq)
        await self._turn(copy, step)
        await self._wire.request("session/detach", sessionId=copy)
        return copy

    async def _attach(self, session_id: str, after_seq: int) -> None:
        await self._wire.request("session/attach", sessionId=session_id, afterSeq=after_seq)

    async def _turn(self, session_id: str, step: Step) -> int:
        """Say something and wait for the answer; returns the seq of the run's last event."""
        receipt = await self._wire.request(
            "session/prompt",
            sessionId=session_id,
            prompt=[{"type": "text", "text": step.text}],
            idempotencyKey=input_key(self._plan, self._condition, self._seed, step),
        )
        end = await self._end_of(str(receipt["runId"]))
        event = end["event"]
        if event["type"] == "RUN_ERROR":
            raise StudyError(f"{self._where(step)} failed: {event['message']}")
        if event["outcome"]["type"] != "success":
            outcome = event["outcome"]["type"]
            raise StudyError(f"{self._where(step)} was {outcome}; let nobody else use the session")
        return int(end["seq"])

    def _where(self, step: Step) -> str:
        return f"turn {step.turn} of the session {self._condition} with seed {self._seed}"

    def _end_of(self, run_id: str) -> asyncio.Future[dict[str, Any]]:
        if run_id not in self._ends:
            self._ends[run_id] = asyncio.get_running_loop().create_future()
            if self._closed:
                self._ends[run_id].set_exception(StudyError(CLOSED))
        return self._ends[run_id]

    async def _read(self) -> None:
        """Note the end of every run; an end may come before the receipt of its prompt."""
        async for params in self._wire.events():
            if params["event"]["type"] in {"RUN_FINISHED", "RUN_ERROR"}:
                future = self._end_of(str(params["runId"]))
                if not future.done():
                    future.set_result(params)
        self._closed = True
        for future in self._ends.values():
            if not future.done():
                future.set_exception(StudyError(CLOSED))
