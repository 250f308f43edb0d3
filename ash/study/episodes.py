"""The stretches of a session that were in one mode. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ash.study.transcript import Message, SessionView, ShiftFact


class Episode(Struct, frozen=True):
    """Neighbouring answers in one mode, from one shift's onset to the next one's.

    `mode` None: no answer was ever observed. `shift` is what began the episode, None for the first one.
    """

    mode: str | None
    genre: str | None
    answers: tuple[Message, ...]
    shift: ShiftFact | None


def episodes(view: SessionView) -> tuple[Episode, ...]:
    """The episodes of a session in order; together they hold every answer. None without an answer."""
    answers = view.answers
    if not answers:
        return ()
    shifts = sorted(view.shifts, key=lambda shift: shift.value.onset_seq)
    starts = [0, *(_index(answers, shift.value.onset_seq) for shift in shifts)]
    found = []
    for number, start in enumerate(starts):
        end = starts[number + 1] if number + 1 < len(starts) else len(answers)
        part = answers[start:end]
        if not part:
            continue
        if number == 0:
            mode = shifts[0].value.from_ if shifts else _settled(part)
            found.append(Episode(mode, _genre(part, mode), part, None))
        else:
            mode = shifts[number - 1].value.to
            found.append(Episode(mode, _genre(part, mode), part, shifts[number - 1]))
    return tuple(found)


def _index(answers: Sequence[Message], seq: int) -> int:
    return next((index for index, answer in enumerate(answers) if answer.seq >= seq), len(answers))


def _settled(answers: Sequence[Message]) -> str | None:
    """What the filter says at the end of a session that never shifted."""
    readings = [answer.reading for answer in answers if answer.reading is not None]
    return readings[-1].mode if readings else None


def _genre(answers: Sequence[Message], mode: str | None) -> str | None:
    """The most frequent genre of a creative episode; of two equally frequent ones the earlier."""
    if mode != "creative":
        return None
    genres = [answer.reading.genre for answer in answers if answer.reading and answer.reading.genre]
    return max(dict.fromkeys(genres), key=genres.count) if genres else None
