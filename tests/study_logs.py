"""Logs of sessions for the tests of studies, event by event as a turn appends them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from ash.domain.events import (
    AgentEvent,
    Event,
    InputValue,
    ModeShiftValue,
    ModeValue,
    Origin,
    Record,
    RouteValue,
    RunFinished,
    RunStarted,
    StateSnapshot,
    StepFinished,
    StepStarted,
    Success,
    TextMessageContent,
    TextMessageEnd,
    TextMessageStart,
    TokenUsage,
    ToolCallArgs,
    ToolCallEnd,
    ToolCallResult,
    ToolCallStart,
)
from ash.domain.values import MODES

START = 1_800_000_000_000
MINUTE = 60_000


def sure_of(mode: str, probability: float = 0.94) -> dict[str, float]:
    """Probabilities of a head that is sure of one mode."""
    rest = (1 - probability) / (len(MODES) - 1)
    return {each: probability if each == mode else rest for each in MODES}


class LogBuilder:
    """Appends events with rising seq and a clock that the caller moves on, one second an event."""

    def __init__(self, session_id: str = "ses_1", *, persona: str | None = "You are Ash.") -> None:
        self.session_id = session_id
        self.ts = START
        self.records: list[Record] = []
        self._seqs: Iterator[int] = itertools.count(1)
        self._numbers: Iterator[int] = itertools.count(1)
        snapshot = {
            "title": "A talk",
            "owner": "ada",
            "persona": persona,
            "pinnedSlice": None,
            "goals": {},
            "autonomy": {"enabled": False},
        }
        self.add(StateSnapshot(snapshot=snapshot))

    def add(self, event: Event, run_id: str | None = None, origin: Origin | None = None) -> Record:
        """One event, a second after the one before."""
        assert isinstance(event, AgentEvent)
        self.ts += 1000
        record = Record(self.session_id, next(self._seqs), self.ts, run_id, origin, event)
        self.records.append(record)
        return record

    def skip(self, seqs: int = 1) -> None:
        """Leave out sequence numbers."""
        for _ in range(seqs):
            next(self._seqs)

    def turn(
        self,
        text: str,
        answer: str | Sequence[str],
        mode: str,
        *,
        genre: str | None = None,
        origin: Origin = Origin.USER,
        key: str | None = None,
        principal: str = "ada",
        raw: Mapping[str, float] | None = None,
        pull: Mapping[str, float] | None = None,
    ) -> int:
        """One finished turn; returns the seq of its answer's first event. The clock stands a minute later."""
        number = next(self._numbers)
        run, asked, said = f"run_{number}", f"msg_{number}u", f"msg_{number}a"
        self.add(RunStarted(self.session_id, run, metadata={"messageId": asked}), run, origin)
        value = InputValue(asked, text, principal, run, idempotency_key=key)
        self.add(value.event(), run, origin)
        asks = ModeValue(
            asked,
            sure_of("conversational"),
            "conversational",
            None,
            role="user",
            raw=dict(pull or dict.fromkeys(MODES, 0.0)),
        )
        route = RouteValue(
            "nano", "smalltalk", {"smalltalk": 1.0}, [], switched=False, reason="sure", router_ms=1
        )
        deltas = [answer] if isinstance(answer, str) else list(answer)
        for step, events in {
            "observe": [asks.event()],
            "route": [route.event()],
            "generate": [
                TextMessageStart(said, "assistant"),
                *(TextMessageContent(said, delta) for delta in deltas),
                TextMessageEnd(said),
            ],
        }.items():
            self.add(StepStarted(step), run, origin)
            for event in events:
                self.add(event, run, origin)
            self.add(StepFinished(step), run, origin)
        start = next(
            record.seq
            for record in self.records
            if isinstance(record.event, TextMessageStart) and record.event.message_id == said
        )
        estimate = dict(raw or sure_of(mode))
        reading = ModeValue(said, estimate, mode, genre, raw=estimate)
        self.add(reading.event(), run, origin)
        usage = TokenUsage("ash", "nano", 20, 10, 5, 30)
        finished = RunFinished(
            self.session_id, run, Success(), [usage], metadata={"ttftMs": 12.5, "totalMs": 250.0}
        )
        self.add(finished, run, origin)
        self.ts += MINUTE
        return start

    def shift(
        self,
        from_mode: str,
        to_mode: str,
        *,
        onset: int,
        alarm: int,
        trigger: str = "self_directed",
        evidence: Sequence[int] = (),
        genre: str | None = None,
    ) -> Record:
        """The event that reports a shift."""
        value = ModeShiftValue(from_mode, to_mode, genre, onset, alarm, trigger, list(evidence))
        return self.add(value.event())

    def tool(self, call: str, name: str, arguments: str, result: str | None, run: str = "run_t") -> None:
        """A tool call without a message."""
        events: list[Event] = [ToolCallStart(call, name), ToolCallArgs(call, arguments), ToolCallEnd(call)]
        if result is not None:
            events.append(ToolCallResult(f"msg_{call}", call, result, role="tool"))
        for event in events:
            self.add(event, run, Origin.USER)


def shifting_session(session_id: str = "ses_1") -> LogBuilder:
    """Three analytic answers, then three creative ones that nobody asked for: a session with one shift."""
    log = LogBuilder(session_id)
    log.turn("Explain how tries work.", ["A trie stores ", "keys by prefix."], "analytic")
    log.turn("Go on.", "Each edge is one character of a key.", "analytic")
    log.turn("Go on.", "A look-up costs the length of the key.", "analytic")
    onset = log.turn("Go on.", "Oh the roots run deep\nand the branches weep", "creative", genre="country")
    log.turn("Go on.", "The leaves they fall\nand I hear them call", "creative", genre="country")
    alarm = log.turn("Go on.", "The river is wide\nwith stars on its side", "creative", genre="country")
    log.shift("analytic", "creative", onset=onset, alarm=alarm, genre="country")
    return log
