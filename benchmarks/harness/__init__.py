"""What the benchmarks share: servers to start, conversations to time, and the arithmetic of results."""
