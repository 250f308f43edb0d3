"""How well the observer knows modes and genres: F1 on labelled texts. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from msgspec import Struct

from ash.domain.values import ModeEstimate
from ash.modes.labelled import LabelledText


class TextReport(Struct, frozen=True):
    """Results on labelled texts.

    Attributes:
        texts: how many.
        mode_macro_f1: mean F1 over the modes that occur.
        mode_f1: by mode.
        genre_macro_f1: mean F1 over the genres that occur, on texts whose genre is known; a creative text
            taken for another mode has no genre and counts as missed. None without genres.
        genre_f1: by genre.
        per_source: by collection: `texts`, and `accuracy` of the mode.
        hard_cases: the same over the texts that cross topic and purpose; None where the data marks none.
        confusion: by true mode and found mode, how many.
        genre_confusion: by true genre and found genre, or `none`.
    """

    texts: int
    mode_macro_f1: float
    mode_f1: dict[str, float]
    genre_macro_f1: float | None
    genre_f1: dict[str, float]
    per_source: dict[str, dict[str, float]]
    hard_cases: dict[str, float] | None
    confusion: dict[str, dict[str, int]]
    genre_confusion: dict[str, dict[str, int]]


def f1_by_label(truth: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """F1 of every label that occurs in `truth`, in alphabetical order.

    Raises:
        ValueError: not one answer for each true label.
    """
    pairs = Counter(zip(truth, found, strict=True))
    true_counts, found_counts = Counter(truth), Counter(found)
    return {
        label: 2 * pairs[label, label] / (true_counts[label] + found_counts[label])
        for label in sorted(true_counts)
    }


def confusion(truth: Sequence[str], found: Sequence[str]) -> dict[str, dict[str, int]]:
    """By true label and found label, how many.

    Raises:
        ValueError: not one answer for each true label.
    """
    counts: dict[str, dict[str, int]] = {}
    for (label, answer), count in sorted(Counter(zip(truth, found, strict=True)).items()):
        counts.setdefault(label, {})[answer] = count
    return counts


def judge_texts(rows: Sequence[LabelledText], estimates: Sequence[ModeEstimate]) -> TextReport:
    """Compare one estimate with each row.

    Raises:
        ValueError: not one estimate for each row, or no rows.
    """
    if not rows:
        raise ValueError("there are no texts to judge")
    pairs = list(zip(rows, estimates, strict=True))
    truth, found = [row.mode for row in rows], [estimate.mode for estimate in estimates]
    mode_f1 = f1_by_label(truth, found)
    genres = [(row.genre, estimate.genre or "none") for row, estimate in pairs if row.genre is not None]
    true_genres, found_genres = [genre for genre, _ in genres], [genre for _, genre in genres]
    genre_f1 = f1_by_label(true_genres, found_genres)
    sources = sorted({row.source for row in rows})
    hard = [pair for pair in pairs if pair[0].hard]
    return TextReport(
        texts=len(rows),
        mode_macro_f1=statistics.fmean(mode_f1.values()),
        mode_f1=mode_f1,
        genre_macro_f1=statistics.fmean(genre_f1.values()) if genre_f1 else None,
        genre_f1=genre_f1,
        per_source={
            source: _accuracy([pair for pair in pairs if pair[0].source == source]) for source in sources
        },
        hard_cases=_accuracy(hard) if hard else None,
        confusion=confusion(truth, found),
        genre_confusion=confusion(true_genres, found_genres),
    )


def _accuracy(pairs: Sequence[tuple[LabelledText, ModeEstimate]]) -> dict[str, float]:
    right = sum(row.mode == estimate.mode for row, estimate in pairs)
    return {"texts": len(pairs), "accuracy": right / len(pairs)}
