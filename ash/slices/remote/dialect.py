"""Where endpoints differ: which fields beyond OpenAI's they take, and how they continue an answer. Pure.

A field that an endpoint does not know may be refused, so each dialect sends only what is known to be taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from msgspec import Struct

from ash.domain.values import Sampling


class Dialect(Struct, frozen=True):
    """How to speak to one kind of endpoint.

    Attributes:
        name: as in `remote.dialect` of config.toml.
        top_k, min_p, repeat_penalty: the names of these fields; None where they are not taken.
        always: further fields of every request.
        continuing: further fields of a request whose last message is the beginning of the answer.
        echoes: whether the answer may begin with that beginning once more.
        most_stops: how many stop strings it takes; None for any number.
    """

    name: str
    top_k: str | None = None
    min_p: str | None = None
    repeat_penalty: str | None = None
    always: dict[str, Any] = {}
    continuing: dict[str, Any] = {}
    echoes: bool = False
    most_stops: int | None = None

    def sampling(self, values: Sampling) -> dict[str, float]:
        """The fields for `values`; what this dialect has no name for is left out."""
        names = {
            "temperature": values.temperature,
            "top_p": values.top_p,
            self.top_k: values.top_k,
            self.min_p: values.min_p,
            self.repeat_penalty: values.repeat_penalty,
        }
        return {name: value for name, value in names.items() if name is not None}


OPENAI: Final = Dialect(
    "openai",
    always={"stream_options": {"include_usage": True}},
    echoes=True,
    most_stops=4,
)
"""OpenAI's own fields only; also right for Ollama, which continues a last message of the assistant."""

LLAMACPP: Final = Dialect(
    "llamacpp",
    top_k="top_k",
    min_p="min_p",
    repeat_penalty="repeat_penalty",
    # The first chunk then tells the tokens of the prompt and how many of them were in the cache.
    always={"stream_options": {"include_usage": True}, "return_progress": True},
    # Without these llama-server continues a last assistant message as well, but repeats it in its answer.
    continuing={"continue_final_message": True, "add_generation_prompt": False},
)
"""llama-server of llama.cpp."""

VLLM: Final = Dialect(
    "vllm",
    top_k="top_k",
    min_p="min_p",
    # Over the whole prompt instead of the last 64 tokens.
    repeat_penalty="repetition_penalty",
    # The first chunk then tells the tokens of the prompt.
    always={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    continuing={"continue_final_message": True, "add_generation_prompt": False},
)
"""vLLM, also behind Ray Serve."""

DIALECTS: Final = {dialect.name: dialect for dialect in (OPENAI, LLAMACPP, VLLM)}


def detect(owners: Iterable[str | None]) -> Dialect:
    """The dialect of an endpoint whose models have these `owned_by`; OpenAI's where they say nothing."""
    return next((DIALECTS[owner] for owner in owners if owner in DIALECTS), OPENAI)
