"""A study over a real gateway and the real session service; only the slice and the observer are fakes."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry

from ash.cli.client import Client
from ash.domain.values import GenerateRequest, ModeEstimate, Route, Situation
from ash.encoders.fake import HashEncoder
from ash.gateway.limits import GatewayLimits
from ash.gateway.metrics import GatewayMetrics
from ash.gateway.tokens import TokenRegistry
from ash.gateway.ws import Gateway
from ash.modes.filter import ModeFilter
from ash.session.modes import ModeTracker
from ash.session.service import SessionLimits, Sessions
from ash.session.turn import TurnPorts
from ash.slices.dispatch import SlicePool
from ash.slices.fake import FakeEngine
from ash.slices.spec import SliceSpec
from ash.store.memory import MemoryEventStore
from ash.study.analysis import StudiedSession, analyse
from ash.study.plan import Cue, Plan, schedule
from ash.study.runner import Driver
from ash.study.stitching import stitch
from ash.study.transcript import view
from tests.study_logs import sure_of

PLAN = Plan(
    name="trial",
    seeds=(1,),
    turns=12,
    openings=("Explain tries.",),
    conditions=("autonomous", "cued", "no_memory", "placebo"),
    cues=(Cue("Write a poem.", "creative"),),
    cue_turns=(6,),
    remarks=("It rains.",),
)


def turn_of(request: GenerateRequest) -> str:
    """An agent that says how many answers of its own it remembers."""
    return f"answer {sum(message.role == 'assistant' for message in request.messages)}"


class Observer:
    """Answers are creative from the seventh on, and `poem` asks for it."""

    def observe(self, vector: Sequence[float], text: str) -> ModeEstimate:
        creative = text.startswith("answer") and int(text.split()[1]) >= 6
        return ModeEstimate(sure_of("creative" if creative else "analytic"), None)

    def pull(self, vector: Sequence[float], text: str) -> dict[str, float]:
        return {"analytic": 0.0, "creative": 0.9 if "poem" in text else 0.0, "conversational": 0.0}


class NanoRouter:
    def decide(self, vector: Sequence[float] | None, text: str, situation: Situation) -> Route:
        return Route("nano", "smalltalk", {"smalltalk": 1.0}, (), switched=False, reason="fixed")


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[MemoryEventStore, str, str]]:
    """A gateway over sessions in memory: the store, the address, the owner's token."""
    numbers = itertools.count(1)
    store, encoder = MemoryEventStore(clock=itertools.count(1).__next__), HashEncoder()
    await store.open()
    await encoder.open()
    pool = SlicePool({"nano": FakeEngine("nano", turn_of)}, [SliceSpec("nano", "nano", "path:none")])
    ports = TurnPorts(
        encoder=encoder,
        router=NanoRouter(),
        observer=Observer(),
        slices=pool,
        monotonic=time.monotonic,
        new_id=lambda prefix: f"{prefix}{next(numbers)}",
        default_persona=None,
        coalesce_s=0.0,
    )
    sessions = Sessions(store, ports, ModeFilter, SessionLimits())
    tokens = TokenRegistry(folder)
    tokens.ensure_owner()
    owner = tokens.owner_token()
    assert owner is not None
    gateway = Gateway(
        sessions,
        tokens,
        host="127.0.0.1",
        port=0,
        hosts=("127.0.0.1",),
        origins=(),
        limits=GatewayLimits(),
        metrics=GatewayMetrics(CollectorRegistry()),
        version="test",
    )
    await gateway.start()
    try:
        yield store, f"ws://127.0.0.1:{gateway.address[1]}/ws", owner
    finally:
        await gateway.stop(reason="stopped", resume_after_ms=0, grace_s=0)
        await sessions.stop()
        await pool.close()


async def test_every_condition_from_the_wire_to_its_figures(tmp_path: Path) -> None:
    studied = []
    async with serving(tmp_path) as (store, address, token):
        for condition in PLAN.conditions:
            async with Client(address, token) as client:
                done = await Driver(client, PLAN, condition, 1, lambda: 0).run(lambda: None)
            records = await store.read(done.session_id)
            if done.fork_seq is not None:
                copies = [await store.read(name) for name in done.continuations]
                records = stitch(records, copies, done.fork_seq, ModeTracker(ModeFilter()))
            studied.append(StudiedSession(condition, 1, view(done.session_id, records)))
    by_condition = {session.condition: session.view for session in studied}

    for condition, session in by_condition.items():
        assert [message.text for message in session.inputs] == [
            step.text for step in schedule(PLAN, condition, 1)
        ]
        assert len(session.answers) == 13
        assert all(turn.outcome == "success" for turn in session.turns)
    remembers = [f"answer {number}" for number in range(13)]
    assert [answer.text for answer in by_condition["autonomous"].answers] == remembers
    assert {answer.text for answer in by_condition["no_memory"].answers[1:]} == {"answer 1"}

    result = analyse(PLAN, studied, None)
    found = {shift.condition: (shift.onset_answer, shift.trigger, shift.cause) for shift in result.shifts}
    assert found == {
        "autonomous": (6, "self_directed", "none"),
        "cued": (6, "external", "cue"),
        "placebo": (6, "self_directed", "none"),
    }
