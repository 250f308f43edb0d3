"""Names, mail addresses, numbers and tokens out of a log, by rule. Pure.

The rules, in the order in which they are applied (docs/study.md tells users the same):

1. mail: what looks like an address (`a@b.c`).
2. token: keys with a known prefix, JSON web tokens, hex strings of 32 characters or more, and words of 24
   characters or more that mix letters and digits.
3. number: six digits or more, also when spaces, dots, dashes, slashes, colons, plus signs or brackets stand
   between them (telephone, card, account, date, IP address). Shorter ones stay: a study needs quantities.
4. name: principals other than Ash's own roles, names that the caller gives, and names that are introduced
   (`my name is Ada`, `call me Ada`, `Dr Ada Byron`, `Dear Ada`), everywhere in the sessions of the export.

The same value has the same pseudonym throughout one export, numbered by first appearance, so that it cannot
be looked up in a table of digests. There is no model in it: a name that nothing introduces stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from ash.domain.events import (
    Custom,
    Event,
    InputValue,
    Record,
    StateDelta,
    StateSnapshot,
    TextMessageContent,
    ToolCallArgs,
    ToolCallResult,
)

_MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_TOKEN = re.compile(
    r"\b(?:sk|pk|rk|ghp|gho|ghs|github_pat|glpat|xox[abpr]|ash|AKIA|AIza|hf)[-_][\w-]{8,}"
    r"|\bAKIA[0-9A-Z]{12,}"
    r"|\beyJ[\w-]+\.[\w-]+\.[\w-]*"
    r"|\b[0-9a-fA-F]{32,}\b"
    r"|\b(?=[\w+/-]*\d)(?=[\w+/-]*[A-Za-z])[\w+/-]{24,}={0,2}"
)
_NUMBER = re.compile(r"(?<![\w\[])[+(]?\d(?:[ .\-/:()]{0,2}\d){5,}(?!\w)")
_NAME = r"([A-Z][\w'\u2019-]+(?: [A-Z][\w'\u2019-]+){0,2})"
_INTRODUCTIONS = (
    re.compile(r"\b(?:[Mm]y name is|[Cc]all me|[Tt]his is|I am called) " + _NAME),
    re.compile(r"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof|Professor|Sir|Madam)\.? " + _NAME),
    re.compile(r"\bDear " + _NAME),
)
_ROLES = frozenset({"ash", "owner", "member", "observer", "study", "user"})

_STRUCTURAL = frozenset(
    {
        *("type", "messageId", "runId", "threadId", "parentRunId", "parentMessageId", "toolCallId"),
        *("toolCallName", "stepName", "name", "role", "mode", "genre", "from", "to", "trigger", "slice"),
        *("intent", "model", "provider", "code", "origin", "op", "path", "whenBusy", "what", "queue"),
        *("removed", "firstKept", "protocolVersion", "outcome", "stopReason", "tickId", "state"),
        "pinnedSlice",
    }
)
"""Keys whose values are ids or terms of Ash's own, not words of people."""


