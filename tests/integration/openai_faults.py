"""Ways for an OpenAI-compatible endpoint to go wrong: answers to put into `StandIn.faults`."""

from __future__ import annotations

import asyncio
import gzip
from typing import Any

from aiohttp import web

from tests.integration.openai_stand_in import Fault, event_stream, piece, send


def status(code: int, body: str = '{"error": {"message": "no luck"}}', **headers: str) -> Fault:
    async def answer(_: web.Request) -> web.StreamResponse:
        content_type = "application/json" if body.startswith("{") else "text/html"
        return web.Response(status=code, text=body, content_type=content_type, headers=headers)

    return answer


def stream(*parts: str | bytes | dict[str, Any], then: str = "end") -> Fault:
    """A stream of these parts that then ends, is reset, or says nothing more."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await event_stream(request)
        for part in parts:
            if isinstance(part, dict):
                await send(response, part)
            else:
                await response.write(part.encode() if isinstance(part, str) else part)
        if then == "reset":
            assert request.transport is not None
            request.transport.abort()
        if then == "silence":
            await asyncio.Event().wait()
        return response

    return answer


async def unanswered(request: web.Request) -> web.StreamResponse:
    """Close the connection without a word."""
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def silent(_: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def pinging(request: web.Request) -> web.StreamResponse:
    response = await event_stream(request)
    while True:
        await response.write(b": ping\n\n")
        await asyncio.sleep(0.005)  # an endless stream, at a pace that leaves the client its turn


async def compressed(request: web.Request) -> web.StreamResponse:
    """A stream that was not asked to be compressed, and whose length compression would hide."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Content-Encoding": "gzip"})
    await response.prepare(request)
    await response.write(gzip.compress(b'data: {"choices": []}\n\ndata: [DONE]\n\n'))
    return response


async def endless_line(request: web.Request) -> web.StreamResponse:
    response = await event_stream(request)
    await response.write(b"data: ")
    while True:
        await response.write(b"x" * 65536)


async def endless_answer(request: web.Request) -> web.StreamResponse:
    response = await event_stream(request)
    while True:
        await send(response, piece("and on " * 1000))
