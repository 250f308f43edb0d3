"""What the gateway needs of the sessions; `ash.session.service` stands behind it.

Everything may raise the request, store and slice errors of `ash.domain.errors`. The gateway passes the
principal and checks the role a method needs; whose session it is, the service checks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from ash.domain.events import Record
from ash.domain.values import Match, Principal, SessionRow


class Published(Protocol):
    """One committed record and its `session/event` params as JSON, encoded once for all receivers."""

    @property
    def record(self) -> Record: ...

    @property
    def params_json(self) -> bytes: ...


class Subscription(Protocol):
    """Every event of one session after a cursor, in order, with no gap to the live ones.

    Iteration ends when the session is deleted or `close` was called, and raises SlowConsumer once more
    than `max_buffered` bytes of live events wait for this consumer.
    """

    @property
    def head_seq(self) -> int:
        """The last seq at the time of attaching."""

    @property
    def min_seq(self) -> int:
        """The first seq that can still be had."""

    @property
    def state(self) -> str:
        """`running`, `queued` or `idle` at the time of attaching."""

    @property
    def queue(self) -> Sequence[str]:
        """Run ids that wait, first in front, at the time of attaching."""

    def __aiter__(self) -> AsyncIterator[Published]: ...

    async def overflowed(self) -> None:
        """Return once more than `max_buffered` bytes wait.

        A consumer that is stuck in a send does not iterate, so it cannot learn it from the iteration.
        """

    def close(self) -> None:
        """End the iteration; idempotent."""


class PromptReceipt(Protocol):
    """Proof that an input is committed. `disposition` is `started` or `queued`."""

    @property
    def run_id(self) -> str: ...

    @property
    def message_id(self) -> str: ...

    @property
    def disposition(self) -> str: ...


class SessionService(Protocol):
    """The sessions, as the gateway calls them."""

    async def new_session(
        self,
        principal: Principal,
        /,
        *,
        title: str | None,
        persona: str | None,
        slice_name: str | None,
        goals: Sequence[str],
    ) -> str:
        """Create a session of this principal and return its id."""

    async def list_sessions(
        self, principal: Principal, /, *, limit: int, cursor: str | None
    ) -> tuple[list[SessionRow], str | None]:
        """A page of the sessions this principal may see, and the cursor of the next page."""

    async def attach(
        self, principal: Principal, session_id: str, /, *, after_seq: int, max_buffered: int
    ) -> Subscription: ...

    async def prompt(
        self,
        principal: Principal,
        session_id: str,
        /,
        *,
        text: str,
        images: Sequence[dict[str, str]],
        idempotency_key: str | None,
        when_busy: str,
    ) -> PromptReceipt:
        """Commit an input; `images` hold `data` (base64) and `mimeType`."""

    async def cancel(self, principal: Principal, session_id: str, run_id: str | None, /) -> list[str]:
        """Cancel one run, or all; returns the run ids, the queued ones first."""

    async def fork(self, principal: Principal, session_id: str, at_seq: int | None, /) -> str: ...

    async def delete(self, principal: Principal, session_id: str, /) -> None: ...

    async def add_goal(self, principal: Principal, session_id: str, text: str, /) -> str: ...

    async def list_goals(self, principal: Principal, session_id: str, /) -> Sequence[Mapping[str, Any]]: ...

    async def close_goal(self, principal: Principal, session_id: str, goal_id: str, /) -> None: ...

    async def set_autonomy(
        self,
        principal: Principal,
        session_id: str,
        /,
        *,
        enabled: bool,
        interval_s: float | None,
        budget: int | None,
    ) -> Mapping[str, Any]:
        """Change the setting and return the one in force, under its wire names."""

    async def search_memory(
        self, principal: Principal, session_id: str, query: str, limit: int, /
    ) -> Sequence[Match]: ...

    async def resume_run(
        self, principal: Principal, session_id: str, /, *, interrupt_id: str, approve: bool, payload: Any
    ) -> str:
        """Decide an interrupt; returns the id of the run that goes on."""
