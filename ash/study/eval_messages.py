"""The messages of an Inspect AI sample, in the order of the log and under their ids. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from ash.domain.events import TokenUsage
from ash.study.dialogue import persona_id
from ash.study.transcript import Message, SessionView, ToolCall


class Entry(Struct, frozen=True):
    """A chat message and what it was made of; `source` None: the persona."""

    seq: int
    message: dict[str, Any]
    source: Message | ToolCall | None

    @property
    def generated(self) -> bool:
        """Whether the model said it."""
        return bool(self.message["role"] == "assistant")


def chat(view: SessionView) -> list[Entry]:
    """Persona, inputs, answers, tool calls and their results.

    A tool call stands in an assistant message of its own, with the id `call:` and the call's, unless the
    answer that it belongs to is in the log.
    """
    known = {message.message_id for message in view.messages}
    own: dict[str, list[ToolCall]] = {}
    entries = []
    if view.persona:
        entries.append(
            Entry(0, {"id": persona_id(view.session_id), "role": "system", "content": view.persona}, None)
        )
    for tool in view.tools:
        if tool.message_id is not None and tool.message_id in known:
            own.setdefault(tool.message_id, []).append(tool)
        else:
            entries.append(Entry(tool.seq, _call_message(tool), tool))
        if tool.result is not None:
            entries.append(Entry(tool.seq, _result_message(tool, tool.result), tool))
    slices = {turn.run_id: turn.route.slice for turn in view.turns if turn.route is not None}
    for message in view.messages:
        model = slices.get(message.run_id or "")
        entries.append(Entry(message.seq, _message(message, model, own.get(message.message_id, ())), message))
    return sorted(entries, key=lambda entry: entry.seq)


def _message(message: Message, model: str | None, tools: Sequence[ToolCall]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"seq": message.seq, "ts": message.ts, "origin": message.origin}
    if message.principal:
        metadata["principal"] = message.principal
    if message.reading is not None:
        metadata |= {"mode": message.reading.mode, "genre": message.reading.genre}
    if not message.complete:
        metadata["complete"] = False
    entry: dict[str, Any] = {
        "id": message.message_id,
        "role": message.role if message.role in {"user", "assistant"} else "system",
        "content": message.text,
        "metadata": metadata,
    }
    if message.role == "user":
        entry["source"] = "input"
    elif message.role == "assistant":
        entry |= {"source": "generate", "model": model}
        if tools:
            entry["tool_calls"] = [_tool_call(tool) for tool in tools]
    return entry


def _call_message(tool: ToolCall) -> dict[str, Any]:
    return {
        "id": f"call:{tool.tool_call_id}",
        "role": "assistant",
        "content": "",
        "source": "generate",
        "tool_calls": [_tool_call(tool)],
    }


def _result_message(tool: ToolCall, result: str) -> dict[str, Any]:
    return {
        "id": f"result:{tool.tool_call_id}",
        "role": "tool",
        "content": result,
        "tool_call_id": tool.tool_call_id,
        "function": tool.name or None,
    }


def _tool_call(tool: ToolCall) -> dict[str, Any]:
    return {
        "id": tool.tool_call_id,
        "function": tool.name or "unknown",
        "arguments": arguments(tool),
        "type": "function",
    }


def arguments(tool: ToolCall) -> dict[str, Any]:
    """Inspect wants an object; whatever else the model wrote stands under `raw`."""
    try:
        parsed = json.loads(tool.arguments)
    except ValueError:
        return {"raw": tool.arguments} if tool.arguments else {}
    return parsed if isinstance(parsed, dict) else {"raw": tool.arguments}


def output(entry: Entry, usage: TokenUsage | None) -> dict[str, Any]:
    """A message of the model as Inspect's output of a model call."""
    complete = not isinstance(entry.source, Message) or entry.source.complete
    reason = "tool_calls" if "tool_calls" in entry.message else "stop"
    made: dict[str, Any] = {
        "model": entry.message.get("model") or "none",
        "choices": [{"message": entry.message, "stop_reason": reason if complete else "unknown"}],
        "completion": entry.message["content"],
    }
    if usage is not None:
        made["usage"] = model_usage(usage)
    return made


def model_usage(usage: TokenUsage) -> dict[str, int]:
    """Token counts under Inspect's names."""
    return {
        "input_tokens": usage.input_tokens or 0,
        "output_tokens": usage.output_tokens or 0,
        "total_tokens": usage.total_tokens or 0,
        "input_tokens_cache_read": usage.cached_input_tokens or 0,
    }
