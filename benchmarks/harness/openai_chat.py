"""A conversation with a server that speaks OpenAI's streaming chat completions."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp

from benchmarks.harness.conversation import Answer, Piece

ANSWER_LIMIT_S = 600.0


class OpenAiConversation:
    """One history, sent whole with every request.

    Args:
        base: the server's address.
        persona: the system message.
        request: further fields of every request, such as `max_tokens`.
    """

    def __init__(self, base: str, persona: str, request: Mapping[str, Any]) -> None:
        self._url = f"{base}/v1/chat/completions"
        self._messages = [{"role": "system", "content": persona}]
        self._request = {**request, "stream": True, "stream_options": {"include_usage": True}}
        # llama-server closes a kept connection after five seconds, while the other sessions still answer:
        # a new connection for each request costs a tenth of a millisecond and loses no request.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True),
            timeout=aiohttp.ClientTimeout(total=ANSWER_LIMIT_S),
        )

    async def ask(self, text: str) -> Answer:
        """Ask and wait for the whole answer; what goes wrong is in `Answer.failure`."""
        self._messages.append({"role": "user", "content": text})
        body = {**self._request, "messages": self._messages}
        pieces: list[Piece] = []
        words: list[str] = []
        usage: dict[str, Any] = {}
        failure = None
        asked_at = time.perf_counter()
        try:
            async with self._session.post(self._url, json=body) as response:
                if response.status != 200:
                    failure = f"HTTP {response.status}: {(await response.text())[:300]}"
                else:
                    async for chunk in _chunks(response.content):
                        at = time.perf_counter()
                        delta = (chunk.get("choices") or [{}])[0].get("delta", {}).get("content")
                        if delta:
                            pieces.append(Piece(at, len(delta)))
                            words.append(delta)
                        usage = chunk.get("usage") or usage
                    failure = None if pieces else "the stream ended without text"
        except (aiohttp.ClientError, TimeoutError) as error:
            failure = f"{type(error).__name__}: {error}"
        answer = "".join(words)
        self._messages.append({"role": "assistant", "content": answer})
        return Answer(
            asked_at,
            tuple(pieces),
            answer,
            int(usage.get("completion_tokens", len(pieces))),
            prompt_tokens=usage.get("prompt_tokens"),
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
            failure=failure,
        )

    async def close(self) -> None:
        """Close the client; the server keeps nothing."""
        await self._session.close()


async def _chunks(stream: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, until `[DONE]`."""
    async for line in stream:
        field, _, value = line.decode().strip().partition(": ")
        if field != "data":
            continue
        if value == "[DONE]":
            return
        yield json.loads(value)
