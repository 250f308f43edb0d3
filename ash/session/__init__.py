"""Sessions: the pure state machine, the path of a turn, and the service that keeps agents alive."""
