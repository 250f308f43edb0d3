"""Sessions as OpenAI-style messages, with a sidecar of their events: together the whole log. Pure.

The messages file holds one JSON object a line and session:
`{"session_id", "title", "messages": [{"id", "role", "content", ...}]}`. The sidecar holds one event a line,
as `session/event` has it and with the id of the message that it belongs to. Texts stand in the messages file
alone: in the sidecar `length` says how many characters of them an event stands for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from ash.domain.errors import StudyError
from ash.domain.events import (
    Custom,
    Event,
    InputValue,
    Record,
    TextMessageContent,
    ToolCallResult,
    decode_event,
)
from ash.study.transcript import Message, SessionView, ToolCall


def persona_id(session_id: str) -> str:
    """Id of the system message that a session's persona becomes; no two sessions of an export share one."""
    return f"persona:{session_id}"


def sidecar_of(path: Path) -> Path:
    """Where the events of the messages file `path` stand: `talk.jsonl` has `talk.events.jsonl`."""
    return path.with_suffix(f".events{path.suffix}")


def dialogue(view: SessionView) -> dict[str, Any]:
    """A session as OpenAI-style messages in the order of the log.

    A tool call stands in an assistant message of its own, whose id is `call:` and the call's id, unless the
    answer that it belongs to is in the log; its result is a `tool` message.
    """
    messages: list[dict[str, Any]] = []
    if view.persona:
        messages.append({"id": persona_id(view.session_id), "role": "system", "content": view.persona})
    parents = {message.message_id for message in view.messages}
    own: dict[str, list[ToolCall]] = {}
    items: list[tuple[int, Message | ToolCall]] = [(message.seq, message) for message in view.messages]
    for tool in view.tools:
        if tool.message_id in parents:
            own.setdefault(str(tool.message_id), []).append(tool)
        items.append((tool.seq, tool))
    for _, item in sorted(items, key=lambda pair: pair[0]):
        if isinstance(item, Message):
            entry: dict[str, Any] = {"id": item.message_id, "role": item.role, "content": item.text}
            if item.message_id in own:
                entry["tool_calls"] = [_call(tool) for tool in own[item.message_id]]
            messages.append(entry)
            continue
        if item.message_id not in parents:
            messages.append(
                {
                    "id": f"call:{item.tool_call_id}",
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [_call(item)],
                }
            )
        if item.result is not None:
            messages.append(
                {
                    "id": f"result:{item.tool_call_id}",
                    "role": "tool",
                    "tool_call_id": item.tool_call_id,
                    "content": item.result,
                }
            )
    return {"session_id": view.session_id, "title": view.title, "messages": messages}


def _call(tool: ToolCall) -> dict[str, Any]:
    function = {"name": tool.name, "arguments": tool.arguments}
    return {"id": tool.tool_call_id, "type": "function", "function": function}


