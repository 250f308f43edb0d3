"""The mode of a session over time: turns observations into `ash.mode` and `ash.mode_shift` events.

Folds its own events, so that a restarted server goes on with the same filter.
"""

from __future__ import annotations

from collections import deque

from ash.domain.events import Custom, InputValue, ModeValue, Record
from ash.modes.attribution import InputEvidence
from ash.modes.filter import ModeFilter

EVIDENCE_WINDOW = 64
"""Inputs kept for attribution; older ones cannot lie in the window before an onset."""


class ModeTracker:
    """Filter state and evidence of one session."""

    def __init__(self, mode_filter: ModeFilter) -> None:
        self._filter = mode_filter
        self._state = mode_filter.initial()
        self._inputs: deque[InputEvidence] = deque(maxlen=EVIDENCE_WINDOW)
        self._input_seqs: dict[str, int] = {}
        self._answer_seqs: dict[str, int] = {}
        self.mode: str | None = None

    def apply(self, record: Record) -> None:
        """Fold one committed record."""
        event = record.event
        if not isinstance(event, Custom):
            return
        if event.name == InputValue.event_name:
            self._input_seqs[InputValue.of(event).message_id] = record.seq
        elif event.name == ModeValue.event_name:
            self._apply_mode(ModeValue.of(event), record)
