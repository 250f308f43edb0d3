"""Studies: a read-only view of logs with measures, exports and plots. Nothing of the server imports it."""
