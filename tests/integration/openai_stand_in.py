"""A local OpenAI-compatible endpoint that answers from a script and has faults on purpose.

It speaks like llama-server: tokens are words, the slot with the longest common beginning is reused, a prompt
that is too long is refused with its numbers. A step of the model takes a millisecond, so that answers really
stream and run side by side.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from ash.slices.fake import words_of
from ash.slices.spec import RemoteSpec, SliceSpec

STEP_S = 0.001

Script = Callable[[str], str]
Fault = Callable[[web.Request], Awaitable[web.StreamResponse]]


def told(last_message: str) -> str:
    """A long answer, different for different questions."""
    subject = last_message.rsplit(maxsplit=1)[-1]
    return " ".join(f"{subject}{number}" for number in range(400))


class StandIn:
    """The endpoint.

    Attributes:
        url: base of the API.
        owned_by: what its model list says, by which the dialect is found.
        faults: answers that come, in order, in place of the next completions.
        models_fault: comes in place of every model list while it is set.
        bodies: what was asked for, newest last.
        headers: of those requests.
        clients: addresses that requests came from, one for each connection.
        running: answers that are being sent.
        most_running: the most there were at a time.
        aborted: answers whose client went away.
        ended: set once an answer was ended.
        paused: cleared, no further token is sent.
    """

    def __init__(self, script: Script = told, *, context: int = 512, owned_by: str = "llamacpp") -> None:
        self._script = script
        self._context = context
        self._prompts: list[list[str]] = []
        self.url = ""
        self.owned_by = owned_by
        self.faults: list[Fault] = []
        self.models_fault: Fault | None = None
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.running = 0
        self.most_running = 0
        self.aborted = 0
        self.clients: set[object] = set()
        self.ended = asyncio.Event()
        self.paused = asyncio.Event()
        self.paused.set()

    def spec(self, name: str = "remote", **remote: Any) -> SliceSpec:
        """A slice at this endpoint, quick to retry."""
        settings = {"backoff_s": 0.001, "connect_timeout_s": 5.0, **remote}
        return SliceSpec(
            name, "nano", "openai:story", remote=RemoteSpec(self.url, **settings), context=self._context
        )

    async def models(self, request: web.Request) -> web.StreamResponse:
        if self.models_fault is not None:
            return await self.models_fault(request)
        model: dict[str, Any] = {"id": "story", "object": "model", "owned_by": self.owned_by}
        if self.owned_by == "llamacpp":
            model["meta"] = {"n_ctx": self._context}
        if self.owned_by == "vllm":
            model["max_model_len"] = self._context
        return web.json_response({"object": "list", "data": [model]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        assert request.transport is not None
        self.clients.add(request.transport.get_extra_info("peername"))
        if self.faults:
            return await self.faults.pop(0)(request)
        messages = list(body["messages"])
        continuation = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
        question = messages[-1]["content"]
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: " + continuation
        prompt = words_of(text)
        if len(prompt) >= self._context:
            return self._too_long(body, len(prompt))
        if self.owned_by == "vllm" and len(prompt) + body["max_tokens"] > self._context:
            return self._too_long(body, len(prompt))
        answer = words_of(self._script(question).removeprefix(continuation))
        room = min(body["max_tokens"], self._context - len(prompt))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._stream(request, body, text, answer[:room], cut=len(answer) > room)
        except ConnectionError:
            self.aborted += 1
            raise
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.running -= 1
            self.ended.set()

    def _too_long(self, body: dict[str, Any], tokens: int) -> web.StreamResponse:
        if self.owned_by == "llamacpp":
            error: dict[str, Any] = {
                "code": 400,
                "message": f"request ({tokens} tokens) exceeds the available context size",
                "type": "exceed_context_size_error",
                "n_prompt_tokens": tokens,
                "n_ctx": self._context,
            }
        elif self.owned_by == "vllm":
            error = {
                "code": 400,
                "type": "BadRequestError",
                "message": f"'max_tokens' is too large: {body['max_tokens']}. This model's maximum context "
                f"length is {self._context} tokens and your request has {tokens} input tokens.",
            }
        else:
            error = {"message": "Your input exceeds the context window", "code": "context_length_exceeded"}
        return web.json_response({"error": error}, status=400)

    async def _stream(
        self, request: web.Request, body: dict[str, Any], text: str, answer: list[str], *, cut: bool
    ) -> web.StreamResponse:
        prompt = words_of(text)
        reused = max((common(prompt, held) for held in self._prompts), default=0)
        response = await event_stream(request)
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": reused},
        }
        first: dict[str, Any] = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]}
        if body.get("return_progress"):
            first["prompt_progress"] = {"total": len(prompt), "cache": reused, "processed": 0, "time_ms": 0}
        if body["stream_options"].get("continuous_usage_stats"):
            first["usage"] = usage
        await send(response, first)
        sent: list[str] = []
        for word in answer:
            await asyncio.sleep(STEP_S)  # an answer that takes time, so that it can be cancelled in between
            await self.paused.wait()
            await send(response, piece(word))
            sent.append(word)
        reason = "length" if cut else "stop"
        await send(response, {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        self._prompts.append(words_of(text + "".join(sent)))
        usage["completion_tokens"] = len(sent)
        await send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


def common(one: list[str], other: list[str]) -> int:
    """How many tokens two prompts have in common at their beginning."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


async def event_stream(request: web.Request) -> web.StreamResponse:
    """The head of a stream."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    return response


def piece(text: str) -> dict[str, Any]:
    """The chunk of one token."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


async def send(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
    """One event of a stream."""
    await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


@asynccontextmanager
async def serving(stand_in: StandIn) -> AsyncIterator[StandIn]:
    """Listen on a free port of loopback for the length of the block."""
    application = web.Application()
    application.router.add_get("/v1/models", stand_in.models)
    application.router.add_post("/v1/chat/completions", stand_in.completions)
    # A client that goes away ends the work, as it does in llama-server.
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    stand_in.url = f"http://{host}:{port}/v1"
    try:
        yield stand_in
    finally:
        await runner.cleanup()
