"""What one text is, and what one input asks for: heads over the encoder's vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ash.domain.values import MODES, ModeEstimate
from ash.heads.cache import head_key
from ash.heads.head import Head, Training, fit_head
from ash.modes.anchors import NOTHING, Anchors, RequestAnchors
from ash.modes.features import FORM_FEATURES, SCALE, features
from ash.modes.verse import VERSE_FEATURES, VERSE_SCALE, genre_features

MODE_TRAINING = Training(inverse_regularisation=5.0)
GENRE_TRAINING = Training(inverse_regularisation=3.0)
REQUEST_TRAINING = Training(inverse_regularisation=10.0)


class ModeObserver:
    """Estimates the mode of a text. Pure: the same text gives the same estimate."""

    def __init__(self, head: Head, genre_head: Head | None) -> None:
        """Take the fitted heads; without `genre_head` no genre is ever named.

        Raises:
            ValueError: `head` was fitted on other labels than MODES.
        """
        if set(head.labels) != set(MODES):
            raise ValueError(f"the head knows {head.labels}; an observer needs one fitted on {MODES}")
        self._head = head
        self._genre_head = genre_head

    def observe(self, vector: Sequence[float], text: str) -> ModeEstimate:
        """The estimate for `text`, whose unit vector is `vector`. A blank text could be anything."""
        if not text.strip():
            return ModeEstimate(dict.fromkeys(MODES, 1 / len(MODES)), None)
        row = features(vector, text)
        found = self._head.probabilities(row)
        estimate = ModeEstimate({mode: found[mode] for mode in MODES}, None)
        if estimate.mode != "creative" or self._genre_head is None:
            return estimate
        genres = self._genre_head.probabilities(genre_features(row, text))
        return ModeEstimate(estimate.probabilities, max(genres, key=genres.__getitem__))


class RequestObserver:
    """Estimates which mode an input asks for, if any."""

    def __init__(self, head: Head) -> None:
        """Take the fitted head.

        Raises:
            ValueError: it was fitted on other labels than MODES and NOTHING.
        """
        if set(head.labels) != {*MODES, NOTHING}:
            raise ValueError(f"the head knows {head.labels}; want {(*MODES, NOTHING)}")
        self._head = head

    def asked(self, vector: Sequence[float], text: str) -> dict[str, float]:
        """For each mode the probability that `text` asks for it; what is missing to 1 asks for nothing."""
        if not text.strip():
            return dict.fromkeys(MODES, 0.0)
        found = self._head.probabilities(vector)
        return {mode: found[mode] for mode in MODES}


def mode_key(anchors: Anchors, encoder: str) -> str:
    """The cache key of `fit_modes`, for the encoder with that identity."""
    return head_key(
        purpose="modes",
        encoder=encoder,
        content_hash=anchors.content_hash,
        training=MODE_TRAINING,
        features=(FORM_FEATURES, SCALE),
    )


def genre_key(anchors: Anchors, encoder: str) -> str:
    """The cache key of `fit_genres`."""
    return head_key(
        purpose="genres",
        encoder=encoder,
        content_hash=anchors.content_hash,
        training=GENRE_TRAINING,
        features=(FORM_FEATURES, SCALE, VERSE_FEATURES, VERSE_SCALE),
    )


def request_key(anchors: RequestAnchors, encoder: str) -> str:
    """The cache key of `fit_requests`."""
    return head_key(
        purpose="requests", encoder=encoder, content_hash=anchors.content_hash, training=REQUEST_TRAINING
    )


def fit_modes(anchors: Anchors, vectors: Sequence[Sequence[float]]) -> Head:
    """The mode head. `vectors` are those of `anchors.texts()`, in that order.

    Raises:
        ValueError: not one vector for each text.
    """
    rows = [features(vector, text) for vector, text in zip(vectors, anchors.texts(), strict=True)]
    return fit_head(rows, anchors.modes(), MODE_TRAINING)


def fit_genres(anchors: Anchors, vectors: Sequence[Sequence[float]]) -> Head | None:
    """The genre head, from the same vectors; None where the anchors name fewer than two genres.

    Raises:
        ValueError: not one vector for each text.
    """
    rows = []
    genres = []
    for vector, text, genre in zip(vectors, anchors.texts(), anchors.genres(), strict=True):
        if genre is not None:
            rows.append(genre_features(features(vector, text), text))
            genres.append(genre)
    return fit_head(rows, genres, GENRE_TRAINING) if len(set(genres)) > 1 else None


def fit_requests(anchors: RequestAnchors, vectors: Sequence[Sequence[float]]) -> Head:
    """The request head. `vectors` are those of `anchors.texts()`, in that order.

    Raises:
        ValueError: not one vector for each text.
    """
    return fit_head(np.asarray(vectors), anchors.labels(), REQUEST_TRAINING)
