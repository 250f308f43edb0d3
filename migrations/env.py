"""Runs migrations on the connection that ash.store.schema hands over; there is no alembic.ini."""

from alembic import context

from ash.store.tables import metadata

# The caller has begun the transaction and commits it, so a migration happens as a whole or not at all.
context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
