"""Output formats that are made of something simpler. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ash.domain.values import OutputFormat


def tool_call_format(tools: Mapping[str, Mapping[str, Any]]) -> OutputFormat:
    """The format of one call of one of `tools`: `{"name": NAME, "arguments": {...}}`.

    Args:
        tools: JSON schema of the arguments, by name of the tool.

    Raises:
        ValueError: there is no tool.
    """
    if not tools:
        raise ValueError("a tool call needs at least one tool to choose from")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": arguments},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, arguments in tools.items()
    ]
    return OutputFormat("json_schema", msgspec.json.encode({"anyOf": calls}).decode())
