"""Hypothesis runs without deadlines: examples share the processor with slices and other tests."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("ash", deadline=None)
settings.load_profile("ash")
