"""The event log, its projections and the full-text index."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("session_id", sa.Text, primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("ts", sa.Integer, nullable=False),
        sa.Column("run_id", sa.Text),
        sa.Column("origin", sa.Text),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("first_seq", sa.Integer),
        sa.Column("body", sa.Text, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "events_compacted",
        "events",
        ["session_id", "first_seq", "seq"],
        sqlite_where=sa.text("first_seq IS NOT NULL"),
    )
    op.create_table(
        "sessions",
        sa.Column("session_id", sa.Text, primary_key=True),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("persona", sa.Text),
        sa.Column("pinned_slice", sa.Text),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("mode", sa.Text),
        sa.Column("slice", sa.Text),
        sa.Column("head_seq", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Integer, nullable=False),
        sa.Column("updated_at", sa.Integer, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("sessions_by_update", "sessions", ["updated_at", "session_id"])
    op.create_index("sessions_by_owner", "sessions", ["owner", "updated_at", "session_id"])
    op.create_index(
        "sessions_unfinished", "sessions", ["session_id"], sqlite_where=sa.text("state != 'idle'")
    )
    op.create_table(
        "runs",
        sa.Column("session_id", sa.Text, primary_key=True),
        sa.Column("run_id", sa.Text, primary_key=True),
        sa.Column("origin", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("input_message_id", sa.Text),
        sa.Column("slice", sa.Text),
        sa.Column("intent", sa.Text),
        sa.Column("error_code", sa.Text),
        sa.Column("started_seq", sa.Integer, nullable=False),
        sa.Column("ended_seq", sa.Integer),
        sa.Column("input_tokens", sa.Integer),
        sa.Column("cached_tokens", sa.Integer),
        sa.Column("output_tokens", sa.Integer),
        sqlite_with_rowid=False,
    )
    op.create_index("runs_by_start", "runs", ["session_id", "started_seq"])
    op.create_table(
        "messages",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("message_id", sa.Text, nullable=False),
        sa.Column("run_id", sa.Text),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("ts", sa.Integer, nullable=False),
    )
    op.create_index("messages_by_id", "messages", ["session_id", "message_id"], unique=True)
    op.create_index("messages_by_seq", "messages", ["session_id", "seq"])
    op.create_table(
        "waiting_inputs",
        sa.Column("session_id", sa.Text, primary_key=True),
        sa.Column("message_id", sa.Text, primary_key=True),
        sa.Column("run_id", sa.Text, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "open_messages",
        sa.Column("session_id", sa.Text, primary_key=True),
        sa.Column("message_id", sa.Text, primary_key=True),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("start_seq", sa.Integer, nullable=False),
        sqlite_with_rowid=False,
    )
    op.execute(
        "CREATE VIRTUAL TABLE messages_fts USING fts5("
        "text, content='messages', content_rowid='id', tokenize='unicode61 remove_diacritics 2')"
    )
    op.execute(
        "CREATE TRIGGER messages_inserted AFTER INSERT ON messages BEGIN "
        "INSERT INTO messages_fts(rowid, text) VALUES (new.id, new.text); END"
    )
    op.execute(
        "CREATE TRIGGER messages_deleted AFTER DELETE ON messages BEGIN "
        "INSERT INTO messages_fts(messages_fts, rowid, text) VALUES ('delete', old.id, old.text); END"
    )
    op.execute(
        "CREATE TRIGGER messages_updated AFTER UPDATE ON messages BEGIN "
        "INSERT INTO messages_fts(messages_fts, rowid, text) VALUES ('delete', old.id, old.text); "
        "INSERT INTO messages_fts(rowid, text) VALUES (new.id, new.text); END"
    )
