"""Bearer tokens: who may connect, kept in `<data folder>/tokens.json` as digests.

The command line writes the file (temporary file, then rename, under a lock); a running server re-reads it
when it changed. The clear text of the owner's first token is in `owner.token` beside it, so that a local
command can connect; no other clear token is ever stored.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import EllipsisType

import msgspec
import structlog
from msgspec import Struct

from ash.domain.errors import AshError, InvalidRequest, NotFound
from ash.domain.ports import Clock
from ash.domain.values import Principal, Role

TOKENS_FILE = "tokens.json"
OWNER_FILE = "owner.token"
LOCK_FILE = "tokens.lock"
TOKEN_PREFIX = "ash_"  # noqa: S105  # a prefix for secret scanners to find, no secret itself

Stamp = tuple[int, int, int]
"""Modification time in ns, inode and size: what tells one version of the file from another."""

log = structlog.get_logger(__name__)


class TokenRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """One token as the file holds it. Times are milliseconds since the epoch."""

    id: str
    name: str
    role: Role
    sha256: str
    created_at: int
    revoked_at: int | None = None

    @property
    def active(self) -> bool:
        return self.revoked_at is None


def wall_clock() -> int:
    """Milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000


class TokenRegistry:
    """The tokens of one data folder.

    Raises (constructor and every method that reads):
        AshError: tokens.json is not what this class writes.
    """

    def __init__(self, folder: Path, *, clock: Clock = wall_clock) -> None:
        self._folder = folder
        self._path = folder / TOKENS_FILE
        self._clock = clock
        self._records: tuple[TokenRecord, ...] = ()
        self._active_ids: frozenset[str] = frozenset()
        self._stamp: Stamp | None = None
        # Of the last file that could not be used; Ellipsis: there was none (None is a missing file).
        self._rejected: Stamp | EllipsisType | None = ...
        self._load()

    def ensure_owner(self) -> None:
        """Make the owner's token if no token of role owner is active, and write it to owner.token."""
        with self._locked():
            self._load()
            if any(record.active and record.role is Role.OWNER for record in self._records):
                return
            token = self._add("owner", Role.OWNER)
            _write_private(self._folder / OWNER_FILE, token.encode() + b"\n")

    def owner_token(self) -> str | None:
        """The clear owner token made at the first start; None when its file is gone."""
        path = self._folder / OWNER_FILE
        try:
            _tighten(path)
            return path.read_text().strip() or None
        except FileNotFoundError:
            return None

    def issue(self, name: str, role: Role) -> str:
        """Make a token and return its clear text, which cannot be had again.

        Raises:
            InvalidRequest: the name is empty, or an active token has it.
        """
        if not name.strip():
            raise InvalidRequest("a token needs a name; sessions belong to the name, not to the token")
        with self._locked():
            self._load()
            if any(record.active and record.name == name for record in self._records):
                raise InvalidRequest(
                    f"an active token is named {name!r}; revoke it first or choose another name"
                )
            return self._add(name, role)

    def revoke(self, id_or_name: str) -> list[TokenRecord]:
        """Revoke the active tokens with this id or name and return them.

        Raises:
            NotFound: there is none.
        """
        with self._locked():
            self._load()
            hit = {r.id for r in self._records if r.active and id_or_name in (r.id, r.name)}
            if not hit:
                raise NotFound(
                    f"no active token has the id or name {id_or_name!r}; list them to see what there is"
                )
            now = self._clock()
            self._save(
                tuple(
                    msgspec.structs.replace(record, revoked_at=now) if record.id in hit else record
                    for record in self._records
                )
            )
            return [record for record in self._records if record.id in hit]

    def list(self) -> list[TokenRecord]:
        """All tokens, revoked ones too, oldest first."""
        self.refresh()
        return list(self._records)

    def authenticate(self, token: str) -> Principal | None:
        """The principal behind a clear token; None when it is unknown or revoked."""
        # A plain digest is enough: tokens are 256 random bits, so there is no dictionary to try.
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()
        found: TokenRecord | None = None
        for record in self._records:
            # No early exit: the time taken must not tell where in the file a match is.
            if hmac.compare_digest(record.sha256, digest):
                found = record
        if found is None or not found.active:
            return None
        return Principal(name=found.name, role=found.role, token_id=found.id)

    def is_active(self, token_id: str) -> bool:
        """Whether the token with this id exists and is not revoked."""
        return token_id in self._active_ids

    def refresh(self) -> bool:
        """Re-read the file if it changed; returns whether it did.

        A file that became unreadable leaves the last good tokens in force, so that a running server is
        neither opened nor locked by a broken edit; the error is logged once per change.
        """
        stamp = self._stat()
        if stamp in (self._stamp, self._rejected):
            return False
        try:
            self._load()
        except (AshError, OSError) as error:
            self._rejected = stamp
            log.error("tokens.unreadable", error=str(error))
            return False
        return True

    def _stat(self) -> Stamp | None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size

    def _load(self) -> None:
        stamp = self._stat()
        if stamp is None:
            if self._stamp is not None:
                raise AshError(
                    f"{self._path} is gone; restore it, or restart to begin with a new owner token"
                )
            return
        _tighten(self._path)
        try:
            self._use(tuple(msgspec.json.decode(self._path.read_bytes(), type=list[TokenRecord])))
        except (msgspec.DecodeError, OSError) as error:
            raise AshError(
                f"{self._path} cannot be read: {error}. Restore it from a backup, or delete it to begin with "
                f"a new owner token (every other token is then void)"
            ) from error
        self._stamp = stamp
        self._rejected = ...

    def _use(self, records: tuple[TokenRecord, ...]) -> None:
        self._records = records
        self._active_ids = frozenset(record.id for record in records if record.active)

    def _add(self, name: str, role: Role) -> str:
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        record = TokenRecord(
            id=f"tok_{secrets.token_hex(6)}",
            name=name,
            role=role,
            sha256=hashlib.sha256(token.encode()).hexdigest(),
            created_at=self._clock(),
        )
        self._save((*self._records, record))
        return token

    def _save(self, records: tuple[TokenRecord, ...]) -> None:
        text = msgspec.json.format(msgspec.json.encode(records), indent=2)
        _write_private(self._path, text + b"\n")
        self._use(records)
        self._stamp = self._stat()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # A file of its own: the lock must outlive the rename that replaces tokens.json.
        descriptor = os.open(self._folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _write_private(path: Path, content: bytes) -> None:
    """Replace `path` in one step by a file that only its owner can read."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _tighten(path: Path) -> None:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        path.chmod(0o600)
        log.warning("tokens.permissions_tightened", file=str(path), was=f"{mode:04o}", now="0600")
