"""The path of one turn, as docs/design.md tells it.

observe the input, choose a slice, generate, observe the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from ash.domain.errors import EncoderUnavailable
from ash.domain.events import (
    Event,
    ModeValue,
    RouteValue,
    StepFinished,
    StepStarted,
    TextMessageContent,
    TextMessageEnd,
    TextMessageStart,
)
from ash.domain.ports import Encoder, Observer, Router, Slices
from ash.domain.values import (
    Admitted,
    Delta,
    Finished,
    GenerateRequest,
    Route,
    Situation,
    SliceNotice,
)
from ash.session.account import Account
from ash.session.modes import ModeTracker
from ash.session.run import Run
from ash.session.stream import coalesce

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TurnPorts:
    """What a turn works with. `monotonic` gives seconds, `new_id` a fresh id with the given prefix."""

    encoder: Encoder
    router: Router
    observer: Observer
    slices: Slices
    monotonic: Callable[[], float]
    new_id: Callable[[str], str]
    default_persona: str | None
    coalesce_s: float


async def take_turn(run: Run, ports: TurnPorts, modes: ModeTracker, account: Account) -> None:
    """Answer the current input of `run` and add what it cost to `account`; the caller ends the run.

    Raises:
        SliceError: no slice could answer; the message says which failed and why.
        StoreError: the log could not take an event.
    """
    vector = await encode(run.text, ports)
    await observe_input(run, ports, vector)
    route = await choose(run, ports, vector)
    answer = await generate(run, ports, route, account)
    if answer is not None:
        await observe_answer(run, ports, modes, answer)


async def encode(text: str, ports: TurnPorts) -> list[float] | None:
    """The vector of `text`; None while the encoder is down, which abstains and observes nothing."""
    try:
        (vector,) = await ports.encoder.encode([text])
    except EncoderUnavailable as error:
        log.warning("encoder unavailable", reason=str(error))
        return None
    return vector


async def observe_input(run: Run, ports: TurnPorts, vector: list[float] | None) -> None:
    """Log the mode that the input itself shows or asks for: evidence for a later shift."""
    if vector is None:
        return
    estimate = ports.observer.observe(vector, run.text)
    value = ModeValue(
        message_id=run.message_id,
        probabilities=estimate.probabilities,
        mode=estimate.mode,
        genre=estimate.genre,
        role="user",
        raw=ports.observer.pull(vector, run.text),
    )
    await run.append(StepStarted("observe"), value.event(), StepFinished("observe"))


async def choose(run: Run, ports: TurnPorts, vector: list[float] | None) -> Route:
    """Log the decision of the router and return it."""
    before_s = ports.monotonic()
    situation = Situation(
        current=run.session.slice,
        pinned=run.session.pinned_slice,
        in_tool_loop=False,
        wants_vision=run.has_images,
        history_tokens=run.session.history_tokens,
        slices=ports.slices.facts(),
    )
    route = ports.router.decide(vector, run.text, situation)
    value = RouteValue(
        slice=route.slice,
        intent=route.intent,
        probabilities=route.probabilities,
        alternatives=list(route.alternatives),
        switched=route.switched,
        reason=route.reason,
        router_ms=round((ports.monotonic() - before_s) * 1000, 3),
    )
    await run.append(StepStarted("route"), value.event(), StepFinished("route"))
    return route


async def generate(run: Run, ports: TurnPorts, route: Route, account: Account) -> str | None:
    """Stream one answer into the log; returns the id of its message, None when cancelled before a word."""
    await run.append(StepStarted("generate"))
    prompt = run.session.transcript.prompt(run.session.persona or ports.default_persona)
    request = GenerateRequest(run.run_id, run.session.session_id, prompt)
    message_id = ports.new_id("msg")
    opening: list[Event] = [TextMessageStart(message_id, "assistant")]
    generation = run.hold(ports.slices.generate(route.slice, request), route.slice)
    async with aclosing(coalesce(aiter(generation), ports.coalesce_s, ports.monotonic)) as items:
        async for item in items:
            match item:
                case SliceNotice():
                    await run.notice(item)
                case Admitted():
                    account.admitted(item)
                    await run.compact(prompt, item.dropped_messages)
                case Delta(text=text):
                    account.spoke(ports.monotonic())
                    await run.append(*opening, TextMessageContent(message_id, text))
                    opening.clear()
                case Finished():
                    account.finished(item, run.slice)
    if opening and run.cancelled:
        await run.append(StepFinished("generate"))
        return None
    await run.append(*opening, TextMessageEnd(message_id), StepFinished("generate"))
    return message_id


async def observe_answer(run: Run, ports: TurnPorts, modes: ModeTracker, message_id: str) -> None:
    """Log the mode of the answer and, when the filter is sure of it, a shift."""
    answer = run.session.transcript.text_of(message_id)
    vector = await encode(answer, ports) if answer else None
    estimate = None if vector is None else ports.observer.observe(vector, answer)
    events = modes.observe(message_id, run.session.last_answer_seq, estimate)
    await run.append(StepStarted("observe"), *events, StepFinished("observe"))
