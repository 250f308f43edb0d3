"""Every error that Ash raises on purpose, drawn as one tree.

AshError
├── ConfigError                 config.toml or the environment is wrong; names the key
├── RequestError                a caller asked for something that cannot be done
│   ├── NotFound                unknown or deleted session, run, goal, interrupt
│   ├── Busy                    whenBusy=reject met a running session
│   ├── TooLarge                input over a limit; says the limit
│   ├── Forbidden               the principal's role does not allow it
│   ├── Unauthenticated         no token, or one that is unknown or revoked
│   ├── RateLimited             too many failed attempts
│   ├── InvalidRequest          parameters are malformed
│   └── ShuttingDown            the server no longer takes input
├── StoreError                  the event log could not do its work
│   ├── StoreFull               no room on the disk; nothing was written
│   ├── SchemaTooNew            the database belongs to a newer Ash
│   └── DataFolderInUse         another server holds the data folder
├── SliceError                  a model slice could not do its work
│   ├── ModelFileError          missing, truncated, foreign or tampered model file
│   ├── SliceUnavailable        the slice cannot be loaded or is unknown
│   ├── SliceTooLarge           loading it would exceed the memory budget; says the numbers
│   ├── EngineCrashed           the worker process died under the run
│   ├── PromptTooLong           one message alone exceeds the context; says the limit in tokens
│   ├── TemplateError           the chat template does not render
│   └── FormatError             the output format of a request does not compile
├── SlowConsumer                a subscriber did not keep up with the live events
├── EncoderUnavailable          the encoder process is down
├── StudyError                  an export, an import or a study cannot be done as asked
└── ChannelError                the channel to a child process failed
    ├── FrameError              its bytes are not frames of the protocol
    └── ChildExited             the process has ended; says how

`kind` is the machine-readable name that clients receive as `data.kind` (docs/protocol.md).
"""

from __future__ import annotations

from typing import ClassVar


class AshError(Exception):
    """Base of all deliberate errors; the message says what was wrong, where, and what to do."""

    kind: ClassVar[str] = "internal"

    def details(self) -> dict[str, object]:
        """Machine-readable fields that go beside `kind` to a client."""
        return {}


class ConfigError(AshError):
    kind = "config"


class RequestError(AshError):
    kind = "invalid"


class NotFound(RequestError):
    kind = "not_found"


class Busy(RequestError):
    kind = "busy"


class TooLarge(RequestError):
    kind = "too_large"

    def __init__(self, message: str, *, limit: int) -> None:
        super().__init__(message)
        self.limit = limit

    def details(self) -> dict[str, object]:
        return {"limit": self.limit}


class Forbidden(RequestError):
    kind = "forbidden"


class Unauthenticated(RequestError):
    kind = "unauthenticated"


class RateLimited(RequestError):
    kind = "rate_limited"


class InvalidRequest(RequestError):
    kind = "invalid"


class ShuttingDown(RequestError):
    kind = "shutting_down"


class StoreError(AshError):
    kind = "store"


class StoreFull(StoreError):
    kind = "storage_full"


class SchemaTooNew(StoreError):
    kind = "schema_too_new"


class DataFolderInUse(StoreError):
    kind = "data_folder_in_use"


class SliceError(AshError):
    kind = "slice_error"


class ModelFileError(SliceError):
    kind = "slice_unavailable"


class SliceUnavailable(SliceError):
    kind = "slice_unavailable"


class SliceTooLarge(SliceUnavailable):
    """`needed_bytes` are more than `available_bytes` of the budget, whatever is evicted."""

    def __init__(self, message: str, *, needed_bytes: int, available_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes

    def details(self) -> dict[str, object]:
        return {"neededBytes": self.needed_bytes, "availableBytes": self.available_bytes}


class EngineCrashed(SliceError):
    kind = "slice_crashed"


class PromptTooLong(SliceError):
    kind = "too_large"

    def __init__(self, message: str, *, limit: int) -> None:
        super().__init__(message)
        self.limit = limit

    def details(self) -> dict[str, object]:
        return {"limit": self.limit}


class TemplateError(SliceError):
    kind = "template_error"


class FormatError(SliceError):
    kind = "format_error"


class SlowConsumer(AshError):
    kind = "slow_consumer"


class EncoderUnavailable(AshError):
    kind = "encoder_unavailable"


class StudyError(AshError):
    kind = "study"


class ChannelError(AshError):
    kind = "internal"


class FrameError(ChannelError):
    kind = "internal"


class ChildExited(ChannelError):
    kind = "internal"
