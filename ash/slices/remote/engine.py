"""RemoteEngine: runs one slice at an OpenAI-compatible endpoint (port Engine)."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Final, TypeVar

import structlog

from ash.domain.errors import EngineCrashed, SliceUnavailable
from ash.domain.values import Delta, EngineItem, Finished, GenerateRequest
from ash.slices.remote.answer import AnswerReader
from ash.slices.remote.breaker import CircuitBreaker, Permit
from ash.slices.remote.client import EndpointClient
from ash.slices.remote.dialect import DIALECTS, OPENAI, detect
from ash.slices.remote.failure import AttemptFailed, ContextExceeded, MalformedStream
from ash.slices.remote.protocol import ModelList, request_body
from ash.slices.remote.refusal import broken_off
from ash.slices.remote.retry import RetryPolicy
from ash.slices.remote.sizing import PromptPlan, PromptSizer
from ash.slices.remote.turns import SessionTurns
from ash.slices.spec import MODEL_SCHEME, SliceSpec

_ITEMS_AHEAD: Final = 16
"""How many items may wait for the consumer; behind them the endpoint is held back by TCP."""

_MOST_PLANS: Final = 5
"""How often a prompt is cut to what the endpoint takes. Each refusal says more, so few are needed."""

_log = structlog.get_logger(__name__)

Result = TypeVar("Result")
Emit = Callable[[EngineItem], Awaitable[None]]


class RemoteGeneration:
    """A generation of a RemoteEngine (port Generation); it starts when it is iterated, once.

    A task of its own sends the request and reads the answer, so that cancelling the task ends whatever it is
    at: a queue, a wait before a retry, a connection.
    """

    def __init__(self, engine: RemoteEngine, request: GenerateRequest) -> None:
        self._engine = engine
        self._request = request
        self._items: asyncio.Queue[EngineItem | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(_ITEMS_AHEAD)
        self._task: asyncio.Task[None] | None = None
        self._cancelled = asyncio.Event()

    def cancel(self) -> None:
        """Stop at once, also while the request waits; the connection is closed."""
        self._cancelled.set()
        if self._task is not None:
            self._task.cancel()

    async def __aiter__(self) -> AsyncIterator[EngineItem]:
        if self._cancelled.is_set():
            yield Finished("cancelled", 0)
            return
        task = self._task = self._engine.start(self._request, self._emit)
        task.add_done_callback(lambda _: self._items.put_nowait(None))
        texts = 0
        try:
            while (item := await self._items.get()) is not None and not self._cancelled.is_set():
                self._room.release()
                yield item
                if isinstance(item, Finished):
                    return
                texts += isinstance(item, Delta)
        finally:
            # The consumer may have left in the middle.
            task.cancel()
            await asyncio.wait({task})
            failure = None if task.cancelled() else task.exception()
        if self._cancelled.is_set():
            # One for each token, or a little fewer.
            yield Finished("cancelled", texts)
            return
        if failure is not None:
            raise failure
        raise EngineCrashed(f"slice {self._engine.name} was closed while it answered")

    async def _emit(self, item: EngineItem) -> None:
        await self._room.acquire()
        self._items.put_nowait(item)


class RemoteEngine:
    """Runs the slice of `spec` at its endpoint (port Engine).

    The prompt is cut to the context by estimate (see `sizing`). An answer that was begun is continued by
    sending its beginning as the last message, of the assistant. Nothing is sent again once a part of the
    answer was given out: that is the caller's to decide.

    Args:
        spec: what to run; its `remote` is set.
        environment: where the key is.
        monotonic: seconds of a clock that never goes back.
        uniform: a random number between two others, for the jitter of retries.
    """

    def __init__(
        self,
        spec: SliceSpec,
        *,
        environment: Mapping[str, str],
        monotonic: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        remote = spec.remote
        assert remote is not None, "catalog.validate takes no `openai:` model without a [remote] table"
        self._spec = spec
        self._remote = remote
        self._model = spec.model.removeprefix(MODEL_SCHEME)
        self._environment = environment
        self._monotonic = monotonic
        self._retry = RetryPolicy(retries=remote.retries, backoff_s=remote.backoff_s, uniform=uniform)
        self._breaker = CircuitBreaker(
            failures=remote.breaker_failures, reset_s=remote.breaker_reset_s, monotonic=monotonic
        )
        self._turns = SessionTurns(remote.concurrency)
        self._sizer = PromptSizer(spec.context)
        # `auto` is decided when the endpoint has told what it is.
        self._dialect = DIALECTS.get(remote.dialect, OPENAI)
        self._client: EndpointClient | None = None
        self._opening = asyncio.Lock()
        self._closed = False
        self._running: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        """The slice's name."""
        return self._spec.name

    @property
    def loaded(self) -> bool:
        """True once the endpoint has answered, unless it failed so often that it is left alone."""
        return self._client is not None and self._breaker.state != "open"

    async def open(self) -> None:
        """See that the endpoint is there and what it is. Idempotent; opens a closed engine again.

        Raises:
            SliceUnavailable: it does not answer, or its key is missing; the message says what to do.
        """
        self._closed = False
        if self._breaker.state == "open":
            raise self._left_alone(self._client)
        await self._ensure_client()

    async def forget(self, session_id: str) -> None:
        """Nothing: the endpoint is sent whole conversations, and what it caches is its own affair."""

    async def close(self) -> None:
        """Close all connections. Running generations raise EngineCrashed."""
        self._closed = True
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(set(self._running))
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def generate(self, request: GenerateRequest) -> RemoteGeneration:
        """See the port. The endpoint is looked at first if it was not.

        Iterating it raises FormatError as well, where the endpoint cannot do the format.
        """
        return RemoteGeneration(self, request)

    def start(self, request: GenerateRequest, emit: Emit) -> asyncio.Task[None]:
        """Answer `request` in a task that hands every item to `emit`, Finished last, or raises."""
        task = asyncio.create_task(self._answer(request, emit), name=f"answer of {self.name}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        # Marks a failure as seen, should the consumer have gone by then.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _answer(self, request: GenerateRequest, emit: Emit) -> None:
        if self._closed:
            raise SliceUnavailable(f"slice {self.name} is closed; open it first")
        if request.format is not None and request.continuation:
            raise SliceUnavailable(
                f"slice {self.name}: an endpoint cannot go on with an answer that has an output format; "
                "repeat the run from its beginning, or give the slice a local `fallback`"
            )
        async with self._turns.turn(request.session_id):
            client = await self._ensure_client()
            sampling = request.sampling or self._spec.sampling
            plan = self._sizer.plan(request, max_tokens=sampling.max_tokens)
            for _ in range(_MOST_PLANS):
                try:
                    await self._with_retries(client, partial(self._attempt, client, request, plan, emit))
                except ContextExceeded as refused:
                    plan = self._sizer.replan(request, plan, refused, max_tokens=sampling.max_tokens)
                    _log.info("a prompt is cut", slice=self.name, run=request.run_id)
                else:
                    return
            raise SliceUnavailable(
                f"{client.where} refuses every prompt as too long; set `context` to what it takes"
            )

    async def _with_retries(
        self, client: EndpointClient, attempt: Callable[[Permit], Awaitable[Result]]
    ) -> Result:
        """The result of the first attempt that succeeds, within what retry policy and circuit breaker allow.

        Raises:
            SliceUnavailable, FormatError: no attempt succeeded, or none was allowed.
        """
        attempts = 0
        last_failure: AttemptFailed | None = None
        while True:
            permit = self._breaker.admit()
            if permit is None:
                # What opened the breaker says more than that it is open.
                raise last_failure.error if last_failure is not None else self._left_alone(client)
            attempts += 1
            try:
                return await attempt(permit)
            except AttemptFailed as failure:
                last_failure = failure
                if failure.endpoint_down:
                    permit.failed()
                delay_s = self._retry.delay(failure, attempts)
                if delay_s is None:
                    raise failure.error from failure
            finally:
                # Without effect if the attempt has told its end.
                permit.abandoned()
            _log.warning(
                "a request is sent again",
                slice=self.name,
                seconds=round(delay_s, 2),
                reason=str(last_failure),
            )
            await asyncio.sleep(delay_s)

    async def _attempt(
        self,
        client: EndpointClient,
        request: GenerateRequest,
        plan: PromptPlan,
        emit: Emit,
        permit: Permit,
    ) -> None:
        """Send the request once and hand on the answer.

        Raises:
            AttemptFailed: nothing was handed on.
            EngineCrashed: something was.
            ContextExceeded, FormatError: see the client and `request_body`.
        """
        sampling = request.sampling or self._spec.sampling
        stop = self._spec.stop + sampling.stop
        body = request_body(
            self._model,
            plan.messages,
            sampling,
            self._dialect,
            stop=stop,
            max_tokens=plan.max_tokens,
            continuation=request.continuation,
            output_format=request.format,
        )
        reader = AnswerReader(
            estimated_tokens=plan.tokens,
            dropped=plan.dropped,
            max_tokens=plan.max_tokens,
            stops=stop,
            continuation=request.continuation,
            echoes=self._dialect.echoes,
            began_s=self._monotonic(),
        )
        try:
            async with aclosing(client.chunks(body, formatted=request.format is not None)) as chunks:
                async for chunk in chunks:
                    permit.answered()
                    for item in reader.read(chunk, self._monotonic()):
                        await emit(item)
                    if reader.stopped:
                        break
        except MalformedStream as error:
            permit.failed()
            raise EngineCrashed(
                f"{client.where} sends {error}; what was streamed until then stands"
            ) from error
        except ContextExceeded as error:
            if not reader.started:
                raise
            raise EngineCrashed(f"{error}; what was streamed until then stands") from error
        except AttemptFailed as failure:
            # An answer that has its end is whole, whatever became of the connection behind it.
            if reader.finish is None:
                if not reader.started:
                    raise
                permit.failed()
                raise broken_off(failure) from failure
        if reader.finish is None:
            permit.failed()
            raise EngineCrashed(f"{client.where} ended its answer in the middle; what was streamed stands")
        permit.succeeded()
        self._sizer.learn(plan, reader.prompt_tokens or 0)
        await emit(reader.finished())

    async def _ensure_client(self) -> EndpointClient:
        """The client of the endpoint, which was there when it was opened.

        Raises:
            SliceUnavailable: as `open`; also when the engine is closed.
        """
        async with self._opening:
            if self._client is not None:
                return self._client
            client = EndpointClient(self.name, self._model, self._remote, self._environment)
            try:
                await self._look_at(client)
                if self._closed:
                    raise SliceUnavailable(f"slice {self.name} was closed while it was opened")
            except BaseException:
                await client.close()
                raise
            self._client = client
            return client

    async def _look_at(self, client: EndpointClient) -> None:
        """Find out what the endpoint is and how much it takes."""

        async def attempt(_: Permit) -> ModelList:
            # That models are listed says little of whether they answer: no success for the breaker.
            return await client.models()

        models = await self._with_retries(client, attempt)
        if self._remote.dialect == "auto":
            self._dialect = detect(model.owned_by for model in models.data)
        model = models.find(self._model)
        context = model.context if model is not None else None
        if context is not None and context < self._spec.context:
            _log.warning(
                "the endpoint takes less than the slice's `context`",
                slice=self.name,
                endpoint=context,
                context=self._spec.context,
            )
        self._sizer.context = min(self._spec.context, context or self._spec.context)
        _log.info("endpoint found", slice=self.name, url=self._remote.url, dialect=self._dialect.name)

    def _left_alone(self, client: EndpointClient | None) -> SliceUnavailable:
        where = client.where if client is not None else f"slice {self.name}: the endpoint {self._remote.url}"
        wait_s = self._breaker.remaining_s
        return SliceUnavailable(
            f"{where} failed {self._remote.breaker_failures} times in a row and is left alone "
            + (f"for another {wait_s:.0f} s" if wait_s else "until the one request that tries it is answered")
        )
