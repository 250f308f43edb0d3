"""The tables of the database: the log, its projections and the full-text index.

The columns of a projection stand in the order of the struct that it stores (ash.domain.values, and
ash.store.projections for the two that never leave the store), so that a row becomes a struct without names.
"""

from __future__ import annotations

from sqlalchemy import DDL, Column, Index, Integer, MetaData, Table, Text, event

REVISIONS = ("0001",)
"""Alembic revisions of the schema, oldest first; the last one is what `metadata` describes."""

FULL_TEXT_TABLE = "messages_fts"

metadata = MetaData()

events = Table(
    "events",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("ts", Integer, nullable=False),
    Column("run_id", Text),
    Column("origin", Text),
    Column("type", Text, nullable=False),
    # Only a compacted row has it: the seq of the first delta that the row stands for.
    Column("first_seq", Integer),
    Column("body", Text, nullable=False),
    sqlite_with_rowid=False,
)
Index(
    "events_compacted",
    events.c.session_id,
    events.c.first_seq,
    events.c.seq,
    sqlite_where=events.c.first_seq.is_not(None),
)

sessions = Table(
    "sessions",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("title", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("persona", Text),
    Column("pinned_slice", Text),
    Column("state", Text, nullable=False),
    Column("mode", Text),
    Column("slice", Text),
    Column("head_seq", Integer, nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("updated_at", Integer, nullable=False),
    sqlite_with_rowid=False,
)
Index("sessions_by_update", sessions.c.updated_at, sessions.c.session_id)
Index("sessions_by_owner", sessions.c.owner, sessions.c.updated_at, sessions.c.session_id)
Index("sessions_unfinished", sessions.c.session_id, sqlite_where=sessions.c.state != "idle")

runs = Table(
    "runs",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("run_id", Text, primary_key=True),
    Column("origin", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("input_message_id", Text),
    Column("slice", Text),
    Column("intent", Text),
    Column("error_code", Text),
    Column("started_seq", Integer, nullable=False),
    Column("ended_seq", Integer),
    Column("input_tokens", Integer),
    Column("cached_tokens", Integer),
    Column("output_tokens", Integer),
    sqlite_with_rowid=False,
)
Index("runs_by_start", runs.c.session_id, runs.c.started_seq)

messages = Table(
    "messages",
    metadata,
    # The full-text index refers to rows by number.
    Column("id", Integer, primary_key=True),
    Column("session_id", Text, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("run_id", Text),
    Column("role", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("ts", Integer, nullable=False),
)
# Unique by an index, not a constraint: SQLite's constraints have no name that alembic could compare.
Index("messages_by_id", messages.c.session_id, messages.c.message_id, unique=True)
Index("messages_by_seq", messages.c.session_id, messages.c.seq)

waiting_inputs = Table(
    "waiting_inputs",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("message_id", Text, primary_key=True),
    Column("run_id", Text, nullable=False),
    sqlite_with_rowid=False,
)

open_messages = Table(
    "open_messages",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("message_id", Text, primary_key=True),
    Column("role", Text, nullable=False),
    Column("start_seq", Integer, nullable=False),
    sqlite_with_rowid=False,
)

PROJECTIONS = (sessions, runs, messages, waiting_inputs, open_messages)

# External content: the index keeps no second copy of the text, and triggers keep it in step with `messages`
# (the pattern of SQLite's FTS5 documentation, section 4.4.3).
FULL_TEXT_DDL = (
    """
    CREATE VIRTUAL TABLE messages_fts USING fts5(
        text, content='messages', content_rowid='id', tokenize='unicode61 remove_diacritics 2'
    )
    """,
    """
    CREATE TRIGGER messages_inserted AFTER INSERT ON messages BEGIN
        INSERT INTO messages_fts(rowid, text) VALUES (new.id, new.text);
    END
    """,
    """
    CREATE TRIGGER messages_deleted AFTER DELETE ON messages BEGIN
        INSERT INTO messages_fts(messages_fts, rowid, text) VALUES ('delete', old.id, old.text);
    END
    """,
    """
    CREATE TRIGGER messages_updated AFTER UPDATE ON messages BEGIN
        INSERT INTO messages_fts(messages_fts, rowid, text) VALUES ('delete', old.id, old.text);
        INSERT INTO messages_fts(rowid, text) VALUES (new.id, new.text);
    END
    """,
)

for _statement in FULL_TEXT_DDL:
    event.listen(messages, "after_create", DDL(_statement))  # type: ignore[no-untyped-call]  # SQLAlchemy left DDL.__init__ unannotated
