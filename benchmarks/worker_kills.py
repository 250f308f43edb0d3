"""Workers killed under load, again and again: every run must end, and the log must hold nothing twice.

Sessions ask without a pause while the worker processes of the slices are ended at random moments: while a
model loads, during prefill, during decoding; by SIGKILL, by SIGABRT (what a failed assertion in llama.cpp
does), or by a memory limit that lets its next allocation fail. Then every session must be idle, must answer
once more, and its log is checked: seq, one end for each run, text streamed = text stored, no message begun
again behind a crash. The same seed draws the same plan; when a blow falls still depends on the machine.

Exit status 1 when anything does not hold.

    .venv/bin/python -m benchmarks.worker_kills [--kills 100] [--seed 1]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import psutil

from ash.domain.errors import AshError
from benchmarks.harness.conversation import SystemFailedError
from benchmarks.harness.log_checks import text_by_message, violations
from benchmarks.harness.server import TERMINAL, AshConversation, AshServer, Received
from benchmarks.harness.table import markdown

Moment = Literal["load", "prefill", "decode"]
Means = Literal["SIGKILL", "SIGABRT", "memory limit"]

T = TypeVar("T")

MOMENTS: tuple[Moment, ...] = ("load", "prefill", "decode")
MEANS: tuple[Means, ...] = ("SIGKILL", "SIGABRT", "memory limit")

LONGEST_DELAY_S = 0.4
"""A blow falls up to so long after its moment began."""
LOAD_PATIENCE_S = 20.0
"""When no worker starts for so long, none is needed, and another moment is drawn."""
MEMORY_PATIENCE_S = 20.0
"""A worker that has allocated nothing for so long under its limit is let off."""
BAIT_CHARACTERS = 400_000
"""Length of an input that no worker takes in without a large allocation; it is too long for any context."""
STUCK_AFTER_S = 180.0
"""When no session hears anything for so long although runs are open, they are stuck."""
POLL_S = 0.01
SETTLE_S = 30.0

CLEAN = frozenset({"slice_crashed", "slice_unavailable", "slice_error", "model_file"})
"""Codes with which a run may fail when its workers are killed."""

FILLER = "The road went on between the fields, past the mill and the old stone bridge. "


@dataclass
class Outcome:
    """What a series of kills led to.

    Attributes:
        blows: how often each kind of kill ended a worker, by moment and means.
        survived: how often a worker lived on under its memory limit.
        answered: runs that ended with an answer.
        failed: runs that ended with an error, by code.
        crashes: ash.slice events by what they say.
        wrong: everything that does not hold.
    """

    blows: Counter[tuple[Moment, Means]] = field(default_factory=Counter)
    survived: int = 0
    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    crashes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Kills by moment and means."""
        rows = [[moment, *(str(self.blows[moment, means]) for means in MEANS)] for moment in MOMENTS]
        return markdown(["worker ended during", *MEANS], rows)


class Talker:
    """A session that asks one question after the other until it is told to stop."""

    def __init__(self, conversation: AshConversation, draw: random.Random) -> None:
        self.conversation = conversation
        self.asked: list[str] = []
        self._draw = draw

    def question(self) -> str:
        """A question behind up to some 300 tokens of text, so that prefill takes a while."""
        filler = FILLER * self._draw.randrange(0, 18)
        return f"{filler}Go on with the story of traveller {self._draw.randrange(1000)}."

    async def talk(self, stop: asyncio.Event) -> None:
        """Ask until `stop`."""
        while not stop.is_set():
            await self.ask(self.question())

    async def ask(self, text: str) -> Received:
        """Ask one question; returns the terminal event of its run.

        Raises:
            SystemFailedError: the connection closes before.
        """
        first = len(self.conversation.log)
        run_id = await self.conversation.prompt(text)
        self.asked.append(run_id)
        async with contextlib.aclosing(self.conversation.follow(first)) as received:
            async for entry in received:
                if entry.event["runId"] == run_id and entry.body["type"] in TERMINAL:
                    return entry
        raise SystemFailedError(f"the connection closed before run {run_id} ended")


