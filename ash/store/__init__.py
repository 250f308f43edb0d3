"""The event log: one SQLite file with a single writer, and its in-memory fake.

log.SqliteEventStore is the server's adapter of the port EventStore, memory.MemoryEventStore its fake,
queries.SqliteReader the read-only view for programs beside a running server, lock.DataFolderLock what
keeps two servers off one folder. Nothing is imported here, so that a reader does not pay for alembic.
"""
