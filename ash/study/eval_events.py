"""The events of an Inspect AI sample: calls, tools, shifts, notices, in the spans of their episodes. Pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ash.study.episodes import Episode, episodes
from ash.study.eval_messages import Entry, arguments, output
from ash.study.tables import onset_message
from ash.study.transcript import Notice, SessionView, ToolCall


def _time(ts: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(ts / 1000, tz=dt.UTC)


class SampleEvents:
    """The events of one sample, each inside the span of its episode."""

    def __init__(self, view: SessionView, entries: Sequence[Entry]) -> None:
        """`entries` are the messages of the sample."""
        self._view = view
        self._entries = entries
        self._turns = {turn.run_id: turn for turn in view.turns}
        self._episodes = episodes(view)
        self._starts = [self._start_of(episode) for episode in self._episodes]

    def _start_of(self, episode: Episode) -> int:
        """An episode begins with the run of its first answer, so that its inputs stand inside it."""
        first = episode.answers[0]
        run = self._turns.get(first.run_id or "")
        return first.seq if run is None else min(first.seq, run.seq)

    def build(self) -> list[dict[str, Any]]:
        """All events in order of their seq."""
        view = self._view
        items = self._model_events()
        items += [(tool.seq, self._tool_event(tool)) for tool in view.tools]
        items += [(notice.seq, self._notice(notice)) for notice in view.notices]
        for shift in view.shifts:
            onset = onset_message(view, shift)
            cited = {message.seq: message.message_id for message in view.messages}
            data = {
                **msgspec.to_builtins(shift.value),
                "onsetMessageId": None if onset is None else onset.message_id,
                "evidenceMessageIds": [cited[seq] for seq in shift.value.evidence if seq in cited],
            }
            event = {"event": "info", "source": "ash.mode_shift", "data": data}
            items.append((shift.seq, {**self._base(shift.seq, shift.ts), **event}))
        return self._in_spans(sorted(items, key=lambda pair: pair[0]))

    def _base(self, seq: int, ts: int) -> dict[str, Any]:
        number = self._episode_at(seq)
        return {
            "uuid": f"{self._view.session_id}:{seq}",
            "span_id": None if number is None else self._span_id(number),
            "timestamp": _time(ts),
            "working_start": (ts - self._view.first_ts) / 1000,
        }

    def _span_id(self, number: int) -> str:
        return f"{self._view.session_id}:episode-{number + 1}"

    def _episode_at(self, seq: int) -> int | None:
        """The last episode that began at or before `seq`."""
        begun = [number for number, start in enumerate(self._starts) if start <= seq]
        return begun[-1] if begun else None

    def _model_events(self) -> list[tuple[int, dict[str, Any]]]:
        """One for each message of the model. The input is what came in since the one before: the log does not
        repeat whole prompts, and Inspect collects the messages of a sample from these inputs.
        """
        found = []
        fresh: list[dict[str, Any]] = []
        for entry in self._entries:
            if not entry.generated:
                fresh.append(entry.message)
                continue
            assert entry.source is not None, "the persona is no message of the model"
            turn = self._turns.get(entry.source.run_id or "")
            last = turn is not None and turn.answers[-1:] == (entry.message["id"],)
            event = {
                "event": "model",
                "model": entry.message.get("model") or "none",
                "input": fresh,
                "tools": [],
                "tool_choice": "auto",
                "config": {},
                "output": output(entry, turn.usage if turn is not None and last else None),
                "error": turn.error if turn is not None and last else None,
                "completed": _time(entry.source.end_ts),
                "working_time": (entry.source.end_ts - entry.source.ts) / 1000,
                "metadata": {}
                if turn is None
                else {"run_id": turn.run_id, "origin": turn.origin, "outcome": turn.outcome},
            }
            base = self._base(entry.seq, entry.source.ts)
            found.append((entry.seq, {**base, "uuid": entry.message["id"], **event}))
            fresh = []
        return found

    def _tool_event(self, tool: ToolCall) -> dict[str, Any]:
        return {
            **self._base(tool.seq, tool.ts),
            "event": "tool",
            "id": tool.tool_call_id,
            "function": tool.name or "unknown",
            "arguments": arguments(tool),
            "result": tool.result or "",
            "completed": _time(tool.end_ts),
            "metadata": {"outcome": "unknown" if tool.result is None else "finished"},
        }

    def _notice(self, notice: Notice) -> dict[str, Any]:
        event = {"event": "info", "source": notice.name, "data": notice.value}
        return {**self._base(notice.seq, notice.ts), **event}

    def _in_spans(self, items: Sequence[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        open_span: int | None = None
        for seq, event in items:
            number = self._episode_at(seq)
            if number != open_span:
                if open_span is not None:
                    events.append(self._end(open_span, event))
                if number is not None:
                    events.append(self._begin(number, event))
                open_span = number
            events.append(event)
        if open_span is not None:
            events.append(self._end(open_span, events[-1]))
        return events

    def _begin(self, number: int, event: Mapping[str, Any]) -> dict[str, Any]:
        episode, span = self._episodes[number], self._span_id(number)
        return {
            "event": "span_begin",
            "uuid": f"{span}:begin",
            "id": span,
            "span_id": span,
            "type": "mode",
            "name": " ".join(filter(None, (episode.mode or "unobserved", episode.genre))),
            "timestamp": event["timestamp"],
            "working_start": event["working_start"],
            "metadata": {"answers": [answer.message_id for answer in episode.answers]},
        }

    def _end(self, number: int, event: Mapping[str, Any]) -> dict[str, Any]:
        span = self._span_id(number)
        return {
            "event": "span_end",
            "uuid": f"{span}:end",
            "id": span,
            "span_id": span,
            "timestamp": event["timestamp"],
            "working_start": event["working_start"],
        }
