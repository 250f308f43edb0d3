"""What Ash writes is AG-UI 1.0: the protocol's own models read every event."""

from __future__ import annotations

import json

import ag_ui.core
import pytest
from pydantic import TypeAdapter

from ash.domain import events as e

AG_UI = TypeAdapter(ag_ui.core.Event)

EVENTS: list[e.Event] = [
    e.RunStarted("ses", "run", metadata={"messageId": "msg"}),
    e.RunStarted("ses", "run", parent_run_id="before"),
    e.RunFinished("ses", "run", e.Success(), usage=[e.TokenUsage("ash", "nano", 3, 4, 1, 7)]),
    e.RunFinished("ses", "run", e.Cancelled(), metadata={"ttftMs": 1.5}),
    e.RunFinished("ses", "run", e.Interrupted([{"id": "i", "reason": "approval"}])),
    e.RunError("why", "interrupted"),
    e.StepStarted("observe"),
    e.StepFinished("observe"),
    e.TextMessageStart("msg", "assistant"),
    e.TextMessageContent("msg", "text"),
    e.TextMessageEnd("msg"),
    e.ToolCallStart("call", "search"),
    e.ToolCallArgs("call", "{}"),
    e.ToolCallEnd("call"),
    e.ToolCallResult("msg", "call", "found"),
    e.StateSnapshot({"title": ""}),
    e.StateDelta([{"op": "replace", "path": "/title", "value": "t"}]),
    e.QueueValue(queue=["run"]).event(),
]


@pytest.mark.parametrize("event", EVENTS, ids=e.event_type)
def test_the_protocols_models_read_what_is_written(event: e.Event) -> None:
    body = e.encode_event(event)
    read = AG_UI.validate_json(body)
    assert read.type == e.event_type(event)
    assert e.decode_event(body) == event
    written = json.loads(body)
    assert json.loads(read.model_dump_json(by_alias=True)).keys() >= written.keys()
    assert (read.model_extra or {}) == {}, "a field that AG-UI does not know"
