"""What set off a shift: something that came in, or nothing that did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import Struct

from ash.domain.values import MODES

Trigger = Literal["external", "self_directed", "undetermined"]

THRESHOLD = 0.3
"""Pull from which an input counts. Remarks that ask for nothing stay below 0.15; requests that name two
modes, the one to leave and the one to enter, may share their probability between them.
"""

REACH = 2
"""Answers that a window goes back."""

FEWEST_WORDS = 20
"""Length from which an input can be of a kind itself."""


class InputEvidence(Struct, frozen=True):
    """One thing that came in from outside.

    Attributes:
        seq: its place in the log.
        kind: where it came from: `user`, `tool`, `timer`, `nudge`, `memory`, `persona`;
            recorded, not judged.
        pull: by mode, how likely the input pulls towards it (see `pull`); None where nobody could observe it.
    """

    seq: int
    kind: str
    pull: Mapping[str, float] | None


class Attribution(Struct, frozen=True):
    """The trigger of a shift and the seqs of the inputs that are evidence for it."""

    trigger: Trigger
    evidence: tuple[int, ...]


def pull(asked: Mapping[str, float], resembles: Mapping[str, float], text: str) -> dict[str, float]:
    """How likely an input pulls towards each mode: it asks for it, or is itself of that kind.

    Only a text of some length is of a kind: `okay, thanks` has none, whatever its estimate. And nearly
    every line of a person is conversational in form, so that only asking counts there.

    Args:
        asked: by mode, from `RequestObserver.asked`.
        resembles: by mode, from `ModeObserver.observe`.
        text: the input.
    """
    if len(text.split()) < FEWEST_WORDS:
        return {mode: asked[mode] for mode in MODES}
    return {
        mode: asked[mode] if mode == "conversational" else max(asked[mode], resembles[mode]) for mode in MODES
    }


def window(
    inputs: Sequence[InputEvidence], answers: Sequence[int], onset_seq: int, reach: int = REACH
) -> tuple[InputEvidence, ...]:
    """The inputs that can have set off a shift with that onset.

    They are those before the onset and behind the answer that lies `reach` answers before it. More than one
    answer back, because the onset may be dated a message late; not further, because what was asked
    for earlier has been answered since.

    Args:
        inputs: in the order of the log.
        answers: seqs of the agent's messages, in the order of the log.
        onset_seq: the first message in the new mode.
        reach: answers, at least 1.
    """
    earlier = [seq for seq in answers if seq < onset_seq]
    start = earlier[-reach] if len(earlier) >= reach else -1
    return tuple(item for item in inputs if start < item.seq < onset_seq)


def attribute(
    to_mode: str, inputs: Sequence[InputEvidence], *, complete: bool, threshold: float = THRESHOLD
) -> Attribution:
    """The trigger of a shift to `to_mode`, given the inputs of its `window`.

    `external` if an input pulls there with at least `threshold`; `self_directed` if none does and all of
    them are known; `undetermined` otherwise.

    Args:
        to_mode: one of MODES.
        inputs: of the window.
        complete: the log holds everything that came in during the window.
        threshold: on `InputEvidence.pull`.
    """
    evidence = tuple(item.seq for item in inputs if item.pull is not None and item.pull[to_mode] >= threshold)
    if evidence:
        return Attribution("external", evidence)
    if complete and all(item.pull is not None for item in inputs):
        return Attribution("self_directed", ())
    return Attribution("undetermined", ())
