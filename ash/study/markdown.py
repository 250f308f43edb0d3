"""A session as a Markdown transcript. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from ash.study.tables import iso_time, onset_message
from ash.study.transcript import Message, SessionView, ShiftFact, ToolCall, Turn


def markdown(view: SessionView) -> str:
    """The messages in order, each with its id for citation, and the shifts where they were noticed."""
    lines = [f"# {view.title or 'Session'} ({view.session_id})", ""]
    if view.persona:
        lines += ["Persona:", "", *_quoted(view.persona), ""]
    turns = {turn.run_id: turn for turn in view.turns}
    alarms = {shift.value.alarm_seq: shift for shift in view.shifts}
    items: list[tuple[int, Message | ToolCall]] = [(message.seq, message) for message in view.messages]
    items += [(tool.seq, tool) for tool in view.tools]
    for _, item in sorted(items, key=lambda pair: pair[0]):
        if isinstance(item, ToolCall):
            lines += _tool(item)
            continue
        lines += _message(item, turns.get(item.run_id or ""))
        if item.seq in alarms:
            lines += [_shift(view, alarms[item.seq]), ""]
    if not items:
        lines += ["This session has no messages.", ""]
    return "\n".join(lines)


def _message(message: Message, turn: Turn | None) -> list[str]:
    speaker = message.principal or ("ash" if message.role == "assistant" else message.role)
    facts = [iso_time(message.ts), f"`{message.message_id}`"]
    if message.role == "assistant":
        if turn is not None and turn.route is not None:
            facts.append(turn.route.slice)
        if message.reading is not None:
            facts.append(" ".join(filter(None, (message.reading.mode, message.reading.genre))))
        if not message.complete:
            facts.append("cut off")
    elif message.origin not in {None, "user"}:
        facts.append(str(message.origin))
    return [f"## {speaker}", "", ", ".join(facts), "", message.text.strip(), ""]


def _tool(tool: ToolCall) -> list[str]:
    result = "outcome unknown" if tool.result is None else tool.result
    heading = f"## tool {tool.name or '?'} (`{tool.tool_call_id}`)"
    return [heading, "", *_quoted(tool.arguments or "{}"), "", *_quoted(result), ""]


def _shift(view: SessionView, shift: ShiftFact) -> str:
    onset = onset_message(view, shift)
    since = f"since `{onset.message_id}`" if onset is not None else f"since seq {shift.value.onset_seq}"
    to = " ".join(filter(None, (shift.value.to, shift.value.genre)))
    return f"**Shift** {shift.value.from_} -> {to}, {since}; trigger: {shift.value.trigger}"


def _quoted(text: str) -> Iterable[str]:
    return (f"> {line}".rstrip() for line in text.splitlines() or [""])
