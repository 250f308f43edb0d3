"""One OpenAI-compatible endpoint over HTTP: which models it has, and streamed answers."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final

import aiohttp
import msgspec

from ash.domain.errors import SliceUnavailable
from ash.slices.remote.failure import AttemptFailed, ContextExceeded, MalformedStream, Retry, printable
from ash.slices.remote.protocol import END_OF_STREAM, Chunk, ChunkChoice, ModelList, decode_chunk
from ash.slices.remote.refusal import failure_of, read_refusal
from ash.slices.remote.retry import retry_after_s
from ash.slices.remote.sse import SseParser
from ash.slices.spec import RemoteSpec

_BODY_LIMIT_BYTES: Final = 1 << 20
"""What is read of an answer that is no stream; the model lists of large gateways have a few hundred kB."""

_LINGER_S: Final = 0.05

_END: Final = Chunk(choices=[ChunkChoice(finish_reason="stop")])
"""Stands for [DONE], for streams whose last chunk gave no reason."""

# Nothing came back, so nothing was answered.
_CONNECTION_ERRORS: Final = (
    aiohttp.ClientOSError,
    aiohttp.ServerDisconnectedError,
    aiohttp.ConnectionTimeoutError,
)
_CERTIFICATE_ERRORS: Final = (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError)


class EndpointClient:
    """Talks to the endpoint of `remote`. The key goes into the header of requests and nowhere else.

    Args:
        slice_name: for error messages.
        model: the model's name at the endpoint.
        remote: address and timeouts.
        environment: holds the key.

    Raises:
        SliceUnavailable: the variable that is to hold the key is not set, or no header can carry its value.
    """

    def __init__(
        self, slice_name: str, model: str, remote: RemoteSpec, environment: Mapping[str, str]
    ) -> None:
        self._url = remote.url.rstrip("/")
        self._remote = remote
        self._model = model
        self.where = f"slice {slice_name}: the endpoint {self._url}"
        self._key = _key(slice_name, remote.api_key_env, environment)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._session = aiohttp.ClientSession(
            # Compressed, a short piece could unfold to gigabytes, and a stream of tokens gains little by it.
            headers={**headers, "Accept-Encoding": "identity"},
            auto_decompress=False,
            # How many run at a time is the engine's to say.
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, connect=remote.connect_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def models(self) -> ModelList:
        """The models that the endpoint has.

        Raises:
            AttemptFailed: it does not say.
        """
        try:
            async with self._request("GET", "/models", patience_s=self._remote.idle_timeout_s) as response:
                body = await self._body(response)
            return msgspec.json.decode(body, type=ModelList)
        except (msgspec.DecodeError, RecursionError) as error:
            raise self._failed(
                f"answers GET /models with {printable(response.content_type)} that is no list of models; "
                "write the base of the API as `url`, such as http://127.0.0.1:8080/v1"
            ) from error
        except ContextExceeded as error:
            raise self._failed(f"does not list its models: {error}") from error

    async def chunks(self, body: bytes, *, formatted: bool) -> AsyncGenerator[Chunk, None]:
        """The chunks of the answer to POST /chat/completions with this body.

        The last one has a finish reason; a stream that ends without was cut off, which is for the caller to
        judge. Leaving the iteration closes the connection, and with it ends the work behind it.

        Args:
            body: from `protocol.request_body`.
            formatted: whether it asks for an output format.

        Raises:
            AttemptFailed: it failed, timed out, or sent something else than a stream of chunks.
            ContextExceeded: the prompt is too long for it.
        """
        remote = self._remote
        sent_s = time.monotonic()
        async with self._request(
            "POST",
            "/chat/completions",
            body,
            patience_s=remote.first_token_timeout_s,
            late=f"did not begin to answer within first_token_timeout_s = {remote.first_token_timeout_s:g}",
            formatted=formatted,
        ) as response:
            if response.content_type != "text/event-stream":
                raise self._foreign(response.content_type, await self._body(response), formatted=formatted)
            parser = SseParser()
            late = f"produced nothing within first_token_timeout_s = {remote.first_token_timeout_s:g}"
            # Only waiting counts: a consumer that reads slowly does not make the endpoint late.
            patience_s = remote.first_token_timeout_s - (time.monotonic() - sent_s)
            while True:
                waiting_s = time.monotonic()
                with self._translated(late):
                    async with asyncio.timeout(max(0.0, patience_s)):
                        data = await response.content.readany()
                    events = parser.feed(data)
                patience_s -= time.monotonic() - waiting_s
                if not data:
                    return
                for event in events:
                    if event == END_OF_STREAM:
                        await _linger(response)
                        yield _END
                        return
                    with self._translated(late):
                        chunk = decode_chunk(event)
                    if chunk.error is not None:
                        raise self._refused(0, msgspec.json.encode(chunk.error), formatted=formatted)
                    if chunk.is_piece:
                        late = f"fell silent for idle_timeout_s = {remote.idle_timeout_s:g}"
                        patience_s = remote.idle_timeout_s
                    yield chunk

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        patience_s: float,
        late: str = "does not answer",
        formatted: bool = False,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a request, its body unread, once it has status 200."""
        with self._translated(late):
            async with asyncio.timeout(patience_s):
                response = await self._session.request(
                    method,
                    self._url + path,
                    data=body,
                    headers={"Content-Type": "application/json"} if body is not None else None,
                    # A redirect would take the key to wherever it leads.
                    allow_redirects=False,
                )
        try:
            if response.status != 200:
                raise self._refused(
                    response.status,
                    await self._body(response),
                    formatted=formatted,
                    location=response.headers.get("Location"),
                    retry_after=response.headers.get("Retry-After"),
                )
            yield response
        finally:
            # Keeps the connection if the body was read to its end, and closes it otherwise.
            response.release()

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        """The body, or as much of it as is of use."""
        parts: list[bytes] = []
        size = 0
        with self._translated("did not finish a short answer"):
            async with asyncio.timeout(self._remote.idle_timeout_s):
                while size < _BODY_LIMIT_BYTES and (part := await response.content.readany()):
                    parts.append(part)
                    size += len(part)
        return b"".join(parts)

    def _foreign(self, content_type: str, body: bytes, *, formatted: bool) -> AttemptFailed | ContextExceeded:
        """What success without a stream means: an error in disguise, or something else than this API."""
        refusal = read_refusal(200, body, secret=self._key)
        if content_type == "application/json" and b'"error"' in body:
            return self._refused(0, body, formatted=formatted)
        return self._failed(
            f"answers with {printable(content_type)} in place of an event stream: {refusal.message}; write "
            "the base of an OpenAI-compatible API as `url`, such as http://127.0.0.1:8080/v1"
        )

    def _refused(
        self,
        status: int,
        body: bytes,
        *,
        formatted: bool,
        location: str | None = None,
        retry_after: str | None = None,
    ) -> AttemptFailed | ContextExceeded:
        refusal = read_refusal(
            status,
            body,
            location=location,
            retry_after_s=retry_after_s(retry_after, now_s=time.time()),
            secret=self._key,
        )
        return failure_of(
            refusal,
            where=self.where,
            model=self._model,
            key_variable=self._remote.api_key_env,
            formatted=formatted,
        )

    def _failed(self, what: str, retry: Retry = Retry.NEVER) -> AttemptFailed:
        return AttemptFailed(SliceUnavailable(f"{self.where} {what}"), retry=retry)

    @contextmanager
    def _translated(self, late: str) -> Iterator[None]:
        """Turn what aiohttp raises into failures; `late` is what to say when the time is up."""
        try:
            yield
        except _CERTIFICATE_ERRORS as error:
            raise self._failed(f"shows a certificate that is not trusted: {self._reason(error)}") from error
        except _CONNECTION_ERRORS as error:
            raise self._failed(
                f"cannot be reached: {self._reason(error)}; start it, or correct `url`", Retry.ALLOWED
            ) from error
        except aiohttp.ClientError as error:
            raise self._failed(f"broke its answer off: {self._reason(error)}") from error
        except MalformedStream as error:
            raise self._failed(f"sends {self._reason(error)}; is it OpenAI-compatible?") from error
        except TimeoutError as error:
            raise self._failed(late) from error

    def _reason(self, error: Exception) -> str:
        text = str(error) or type(error).__name__
        if isinstance(error, aiohttp.ClientConnectorError) and error.errno is not None:
            # The name of the error alone: address and details of the library are no help beside the url.
            text = os.strerror(error.errno) if error.errno > 0 else error.strerror or text
        return printable(text.replace(self._key, "***") if self._key else text)


async def _linger(response: aiohttp.ClientResponse) -> None:
    """Give the end of the body behind [DONE] a moment to come, so that the connection can be used again."""
    with suppress(TimeoutError, aiohttp.ClientError):
        # The answer is whole: whatever happens here costs a new connection and nothing else.
        async with asyncio.timeout(_LINGER_S):
            await response.content.readany()


def _key(slice_name: str, variable: str, environment: Mapping[str, str]) -> str:
    """The key in the environment; empty if none is wanted."""
    if not variable:
        return ""
    key = environment.get(variable, "").strip()
    if not key:
        raise SliceUnavailable(
            f"slice {slice_name}: its key is to be in the environment variable {variable}, which is not set; "
            "set it, or leave `api_key_env` out if the endpoint wants no key"
        )
    if not (key.isascii() and key.isprintable()):
        raise SliceUnavailable(
            f"slice {slice_name}: the environment variable {variable} holds characters that no key has; "
            "set it anew"
        )
    return key
