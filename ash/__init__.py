"""Ash: an asynchronous runtime for autonomous agents on local quantised model slices."""

__version__ = "0.1.0"
