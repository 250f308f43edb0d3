"""Ports: what the session needs from the outside world. app.py chooses who stands behind them.

Each port has a shipped fake and one conformance suite (tests/conformance) that the fake and every real
adapter must pass.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from ash.domain.events import Draft, Record
from ash.domain.values import (
    EngineItem,
    GenerateRequest,
    Match,
    MessageRow,
    ModeEstimate,
    Route,
    RunRow,
    SessionRow,
    Situation,
    SliceFacts,
    SliceItem,
)

Clock = Callable[[], int]
"""Milliseconds since the Unix epoch."""


class EventStore(Protocol):
    """The append-only log with its projections.

    A session exists once an event of it is stored: its first event is a STATE_SNAPSHOT whose snapshot
    holds `title`, `owner`, `persona`, `pinnedSlice`, `goals`, `autonomy`.
    """

    async def open(self) -> None:
        """Migrate if needed and start the writer.

        Raises:
            SchemaTooNew: the database was written by a newer Ash.
            StoreError: the file is not a database of Ash, or cannot be opened.
        """

    async def close(self) -> None:
        """Commit what was accepted, then close. Later calls raise StoreError."""

    async def append(self, session_id: str, drafts: Sequence[Draft]) -> list[Record]:
        """Commit `drafts` in one transaction and return them with seq and ts.

        Sequence numbers of a session strictly increase in the order of the calls. When this returns,
        the records survive power loss. A TEXT_MESSAGE_END also compacts the message's deltas into one
        row and adds the message to the projections; readers cannot tell.

        Raises:
            StoreFull: the disk is full; none of `drafts` was written, and a later call may succeed.
            StoreError: any other failure; none of `drafts` was written.
        """

    async def read(self, session_id: str, after_seq: int = 0, limit: int | None = None) -> list[Record]:
        """Records with seq > after_seq in order, exactly as they were appended, deltas uncompacted.

        `limit` bounds the records. An unknown session has no records.
        """

    async def head(self, session_id: str) -> int | None:
        """The last seq of the session; None when there is no such session."""

    async def session(self, session_id: str) -> SessionRow | None: ...

    async def sessions(
        self, *, owner: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> tuple[list[SessionRow], str | None]:
        """A page, latest `updated_at` first, and the cursor of the next one.

        Raises:
            InvalidRequest: `cursor` was not made by this method.
        """

    async def unfinished(self) -> list[str]:
        """Ids of sessions that have an open run or queued input: what recovery must look at."""

    async def run(self, session_id: str, run_id: str) -> RunRow | None: ...

    async def runs(self, session_id: str) -> list[RunRow]: ...

    async def messages(self, session_id: str, after_seq: int = 0) -> list[MessageRow]:
        """Finished messages (inputs and answers) with seq > after_seq, in log order."""

    async def search(self, query: str, *, session_id: str, limit: int = 10) -> list[Match]:
        """Full-text search over the messages; any text is a valid query, best match first."""

    async def fork(self, session_id: str, new_id: str, at_seq: int) -> int:
        """Copy the events up to and including `at_seq` under `new_id`; returns how many.

        Raises:
            NotFound: no such session, or it has no event at or before `at_seq`.
        """

    async def delete(self, session_id: str) -> None:
        """Remove a session, its events and its projections for good.

        Raises:
            NotFound: no such session.
        """

    async def rebuild(self) -> int:
        """Recreate every projection from the log in one transaction; returns the events read."""


class Generation(Protocol):
    """One running generation: iterate it to the end; it ends with Finished or raises."""

    def __aiter__(self) -> AsyncIterator[EngineItem]: ...

    def cancel(self) -> None:
        """Ask to stop. Idempotent; the iteration ends soon with Finished(reason="cancelled")."""


class Engine(Protocol):
    """Runs one slice.

    A generation yields Admitted, then any number of Delta, then Finished. Generations of different
    sessions run side by side; a second one for a session that is still generating waits its turn.
    """

    @property
    def name(self) -> str: ...

    @property
    def loaded(self) -> bool:
        """True while the model is in memory and can answer at once."""

    async def open(self) -> None:
        """Load the model. Idempotent; opens a closed engine again.

        Raises:
            ModelFileError, SliceUnavailable: it cannot be loaded; the reason is in the message.
        """

    async def close(self) -> None:
        """Free everything. Running generations raise EngineCrashed."""

    def generate(self, request: GenerateRequest) -> Generation:
        """Start one generation.

        Iterating it raises:
            EngineCrashed: the worker died; what was yielded stands.
            PromptTooLong: the last message alone does not fit the context.
            TemplateError: the chat template failed on these messages.
            FormatError: the output format does not compile.
            SliceUnavailable: the engine is closed or cannot be loaded.
        """

    async def forget(self, session_id: str) -> None:
        """Remove what is kept of a session, such as its KV cache; loaded or not. Unknown ids are fine."""


class SliceGeneration(Protocol):
    """A generation that survives crashes; yields SliceNotice items between the engine's."""

    def __aiter__(self) -> AsyncIterator[SliceItem]: ...

    def cancel(self) -> None: ...


class Slices(Protocol):
    """All slices of the catalogue: loads on demand, retries, falls back."""

    def facts(self) -> tuple[SliceFacts, ...]:
        """Every usable slice, in the order of the catalogue."""

    def generate(self, slice_name: str, request: GenerateRequest) -> SliceGeneration:
        """Generate on `slice_name`; after a crash once more on a fresh worker, then on the fallback.

        A retry continues behind the text that was already yielded. Raises SliceError when all failed.
        """

    async def forget(self, session_id: str) -> None:
        """Remove what every slice keeps of a session that was deleted."""


class Encoder(Protocol):
    """Text to unit vectors, off the event loop."""

    @property
    def dimensions(self) -> int: ...

    @property
    def identity(self) -> str:
        """Name and content hash of the model: the key for heads fitted on its vectors."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def encode(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector of `dimensions` floats and length 1 for each text, in order. Empty text is fine.

        Raises:
            EncoderUnavailable: the encoder process is down and did not come back in time.
        """


class Router(Protocol):
    """Chooses the slice of a turn. Pure: the vector comes from the encoder."""

    def decide(self, vector: Sequence[float] | None, text: str, situation: Situation) -> Route:
        """The route for `text`; `vector` None (no encoder) abstains. Any text is answered.

        Raises:
            SliceUnavailable: the input needs what no slice has, such as vision.
        """


class Observer(Protocol):
    """Judges the mode of one text. Pure."""

    def observe(self, vector: Sequence[float], text: str) -> ModeEstimate: ...

    def pull(self, vector: Sequence[float], text: str) -> dict[str, float]:
        """By mode, how likely the input `text` asks for it or resembles it."""