class Killer:
    """Ends workers by plan.

    Args:
        server: whose workers.
        conversations: where the moments are read from.
        baits: a session on each slice that makes its worker allocate memory, the likeliest slice first.
    """

    def __init__(
        self,
        server: AshServer,
        conversations: Sequence[AshConversation],
        baits: Sequence[Talker],
        draw: random.Random,
    ) -> None:
        self._server = server
        self._conversations = conversations
        self._baits = baits
        self._draw = draw
        self._seen: set[int] = set()

    async def kill(self, kills: int, outcome: Outcome) -> None:
        """End `kills` workers."""
        while outcome.blows.total() < kills:
            # Nothing loads before the first worker was ended.
            moment = self._draw.choice(MOMENTS if outcome.blows else MOMENTS[1:])
            means = self._draw.choice(MEANS)
            worker = await self._victim(moment)
            if worker is None:
                continue
            try:
                ended = await self._strike(worker, means)
            except ProcessLookupError:
                # It was ended by the blow before this one.
                continue
            outcome.blows[moment, means] += ended
            outcome.survived += not ended

    async def _victim(self, moment: Moment) -> psutil.Process | None:
        """A worker at a random time after `moment` began; None when there is none any more."""
        starting: psutil.Process | None = None
        match moment:
            case "load":
                starting = await self._new_worker()
                if starting is None:
                    return None
            case "prefill":
                await self._event({"STEP_STARTED"}, step="generate")
            case "decode":
                await self._event({"TEXT_MESSAGE_CONTENT"})
        # The random moment itself.
        await asyncio.sleep(self._draw.uniform(0, LONGEST_DELAY_S))
        running = sorted(self._server.workers(), key=lambda process: process.pid)
        self._seen |= {process.pid for process in running}
        if starting is not None:
            return starting if starting in running else None
        return self._draw.choice(running) if running else None

    async def _new_worker(self) -> psutil.Process | None:
        """A worker that was not there before, so that it loads its model."""
        try:
            async with asyncio.timeout(LOAD_PATIENCE_S):
                while True:
                    new = [process for process in self._server.workers() if process.pid not in self._seen]
                    if new:
                        return new[0]
                    # Processes announce nothing.
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            return None

    async def _event(self, types: set[str], step: str | None = None) -> None:
        """Wait for the next event of one of `types` in any session."""

        async def first(conversation: AshConversation) -> None:
            async with contextlib.aclosing(conversation.follow(len(conversation.log))) as received:
                async for entry in received:
                    if entry.body["type"] in types and step in (None, entry.body.get("stepName")):
                        return

        waiting = [asyncio.ensure_future(first(conversation)) for conversation in self._conversations]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _strike(self, worker: psutil.Process, means: Means) -> bool:
        """End `worker`; false when it lives on under its memory limit.

        Raises:
            ProcessLookupError: it has ended already.
        """
        if means == "memory limit":
            return await self._starve(worker)
        os.kill(worker.pid, signal.SIGKILL if means == "SIGKILL" else signal.SIGABRT)
        await _gone(worker)
        return True

    async def _starve(self, worker: psutil.Process) -> bool:
        """Let every further allocation of address space fail, and make it allocate."""
        _, hard = resource.prlimit(worker.pid, resource.RLIMIT_AS)
        resource.prlimit(worker.pid, resource.RLIMIT_AS, (1, hard))
        # Decoding alone may go on for long with the memory that the worker has.
        baits = self._baits[: len(self._server.workers())]
        eating = [asyncio.ensure_future(bait.ask("x " * (BAIT_CHARACTERS // 2))) for bait in baits]
        try:
            async with asyncio.timeout(MEMORY_PATIENCE_S):
                await _gone(worker)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(worker.pid, resource.RLIMIT_AS, (hard, hard))
            return False
        finally:
            await asyncio.gather(*eating)
        return True


async def _gone(worker: psutil.Process) -> None:
    """Wait until a process that is no child of this one has ended: nothing can be awaited for that."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110 - see above
            await asyncio.sleep(POLL_S)


async def series(folder: Path, *, kills: int, sessions: int, seed: int) -> Outcome:
    """Start a server, end `kills` workers under the load of `sessions`, and check everything."""
    outcome = Outcome()
    overrides = {
        # Beside the sessions there is room for the baits.
        "ASH_SLICES__NANO__SLOTS": str(sessions + 1),
        "ASH_SLICES__NANO__SAMPLING__MAX_TOKENS": "48",
        "ASH_SLICES__TURBO__SLOTS": str(sessions + 1),
        "ASH_SLICES__TURBO__SAMPLING__MAX_TOKENS": "24",
    }
    server = AshServer(folder, overrides)
    await server.start()
    try:
        conversations = list(await server.converse(sessions))
        talkers = [
            Talker(conversation, random.Random(f"{seed} {number}"))
            for number, conversation in enumerate(conversations)
        ]
        baits = [
            Talker(await AshConversation.begin(server, slice=name), random.Random(seed))
            for name in ("nano", "turbo")
        ]
        killer = Killer(server, conversations, baits, random.Random(seed))
        every = [*talkers, *baits]
        try:
            await _while_heard(every, _under_fire(talkers, killer, kills, outcome))
            # With nobody killing any more, every session must answer.
            last = [talker.ask(talker.question()) for talker in talkers]
            ends = await _while_heard(every, asyncio.gather(*last))
            outcome.wrong += [f"a session fails on: {end.body}" for end in ends if "outcome" not in end.body]
        except* (TimeoutError, AshError, SystemFailedError) as group:
            outcome.wrong += [str(error) for error in group.exceptions]
        for talker in every:
            await _check(server, talker, outcome, bait=talker in baits)
            await talker.conversation.close()
        if not server.process_ids():
            outcome.wrong.append(f"the server itself has ended:\n{server.messages()}")
    finally:
        await server.stop()
    return outcome


async def _under_fire(talkers: Sequence[Talker], killer: Killer, kills: int, outcome: Outcome) -> None:
    """Load and kills, until the last worker was ended and the runs that were open then have ended."""
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for talker in talkers:
            group.create_task(talker.talk(stop))
        await killer.kill(kills, outcome)
        stop.set()


async def _while_heard(talkers: Sequence[Talker], work: Awaitable[T]) -> T:
    """The result of `work`.

    Raises:
        TimeoutError: no session has heard anything for `STUCK_AFTER_S`. A run may take long on a busy
            machine, but the server is never silent while it works.
    """
    task = asyncio.ensure_future(work)
    heard = -1
    while not task.done():
        now = sum(len(talker.conversation.log) for talker in talkers)
        if now == heard:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise TimeoutError(f"stuck: no session has heard anything for {STUCK_AFTER_S:g} s")
        heard = now
        await asyncio.wait({task}, timeout=STUCK_AFTER_S)
    return task.result()


async def _check(server: AshServer, talker: Talker, outcome: Outcome, *, bait: bool) -> None:
    """Read the session again from the log and compare."""
    session = talker.conversation.session_id
    live = [entry.event for entry in talker.conversation.log]
    again = await AshConversation.resume(server, session)
    try:
        async with asyncio.timeout(SETTLE_S), contextlib.aclosing(again.follow()) as received:
            async for entry in received:
                if entry.event["seq"] >= live[-1]["seq"]:
                    break
        state = (await again.request("session/attach", sessionId=session, afterSeq=live[-1]["seq"]))["state"]
    finally:
        await again.close()
    if state != "idle":
        outcome.wrong.append(f"session {session} is {state} although nothing runs")
    log = [entry.event for entry in again.log]
    outcome.wrong += [
        f"session {session}: {what}" for what in violations(log, talker.asked, text_by_message(live))
    ]
    for event in log:
        body = event["event"]
        if body["type"] == "RUN_FINISHED":
            outcome.answered += 1
        elif body["type"] == "RUN_ERROR":
            outcome.failed[body["code"]] += 1
            if body["code"] not in CLEAN | ({"too_large"} if bait else frozenset()):
                outcome.wrong.append(f"session {session}: a run failed by {body['code']}: {body['message']}")
        elif body.get("name") == "ash.slice":
            outcome.crashes[body["value"]["what"]] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ash-kills-") as name:
        try:
            outcome = asyncio.run(
                series(
                    Path(name) / "data",
                    kills=arguments.kills,
                    sessions=arguments.sessions,
                    seed=arguments.seed,
                )
            )
        except SystemFailedError as error:
            sys.exit(f"worker_kills: {error}")
    print(outcome.table())
    print(f"memory limits that a worker survived: {outcome.survived}")
    print(f"runs answered: {outcome.answered}; failed by name: {dict(outcome.failed)}")
    print(f"slice events in the logs: {dict(outcome.crashes)}")
    print(f"took {time.monotonic() - began:.0f} s")
    if outcome.wrong:
        sys.exit("worker_kills: " + "\n  ".join([f"{len(outcome.wrong)} things are wrong:", *outcome.wrong]))
    print("every run ended, no session is stuck, nothing is twice in the log")


if __name__ == "__main__":
    main()
