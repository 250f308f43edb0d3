"""What each method asks of the sessions, and which role it takes."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from ash.domain.errors import Forbidden, InvalidRequest
from ash.domain.values import Match, Principal, Role, SessionRow
from ash.gateway import params as p
from ash.gateway.service_port import SessionService

MINIMUM_ROLE: Final[dict[str, Role]] = {
    "session/new": Role.MEMBER,
    "session/list": Role.OBSERVER,
    "session/attach": Role.OBSERVER,
    "session/detach": Role.OBSERVER,
    "session/prompt": Role.MEMBER,
    "session/cancel": Role.MEMBER,
    "session/fork": Role.MEMBER,
    "session/delete": Role.MEMBER,
    "goal/add": Role.MEMBER,
    "goal/list": Role.OBSERVER,
    "goal/close": Role.MEMBER,
    "autonomy/set": Role.MEMBER,
    "memory/search": Role.OBSERVER,
    "run/resume": Role.MEMBER,
}

_RANK: Final = {Role.OBSERVER: 0, Role.MEMBER: 1, Role.OWNER: 2}

Result = Mapping[str, Any]
# One handler takes one struct; the table below pairs them, so the parameter is Any here.
Handler = Callable[[Principal, Any], Awaitable[Result]]


def require_role(principal: Principal, method: str) -> None:
    """Check that the principal may call `method`.

    Raises:
        Forbidden: the role is too low.
    """
    needed = MINIMUM_ROLE[method]
    if _RANK[principal.role] < _RANK[needed]:
        raise Forbidden(
            f"{method} needs the role {needed}; the token of {principal.name!r} has {principal.role}"
        )


class SessionMethods:
    """Every method but those that concern the connection itself (initialize, attach, detach)."""

    def __init__(self, service: SessionService) -> None:
        self._service = service
        self._handlers: dict[type[p.Params], Handler] = {
            p.SessionNew: self._new,
            p.SessionList: self._list,
            p.SessionPrompt: self._prompt,
            p.SessionCancel: self._cancel,
            p.SessionFork: self._fork,
            p.SessionDelete: self._delete,
            p.GoalAdd: self._goal_add,
            p.GoalList: self._goal_list,
            p.GoalClose: self._goal_close,
            p.AutonomySet: self._autonomy,
            p.MemorySearch: self._search,
            p.RunResume: self._resume,
        }

    async def call(self, principal: Principal, params: p.Params) -> Result:
        """Execute one method and return its result in wire form.

        Raises:
            AshError: the request cannot be done; the kind says why.
        """
        return await self._handlers[type(params)](principal, params)

    async def _new(self, principal: Principal, params: p.SessionNew) -> Result:
        session_id = await self._service.new_session(
            principal,
            title=params.title,
            persona=params.persona,
            slice_name=params.slice,
            goals=params.goals or (),
        )
        return {"sessionId": session_id}

    async def _list(self, principal: Principal, params: p.SessionList) -> Result:
        rows, cursor = await self._service.list_sessions(principal, limit=params.limit, cursor=params.cursor)
        return {"sessions": [_session(row) for row in rows], "nextCursor": cursor}

    async def _prompt(self, principal: Principal, params: p.SessionPrompt) -> Result:
        text, images = split_prompt(params.prompt)
        receipt = await self._service.prompt(
            principal,
            params.session_id,
            text=text,
            images=images,
            idempotency_key=params.idempotency_key,
            when_busy=params.when_busy,
        )
        return {
            "runId": receipt.run_id,
            "messageId": receipt.message_id,
            "disposition": receipt.disposition,
        }

    async def _cancel(self, principal: Principal, params: p.SessionCancel) -> Result:
        return {"cancelled": await self._service.cancel(principal, params.session_id, params.run_id)}

    async def _fork(self, principal: Principal, params: p.SessionFork) -> Result:
        return {"sessionId": await self._service.fork(principal, params.session_id, params.at_seq)}

    async def _delete(self, principal: Principal, params: p.SessionDelete) -> Result:
        await self._service.delete(principal, params.session_id)
        return {}

    async def _goal_add(self, principal: Principal, params: p.GoalAdd) -> Result:
        return {"goalId": await self._service.add_goal(principal, params.session_id, params.text)}

    async def _goal_list(self, principal: Principal, params: p.GoalList) -> Result:
        return {"goals": await self._service.list_goals(principal, params.session_id)}

    async def _goal_close(self, principal: Principal, params: p.GoalClose) -> Result:
        await self._service.close_goal(principal, params.session_id, params.goal_id)
        return {}

    async def _autonomy(self, principal: Principal, params: p.AutonomySet) -> Result:
        return await self._service.set_autonomy(
            principal,
            params.session_id,
            enabled=params.enabled,
            interval_s=params.interval_s,
            budget=params.budget,
        )

    async def _search(self, principal: Principal, params: p.MemorySearch) -> Result:
        matches = await self._service.search_memory(principal, params.session_id, params.query, params.limit)
        return {"matches": [_match(match) for match in matches]}

    async def _resume(self, principal: Principal, params: p.RunResume) -> Result:
        run_id = await self._service.resume_run(
            principal,
            params.session_id,
            interrupt_id=params.interrupt_id,
            approve=params.decision == "approve",
            payload=params.payload,
        )
        return {"runId": run_id}


def split_prompt(parts: list[p.TextPart | p.ImagePart]) -> tuple[str, list[dict[str, str]]]:
    """The text of a prompt, its parts joined by line breaks, and its images.

    Raises:
        InvalidRequest: there is neither text nor image, or an image is not base64.
    """
    texts: list[str] = []
    images: list[dict[str, str]] = []
    for index, part in enumerate(parts):
        if isinstance(part, p.TextPart):
            texts.append(part.text)
            continue
        try:
            base64.b64decode(part.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest(f"params.prompt[{index}].data is not base64: {error}") from None
        images.append({"data": part.data, "mimeType": part.mime_type})
    text = "\n".join(texts)
    if not images and not text.strip():
        raise InvalidRequest("params.prompt has neither text nor an image")
    return text, images


def _session(row: SessionRow) -> dict[str, Any]:
    return {
        "sessionId": row.session_id,
        "title": row.title,
        "headSeq": row.head_seq,
        "state": row.state,
        "mode": row.mode,
        "updatedAt": row.updated_at,
    }


def _match(match: Match) -> dict[str, Any]:
    return {
        "sessionId": match.session_id,
        "messageId": match.message_id,
        "role": match.role,
        "seq": match.seq,
        "ts": match.ts,
        "snippet": match.snippet,
        "score": match.score,
    }