def sidecar(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """The events of a session without the texts of its messages."""
    for record in records:
        event = msgspec.to_builtins(record.event)
        if isinstance(record.event, TextMessageContent):
            event["length"] = len(event.pop("delta"))
        elif isinstance(record.event, Custom) and record.event.name == InputValue.event_name:
            event["value"]["length"] = len(event["value"].pop("text", ""))
        elif isinstance(record.event, ToolCallResult):
            event["length"] = len(event.pop("content"))
        yield {
            "sessionId": record.session_id,
            "seq": record.seq,
            "ts": record.ts,
            "runId": record.run_id,
            "origin": record.origin,
            "messageId": _message_id(record.event),
            "event": event,
        }


def _message_id(event: Event) -> str | None:
    """The message that an event belongs to; None for one of the session or the run."""
    if isinstance(event, Custom):
        found = event.value.get("messageId")
        return None if found is None else str(found)
    if isinstance(event, ToolCallResult):
        return f"result:{event.tool_call_id}"
    found = getattr(event, "message_id", None) or getattr(event, "parent_message_id", None)
    return None if found is None else str(found)


def json_lines(objects: Iterable[Any]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)


class Texts:
    """The contents of a messages file, handed out piece by piece as the sidecar asks for them."""

    def __init__(self, lines: Iterable[str], source: str) -> None:
        """Read the messages file.

        Raises:
            StudyError: a line is not what `dialogue` writes; names file and line.
        """
        self._left: dict[tuple[str, str], str] = {}
        self._source = source
        self.sessions: list[str] = []
        for number, line in enumerate(lines, start=1):
            content = _object(line, source, number)
            session_id, messages = content.get("session_id"), content.get("messages")
            if not isinstance(session_id, str) or not isinstance(messages, list):
                raise StudyError(f"{source}:{number}: no session_id or no list of messages; is it an export?")
            self.sessions.append(session_id)
            for message in messages:
                if not isinstance(message, dict) or not isinstance(message.get("id"), str):
                    raise StudyError(f"{source}:{number}: a message has no id; export again, or add it")
                self._left[session_id, message["id"]] = message.get("content") or ""

    def take(self, session_id: str, message_id: str, length: int, where: str) -> str:
        """The next `length` characters of a message.

        Raises:
            StudyError: it has fewer, or there is no such message.
        """
        left = self._left.get((session_id, message_id))
        if left is None or len(left) < length:
            raise StudyError(
                f"{where}: the event stands for {length} characters of message {message_id} of session "
                f"{session_id}, which {self._source} does not have; the two files do not belong together"
            )
        self._left[session_id, message_id] = left[length:]
        return left[:length]


def read_back(
    messages: Iterable[str], events: Iterable[str], *, source: str, events_source: str
) -> dict[str, list[Record]]:
    """The records of every session in an export: the inverse of `dialogue` and `sidecar`.

    Args:
        messages: the lines of the messages file.
        events: the lines of the sidecar.
        source: the name of the messages file, for errors.
        events_source: that of the sidecar.

    Raises:
        StudyError: a line cannot be read or the files do not belong together; names file and line.
    """
    texts = Texts(messages, source)
    sessions: dict[str, list[Record]] = {session_id: [] for session_id in texts.sessions}
    for number, line in enumerate(events, start=1):
        where = f"{events_source}:{number}"
        row = _object(line, events_source, number)
        session_id = str(row.get("sessionId"))
        if session_id not in sessions:
            raise StudyError(f"{where}: session {session_id} is not in {source}")
        record = _record(row, session_id, texts, where)
        earlier = sessions[session_id]
        if earlier and record.seq <= earlier[-1].seq:
            raise StudyError(f"{where}: seq {record.seq} does not come behind {earlier[-1].seq}")
        earlier.append(record)
    return sessions


def _record(row: dict[str, Any], session_id: str, texts: Texts, where: str) -> Record:
    event = row.get("event")
    if not isinstance(event, dict):
        raise StudyError(f"{where}: there is no event")
    message_id = str(row.get("messageId"))
    if event.get("type") == "TEXT_MESSAGE_CONTENT":
        event["delta"] = texts.take(session_id, message_id, _length(event, where), where)
    elif event.get("type") == "TOOL_CALL_RESULT":
        event["content"] = texts.take(session_id, message_id, _length(event, where), where)
    elif event.get("name") == InputValue.event_name and isinstance(event.get("value"), dict):
        value = event["value"]
        value["text"] = texts.take(session_id, message_id, _length(value, where), where)
    try:
        decoded = decode_event(json.dumps(event))
        return msgspec.convert(
            {
                "session_id": session_id,
                "seq": row.get("seq"),
                "ts": row.get("ts"),
                "run_id": row.get("runId"),
                "origin": row.get("origin"),
                "event": msgspec.to_builtins(decoded),
            },
            Record,
        )
    except msgspec.DecodeError as error:
        raise StudyError(f"{where}: not an event of Ash: {error}") from error


def _length(holder: dict[str, Any], where: str) -> int:
    length = holder.pop("length", None)
    if not isinstance(length, int) or length < 0:
        raise StudyError(f"{where}: the event says no length of its text")
    return length


def _object(line: str, source: str, number: int) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise StudyError(f"{source}:{number}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise StudyError(f"{source}:{number}: not a JSON object")
    return content
