"""Connections to the database file: who may write, how durably, and what SQLite's errors mean."""

from __future__ import annotations

import functools
import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import URL, Connection, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from ash.domain.errors import StoreError, StoreFull

log = structlog.get_logger(__name__)

BUSY_TIMEOUT_MS = 5000
CHECKPOINT_PAGES = 1000
"""The writer checkpoints (passively) when the WAL passes so many pages of 4 KiB."""

WAL_KEPT_BYTES = 16 << 20
"""A WAL that grew beyond this under a long read is cut back when it is next reset."""

WRITER_PRAGMAS = (
    f"busy_timeout = {BUSY_TIMEOUT_MS}",
    "journal_mode = WAL",
    "synchronous = FULL",
    "foreign_keys = OFF",
    # What a user deletes is overwritten, not only unlinked.
    "secure_delete = ON",
    f"wal_autocheckpoint = {CHECKPOINT_PAGES}",
    f"journal_size_limit = {WAL_KEPT_BYTES}",
)
READER_PRAGMAS = (
    f"busy_timeout = {BUSY_TIMEOUT_MS}",
    "foreign_keys = OFF",
    "query_only = ON",
    "wal_autocheckpoint = 0",
)
READERS = 2

_NO_ROOM = {"SQLITE_FULL"}
# SQLite reports these both for a device that fails and for one without room (ENOSPC when the shared-memory
# file grows, EFBIG and EDQUOT when the log does); the message then names both.
_PERHAPS_NO_ROOM = {
    "SQLITE_IOERR_WRITE",
    "SQLITE_IOERR_SHMSIZE",
    "SQLITE_IOERR_FSYNC",
    "SQLITE_IOERR_TRUNCATE",
}


def read_only_uri(path: Path) -> str:
    """SQLite's URI of `path` for a connection that cannot write.

    Beside query_only, mode=ro keeps a reader that is the last to leave from checkpointing as it closes.
    """
    return f"{path.absolute().as_uri()}?mode=ro"


def writer_engine(path: Path) -> AsyncEngine:
    """The engine of the one connection that writes; its transactions begin with the write lock."""
    engine = create_async_engine(
        URL.create("sqlite+aiosqlite", database=str(path.absolute())),
        poolclass=AsyncAdaptedQueuePool,
        pool_size=1,
        max_overflow=0,
    )
    _on_connect(engine, WRITER_PRAGMAS)

    @event.listens_for(engine.sync_engine, "begin")
    def begin_immediate(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def reader_engine(path: Path) -> AsyncEngine:
    """The engine of the readers. Every read is one statement, so each sees one snapshot without BEGIN."""
    engine = create_async_engine(
        URL.create(
            "sqlite+aiosqlite",
            database=path.absolute().as_uri(),
            query={"mode": "ro", "uri": "true"},
        ),
        poolclass=AsyncAdaptedQueuePool,
        pool_size=READERS,
        max_overflow=0,
        pool_reset_on_return=None,
        skip_autocommit_rollback=True,
    )
    _on_connect(engine, READER_PRAGMAS)
    return engine


def _on_connect(engine: AsyncEngine, pragmas: tuple[str, ...]) -> None:
    # The type of the DBAPI connection is SQLAlchemy's adapter, which publishes none.
    @event.listens_for(engine.sync_engine, "connect")
    def configure(dbapi_connection: Any, _connection_record: object) -> None:
        # Without this Python's sqlite3 begins transactions on its own, and deferred ones.
        dbapi_connection.isolation_level = None
        cursor = dbapi_connection.cursor()
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()


@asynccontextmanager
async def translated_errors(path: Path, doing: str) -> AsyncIterator[None]:
    """Turn what SQLite and SQLAlchemy raise inside into StoreFull or StoreError."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, OverflowError, UnicodeError) as error:
        raise store_error(path, doing, error) from error


def store_error(path: Path, doing: str, error: Exception) -> StoreError:
    """The error of ours for one that SQLite raised while `doing`."""
    cause = getattr(error, "orig", None) or error
    name = getattr(cause, "sqlite_errorname", "")
    if name in _NO_ROOM:
        return StoreFull(f"{doing}: no room for {path} ({cause}); free space on its disk and try again")
    if name in _PERHAPS_NO_ROOM:
        free = shutil.disk_usage(path.parent).free
        return StoreFull(
            f"{doing}: {path} cannot be written ({cause}, {name}; {free >> 20} MiB free); free space, raise "
            "the quota or file size limit, and look at the kernel log if there is room"
        )
    return StoreError(f"{doing}: {path}: {cause}")


@functools.cache  # once per process, however many stores are opened
def warn_of_wal_reset_bug() -> None:
    """Warn when the linked SQLite can corrupt a WAL that two connections reset at once."""
    if (3, 7, 0) <= sqlite3.sqlite_version_info <= (3, 51, 2):
        log.warning(
            "sqlite_wal_reset_bug",
            sqlite=sqlite3.sqlite_version,
            affected="3.7.0 to 3.51.2",
            safe_because="only the writer checkpoints",
            advice="open the live database with nothing but ash; take backups with SQLite's backup API",
        )
