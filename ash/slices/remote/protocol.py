"""The OpenAI chat completions API as far as Ash speaks it: what is sent, what is read. Pure.

Source: https://platform.openai.com/docs/api-reference/chat (streaming), and tools/server/README.md of
llama.cpp for `prompt_progress`, `timings` and the errors of llama-server. What an endpoint sends
beside is ignored.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from ash.domain.errors import FormatError
from ash.domain.values import ChatMessage, OutputFormat, Sampling
from ash.slices.conversation import alternating
from ash.slices.remote.dialect import Dialect
from ash.slices.remote.failure import MalformedStream

END_OF_STREAM = "[DONE]"
"""The data of the event behind the last chunk."""


class ChunkDelta(Struct, frozen=True):
    """Text of a chunk. Reasoning is not shown, but it is a sign of life."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChunkChoice(Struct, frozen=True):
    delta: ChunkDelta | None = None
    finish_reason: str | None = None


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int | None = None


class Usage(Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: PromptTokensDetails | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not prefilled again; 0 also where the endpoint does not say."""
        details = self.prompt_tokens_details
        return (details.cached_tokens or 0) if details is not None else 0


class PromptProgress(Struct, frozen=True):
    """How far llama-server is with a prompt, in tokens."""

    total: int
    cache: int = 0


class Timings(Struct, frozen=True):
    """llama-server's times of one answer, milliseconds."""

    prompt_ms: float = 0.0
    predicted_ms: float = 0.0


class Chunk(Struct, frozen=True):
    """One event of the stream."""

    choices: list[ChunkChoice] = []
    usage: Usage | None = None
    timings: Timings | None = None
    prompt_progress: PromptProgress | None = None
    error: dict[str, Any] | str | None = None

    @property
    def text(self) -> str:
        """What it adds to the answer."""
        return "".join(choice.delta.content or "" for choice in self.choices if choice.delta is not None)

    @property
    def is_piece(self) -> bool:
        """Whether the model produced something: text, reasoning, or the end."""
        return any(
            choice.finish_reason
            or (
                choice.delta is not None
                and (choice.delta.content or choice.delta.reasoning_content or choice.delta.reasoning)
            )
            for choice in self.choices
        )

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended; None before its end."""
        return next((choice.finish_reason for choice in self.choices if choice.finish_reason), None)


class ModelMeta(Struct, frozen=True):
    """What llama-server says of a model; `n_ctx` is the context of one slot."""

    n_ctx: int | None = None


class Model(Struct, frozen=True):
    """A model of GET /models; `max_model_len` is vLLM's."""

    id: str
    owned_by: str | None = None
    max_model_len: int | None = None
    meta: ModelMeta | None = None

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer that it takes; None where the endpoint does not say."""
        return self.max_model_len or (self.meta.n_ctx if self.meta is not None else None)


class ModelList(Struct, frozen=True):
    """The answer of GET /models."""

    data: list[Model]

    def find(self, name: str) -> Model | None:
        """The model that a request for `name` gets: of that id, or the only one there is."""
        named = [model for model in self.data if model.id == name]
        candidates = named or self.data
        return candidates[0] if len(candidates) == 1 else None


_chunk_decoder = msgspec.json.Decoder(Chunk)


def decode_chunk(data: str) -> Chunk:
    """The chunk in the data of an event.

    Raises:
        MalformedStream: it is none.
    """
    try:
        return _chunk_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise MalformedStream(f"an event that is no chat completion chunk ({error})") from error


def request_body(
    model: str,
    messages: tuple[ChatMessage, ...],
    sampling: Sampling,
    dialect: Dialect,
    *,
    stop: tuple[str, ...],
    max_tokens: int,
    continuation: str = "",
    output_format: OutputFormat | None = None,
) -> bytes:
    """The JSON body of POST /chat/completions.

    Raises:
        FormatError: the endpoint cannot constrain its answers to `output_format`, or that is no JSON schema.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": message.role, "content": _unicode(message.text)} for message in alternating(messages)
        ],
        "stream": True,
        "max_tokens": max_tokens,
        **dialect.sampling(sampling),
        **dialect.always,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if stop := tuple(_unicode(text) for text in stop if text)[: dialect.most_stops]:
        body["stop"] = stop
    if continuation:
        body["messages"].append({"role": "assistant", "content": _unicode(continuation)})
        body |= dialect.continuing
    if output_format is not None:
        body["response_format"] = _response_format(output_format)
    return msgspec.json.encode(body)


def _unicode(text: str) -> str:
    """`text` without lone surrogates, which have no UTF-8 and which no JSON parser takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _response_format(output_format: OutputFormat) -> dict[str, Any]:
    if output_format.syntax != "json_schema":
        raise FormatError(
            f"an OpenAI-compatible endpoint cannot constrain an answer to a {output_format.syntax} format; "
            "give a JSON schema, or use a local slice"
        )
    try:
        schema = msgspec.json.decode(output_format.definition.encode("utf-8", "replace"), type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise FormatError(f"the JSON schema of the output format cannot be read: {error}") from error
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