class Redactor:
    """The pseudonyms of one export."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = {name.strip() for name in names if name.strip()}
        self._pseudonyms: dict[str, dict[str, str]] = {}
        self._people: dict[str, str] = {}
        self._pattern: re.Pattern[str] | None = None

    def learn(self, records: Iterable[Record]) -> None:
        """Collect the names in `records`; call it for every session before the first `redact`."""
        for record in records:
            self._names.update(_principals(record.event))
        for text in _texts(records):
            for introduction in _INTRODUCTIONS:
                self._names.update(found for found in introduction.findall(text))
        # A part of a name is the same person; of two people who share it, the one whose name sorts first.
        for name in sorted(self._names):
            for word in (name, *name.split()):
                if len(word) > 1:
                    self._people.setdefault(word, name)
        self._pattern = _any_of(self._people)

    def text(self, text: str) -> str:
        """`text` after the rules."""
        for kind, pattern in (("mail", _MAIL), ("token", _TOKEN), ("number", _NUMBER)):
            text = pattern.sub(lambda found, kind=kind: self._pseudonym(kind, found.group()), text)  # type: ignore[misc]  # mypy has no type for a lambda's default
        if self._pattern is not None:
            text = self._pattern.sub(lambda found: self._person(found.group()), text)
        return text

    def redact(self, records: Sequence[Record]) -> list[Record]:
        """One session without what the rules find.

        A streamed text is redacted as a whole and then stands in its first piece, because a rule may match
        across two; the other pieces are left out. Images are left out.
        """
        joined = _joined(records)
        return [
            msgspec.structs.replace(record, event=self._event(event))
            for record in records
            if (event := joined.get(record.seq, record.event)) is not None
        ]

    def _pseudonym(self, kind: str, value: str) -> str:
        known = self._pseudonyms.setdefault(kind, {})
        return known.setdefault(value.casefold(), f"[{kind}-{len(known) + 1}]")

    def _event(self, event: Event) -> Event:
        built = self._walk(msgspec.to_builtins(event), "")
        if isinstance(event, Custom) and event.name == InputValue.event_name:
            built["value"].pop("images", None)
            built["value"]["principal"] = self._person(built["value"].get("principal", ""))
        if isinstance(event, StateSnapshot) and "owner" in event.snapshot:
            built["snapshot"]["owner"] = self._person(str(event.snapshot["owner"]))
        if isinstance(event, Custom):
            built["name"] = event.name
        redacted: Event = msgspec.convert(built, Event)
        return redacted

    def _person(self, name: str) -> str:
        if not name or name.casefold() in _ROLES or name.startswith("["):
            return name
        return self._pseudonym("name", self._people.get(name, name))

    def _walk(self, value: Any, key: str) -> Any:
        match value:
            case str() if key not in _STRUCTURAL:
                return self.text(value)
            case dict():
                return {name: self._walk(each, name) for name, each in value.items()}
            case list():
                return [self._walk(each, key) for each in value]
            case _:
                return value


def _principals(event: Event) -> set[str]:
    found: set[str] = set()
    if isinstance(event, StateSnapshot):
        found.add(str(event.snapshot.get("owner") or ""))
    elif isinstance(event, Custom) and event.name == InputValue.event_name:
        found.add(str(event.value.get("principal") or ""))
    return {name for name in found if name and name.casefold() not in _ROLES}


def _texts(records: Iterable[Record]) -> list[str]:
    """What people, the agent, its persona and its tools said."""
    spoken: dict[str, list[str]] = {}
    for record in records:
        match record.event:
            case TextMessageContent(message_id=message_id, delta=delta):
                spoken.setdefault(message_id, []).append(delta)
            case Custom(name=InputValue.event_name, value=value):
                spoken.setdefault(str(value.get("messageId")), []).append(str(value.get("text", "")))
            case ToolCallResult(tool_call_id=call, content=content):
                spoken.setdefault(call, []).append(content)
            case StateSnapshot(snapshot=snapshot):
                spoken[str(record.seq)] = [f"{snapshot.get('title')}\n{snapshot.get('persona')}"]
            case StateDelta(delta=patch):
                spoken[str(record.seq)] = [str(operation.get("value")) for operation in patch]
            case _:
                pass
    return ["".join(parts) for parts in spoken.values()]


def _joined(records: Sequence[Record]) -> dict[int, Event | None]:
    """By seq, the streamed pieces: the first one with the whole text, None for those that follow."""
    parts: dict[str, list[tuple[int, str]]] = {}
    for record in records:
        match record.event:
            case (
                TextMessageContent(message_id=key, delta=delta) | ToolCallArgs(tool_call_id=key, delta=delta)
            ):
                parts.setdefault(f"{type(record.event).__name__} {key}", []).append((record.seq, delta))
            case _:
                pass
    first = {pieces[0][0]: "".join(delta for _, delta in pieces) for pieces in parts.values()}
    events: dict[int, Event | None] = {}
    for record in records:
        if isinstance(record.event, TextMessageContent | ToolCallArgs):
            text = first.get(record.seq)
            events[record.seq] = None if text is None else msgspec.structs.replace(record.event, delta=text)
    return events


def _any_of(words: Iterable[str]) -> re.Pattern[str] | None:
    """Any of `words` as a whole word, the longest first."""
    ordered = sorted(words, key=lambda word: (-len(word), word))
    if not ordered:
        return None
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, ordered))})(?!\w)")
