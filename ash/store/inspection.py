"""What a database file is, before anything is done to it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from ash.domain.errors import SchemaTooNew, StoreError
from ash.store.connections import read_only_uri, store_error
from ash.store.tables import REVISIONS


def revision_of(path: Path) -> str | None:
    """The schema revision of the database at `path`; None when there is nothing in it or no file.

    Blocks on the disk; call it in a thread.

    Raises:
        SchemaTooNew: the revision is none that this program knows.
        StoreError: the file is not SQLite's, or not Ash's.
    """
    if not path.exists() or path.stat().st_size == 0:
        return None
    try:
        with closing(sqlite3.connect(read_only_uri(path), uri=True)) as connection:
            tables = {
                name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
            }
            if not tables:
                return None
            if not {"alembic_version", "events"} <= tables:
                raise StoreError(
                    f"{path} is not a database of Ash: it holds {', '.join(sorted(tables)[:5])}; "
                    "choose another data folder"
                )
            rows = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorname", "") == "SQLITE_NOTADB":
            raise StoreError(
                f"{path} is not a database of Ash: it is not an SQLite file; move it away or choose another "
                "data folder"
            ) from error
        raise store_error(path, "looking at the database", error) from error
    revision = rows[0][0] if len(rows) == 1 else None
    if revision not in REVISIONS:
        raise SchemaTooNew(
            f"{path} has schema revision {revision}, and this program knows revisions up to {REVISIONS[-1]}; "
            "run the newer Ash that wrote it, or restore a backup from before the upgrade"
        )
    return str(revision)
