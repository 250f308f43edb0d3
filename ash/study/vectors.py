"""Measures over the encoder's vectors, which the caller passes in. Pure.

All vectors are unit vectors of one encoder, so that a dot product is a cosine. Similarities lie in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Vectors = Sequence[Sequence[float]]


class PersonaConsistency(Struct, frozen=True):
    """How much an agent's lines keep to its persona and to each other; NaN where there are too few lines.

    Prompt-to-line and line-to-line consistency are the terms of Abdulhai et al., Consistently simulating
    human personas with multi-turn reinforcement learning, arXiv 2511.00222, 2025. There a judging model
    decides; here it is the mean cosine of sentence vectors, which tells topics and manner apart but finds no
    contradictions.

    Attributes:
        prompt_to_line: mean cosine of persona and line.
        line_to_line: mean cosine of a line and the next one.
        within: mean cosine over all pairs of lines of the agent.
        between: mean cosine of its lines with those of the other agents.
    """

    prompt_to_line: float
    line_to_line: float
    within: float
    between: float

    @property
    def distance(self) -> float:
        """1 - prompt_to_line: how far the lines are from the persona."""
        return 1 - self.prompt_to_line


def persona_consistency(
    persona: Sequence[float] | None, lines: Mapping[str, Vectors]
) -> dict[str, PersonaConsistency]:
    """The consistency of each agent.

    Args:
        persona: the vector of the persona that all of them were given; None without one.
        lines: by agent, the vectors of its messages in order.
    """
    arrays = {agent: _array(vectors) for agent, vectors in lines.items()}
    found = {}
    for agent, own in arrays.items():
        others = [array for name, array in arrays.items() if name != agent and len(array)]
        found[agent] = PersonaConsistency(
            prompt_to_line=_mean(own @ np.asarray(persona, dtype=np.float64))
            if persona is not None and len(own)
            else math.nan,
            line_to_line=_mean(np.sum(own[:-1] * own[1:], axis=1)) if len(own) > 1 else math.nan,
            within=_pairwise(own),
            between=_mean(own @ np.concatenate(others).T) if others and len(own) else math.nan,
        )
    return found


def dispersion(vectors: Vectors) -> float:
    """1 - the mean cosine over all pairs: 0 when every text is the same, NaN for fewer than two."""
    return 1 - _pairwise(_array(vectors))


def collapse(vectors: Vectors) -> float:
    """The dispersion of the first half minus that of the second: positive when a session narrows to a theme.

    NaN for fewer than four texts.
    """
    half = len(vectors) // 2
    return dispersion(vectors[:half]) - dispersion(vectors[-half:]) if half > 1 else math.nan


def _array(vectors: Vectors) -> NDArray[np.float64]:
    return np.asarray(vectors, dtype=np.float64) if len(vectors) else np.zeros((0, 1))


def _pairwise(array: NDArray[np.float64]) -> float:
    """Mean cosine over the pairs of different rows."""
    count = len(array)
    if count < 2:
        return math.nan
    # The sum over all ordered pairs is the squared length of the sum; each row with itself counts 1.
    total = np.sum(array, axis=0)
    return float((total @ total - np.sum(array * array)) / (count * (count - 1)))


def _mean(values: NDArray[np.float64]) -> float:
    return float(np.mean(values))
