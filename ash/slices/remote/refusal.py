"""What an answer that is no stream means: HTTP status and body -> a failure that says what to do. Pure."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec
from msgspec import Struct

from ash.domain.errors import EngineCrashed, FormatError, SliceUnavailable
from ash.slices.remote.failure import AttemptFailed, ContextExceeded, Retry, printable

_RETRIES: Final = {
    429: Retry.ALLOWED,
    500: Retry.ONCE,
    502: Retry.ALLOWED,
    503: Retry.ALLOWED,
    504: Retry.ALLOWED,
}
# llama-server names the error, OpenAI codes it, vLLM says it in words.
_CONTEXT_TYPES: Final = {"exceed_context_size_error", "context_length_exceeded"}
_CONTEXT_WORDS: Final = re.compile(
    r"maximum context length|available context size|context window", re.IGNORECASE
)
_PROMPT_TOKENS: Final = re.compile(
    r"(?:has|resulted in|contains at least) (\d{1,9}) (?:input )?tokens|\((\d{1,9}) in the messages"
)
_CONTEXT_TOKENS: Final = re.compile(r"maximum context length is (\d{1,9}) tokens")
_FORMAT_WORDS: Final = re.compile(r"schema|grammar|response_format|guided|structured", re.IGNORECASE)


class Refusal(Struct, frozen=True):
    """An answer with an error.

    Attributes:
        status: of HTTP; of an error in the middle of a stream the code that it names, else 500.
        message: what the endpoint says.
        kinds: the names and codes that it gives the error.
        prompt_tokens, context: tokens, where it says them.
        location: where a redirect leads.
        retry_after_s: the wait that it asks for.
    """

    status: int
    message: str
    kinds: frozenset[str] = frozenset()
    prompt_tokens: int | None = None
    context: int | None = None
    location: str | None = None
    retry_after_s: float | None = None


def read_refusal(
    status: int,
    body: bytes,
    *,
    location: str | None = None,
    retry_after_s: float | None = None,
    secret: str = "",
) -> Refusal:
    """The refusal in the body of an answer. Any body is read somehow.

    Args:
        status: of HTTP; 0 for an error in the middle of a stream, which may name one of its own.
        body: JSON in the form of any known endpoint, or whatever came in its place.
        location: the header of a redirect.
        retry_after_s: the wait that was asked for.
        secret: what must not appear in the result.
    """
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        # Plain text or HTML: shown as it is.
        decoded = body.decode("utf-8", "replace")
    fields: dict[str, Any] = decoded if isinstance(decoded, dict) else {}
    said: object = decoded
    if isinstance(fields.get("error"), dict):
        fields = fields["error"]
    elif fields:
        said = fields.get("error", decoded)
    said = fields.get("message") or fields.get("detail") or said

    def clean(text: str) -> str:
        # Before it is cut, or a part of the secret would be left.
        return printable(text.replace(secret, "***") if secret else text)

    message = clean(said if isinstance(said, str) else str(said))
    code = fields.get("code")
    if not status:
        status = code if isinstance(code, int) and 400 <= code <= 599 else 500
    return Refusal(
        status=status,
        message=message,
        kinds=frozenset(str(fields[key]) for key in ("type", "code") if fields.get(key) is not None),
        prompt_tokens=_whole(fields.get("n_prompt_tokens")) or _number(_PROMPT_TOKENS, message),
        context=_whole(fields.get("n_ctx")) or _number(_CONTEXT_TOKENS, message),
        location=clean(location) if location else None,
        retry_after_s=retry_after_s,
    )


def failure_of(
    refusal: Refusal, *, where: str, model: str, key_variable: str, formatted: bool
) -> AttemptFailed | ContextExceeded:
    """What a refusal means.

    Args:
        refusal: what the endpoint answered.
        where: slice and endpoint, to begin the message with.
        model: what was asked for.
        key_variable: the environment variable with the key; empty if none was sent.
        formatted: whether the answer was to have an output format.
    """
    status, said = refusal.status, refusal.message
    if status in {400, 413, 422, 500} and (
        refusal.kinds & _CONTEXT_TYPES or _CONTEXT_WORDS.search(said) is not None
    ):
        return ContextExceeded(
            f"{where} refused the prompt: {said}",
            prompt_tokens=refusal.prompt_tokens,
            context=refusal.context,
        )
    if formatted and status in {400, 422, 501} and _FORMAT_WORDS.search(said):
        return AttemptFailed(
            FormatError(f"{where} does not take the output format: {said}"), endpoint_down=False
        )
    if 300 <= status < 400:
        advice = (
            f"redirects to {refusal.location or 'nowhere'}; redirects are not followed, since they would "
            "take the key along: write the address itself as `url`"
        )
    elif status in {401, 403}:
        advice = (
            f"refuses the key in the environment variable {key_variable} (HTTP {status}): {said}"
            if key_variable
            else f"wants a key (HTTP {status}); name the environment variable that holds it as `api_key_env`"
        )
    elif status == 404:
        advice = (
            f"does not know the model {model!r} or the path (HTTP 404): {said}; write `model` as GET /models "
            "names it, and `url` up to where /chat/completions follows"
        )
    elif status == 429:
        advice = f"has too many requests (HTTP 429): {said}; lower `concurrency`, or wait"
    elif status >= 500:
        advice = f"failed (HTTP {status}): {said}; look into its log"
    else:
        advice = f"refused the request (HTTP {status}): {said}"
    return AttemptFailed(
        SliceUnavailable(f"{where} {advice}"),
        retry=_RETRIES.get(status, Retry.NEVER),
        retry_after_s=refusal.retry_after_s,
        endpoint_down=status >= 500,
    )


def broken_off(failure: AttemptFailed) -> EngineCrashed:
    """The error of a generation of which something was shown already: that stands."""
    return EngineCrashed(f"{failure.error}; what was streamed until then stands")


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _number(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    return int(next(group for group in found.groups() if group)) if found else None
