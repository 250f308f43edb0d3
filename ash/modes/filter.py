"""From noisy estimates of single messages to the mode of a session: a sticky hidden Markov model.

The forward pass (Rabiner, A tutorial on hidden Markov models, 1989, section III) gives the posterior of
the mode now and with it the alarm; a Viterbi pass over the last messages dates the onset.

The model: a session stays in its mode with probability `stay` from one message to the next, and one message
in `1 / noise` says nothing about the mode (a joke in the middle of a derivation). So no single message,
however sure its estimate, outweighs a settled mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from msgspec import Struct

from ash.domain.values import MODES


class Shift(Struct, frozen=True):
    """A detected change of mode. `onset_seq` is the first message in the new mode, `alarm_seq` the one
    with which it became certain.
    """

    from_mode: str
    to_mode: str
    onset_seq: int
    alarm_seq: int


class Evidence(Struct, frozen=True):
    """How likely a message is under each of MODES, in that order, up to a common factor."""

    seq: int
    likelihood: tuple[float, ...]


class FilterState(Struct, frozen=True):
    """Everything the filter remembers.

    Attributes:
        posterior: of the mode at the last message, in the order of MODES; sums to 1.
        established: the mode the session is known to be in; None until one is certain.
        recent: the last messages, oldest first, for the backward pass.
    """

    posterior: tuple[float, ...] = (1 / len(MODES),) * len(MODES)
    established: str | None = None
    recent: tuple[Evidence, ...] = ()

    @property
    def probabilities(self) -> dict[str, float]:
        """The posterior by mode."""
        return dict(zip(MODES, self.posterior, strict=True))


class ModeFilter:
    """The filter's constants and its step. It holds no state of its own: `FilterState` is passed through."""

    def __init__(
        self,
        *,
        stay: float = 0.985,
        alarm: float = 0.9,
        noise: float = 0.1,
        confirm: int = 3,
        window: int = 24,
        prior: Mapping[str, float] | None = None,
    ) -> None:
        """Fix the constants.

        The defaults were chosen on thirty streams with 85 changes and 52 single off-mode messages, made of
        texts that the head had not seen: all changes found, no false alarm, most alarms with the third
        message (docs/decisions/2026-11-24-modes-quality.md).

        Args:
            stay: probability that the next message is in the same mode.
            alarm: posterior at which another mode than the established one counts as certain.
            noise: share of messages that say nothing about the mode.
            confirm: messages that the new mode must hold before an alarm.
            window: messages that the backward pass looks at.
            prior: shares of the modes in what the head was fitted on; None for equal ones. An estimate
                divided by it is a likelihood.

        Raises:
            ValueError: a constant is out of its range.
        """
        if not 1 / len(MODES) < stay < 1:
            raise ValueError(f"stay is {stay}; it must lie between 1/{len(MODES)} and 1")
        if not 0.5 < alarm < 1:
            raise ValueError(f"alarm is {alarm}; it must lie between 0.5 and 1")
        if not 0 < noise < 1:
            raise ValueError(f"noise is {noise}; it must lie between 0 and 1")
        if not 1 <= confirm < window:
            raise ValueError(f"confirm is {confirm}; it must be at least 1 and below the window of {window}")
        shares = prior or dict.fromkeys(MODES, 1 / len(MODES))
        if set(shares) != set(MODES) or min(shares.values()) <= 0:
            raise ValueError(f"prior is {shares}; it must give each of {MODES} a positive share")
        self._stay = stay
        self._leave = (1 - stay) / (len(MODES) - 1)
        self._alarm = alarm
        self._noise = noise
        self._confirm = confirm
        self._window = window
        self._prior = tuple(shares[mode] for mode in MODES)

    def initial(self) -> FilterState:
        """The state of a session without messages: any mode is as likely as any other."""
        return FilterState()

    def step(
        self, state: FilterState, probabilities: Mapping[str, float], seq: int
    ) -> tuple[FilterState, dict[str, float], Shift | None]:
        """Take in the estimate of the message at `seq`.

        Args:
            state: after the message before.
            probabilities: the head's, by mode; not negative, not all 0.
            seq: the message's place in the log, larger than any before.

        Returns:
            The state after this message, the posterior by mode, and a shift if this message made one certain.

        Raises:
            ValueError: `probabilities` is no distribution over MODES.
        """
        evidence = Evidence(seq, self._likelihood(probabilities))
        predicted = self._predict(state.posterior)
        posterior = _normalised(tuple(p * e for p, e in zip(predicted, evidence.likelihood, strict=True)))
        recent = (*state.recent, evidence)[-self._window :]
        new = FilterState(posterior, state.established, recent)
        best = max(range(len(MODES)), key=posterior.__getitem__)
        if posterior[best] < self._alarm or MODES[best] == state.established:
            return new, new.probabilities, None
        path = self._most_likely_path(recent)
        held = _length_of_last_run(path, best)
        if state.established is not None:
            # The oldest message began the established mode, or comes later: that decision stands.
            held = min(held, len(recent) - 1)
        if held < self._confirm:
            return new, new.probabilities, None
        # What lies before the onset belongs to the mode that ended and has no say in the next onset.
        since_onset = recent[len(recent) - held :]
        new = FilterState(posterior, MODES[best], since_onset)
        if state.established is None:
            return new, new.probabilities, None
        return new, new.probabilities, Shift(state.established, MODES[best], since_onset[0].seq, seq)

    def skip(self, state: FilterState) -> tuple[FilterState, dict[str, float]]:
        """The state and posterior after a message that nobody could observe: the model's prediction."""
        new = FilterState(self._predict(state.posterior), state.established, state.recent)
        return new, new.probabilities

    def fold(self, messages: Iterable[tuple[int, Mapping[str, float] | None]]) -> FilterState:
        """The state after a session's messages so far: (seq, raw probabilities, None where unobserved)."""
        state = self.initial()
        for seq, probabilities in messages:
            state = self.skip(state)[0] if probabilities is None else self.step(state, probabilities, seq)[0]
        return state

    def _likelihood(self, probabilities: Mapping[str, float]) -> tuple[float, ...]:
        values = [probabilities.get(mode, math.nan) for mode in MODES]
        if not all(value >= 0 and math.isfinite(value) for value in values) or sum(values) <= 0:
            raise ValueError(f"{dict(probabilities)} is no distribution over {MODES}")
        scaled = _normalised(tuple(value / share for value, share in zip(values, self._prior, strict=True)))
        return tuple((1 - self._noise) * value + self._noise / len(MODES) for value in scaled)

    def _predict(self, posterior: tuple[float, ...]) -> tuple[float, ...]:
        """The modes' probabilities one message later, before it is looked at."""
        total = sum(posterior)
        return tuple(self._stay * p + self._leave * (total - p) for p in posterior)

    def _most_likely_path(self, recent: tuple[Evidence, ...]) -> list[int]:
        """Viterbi: the index of the mode of each message, on the single most likely path."""
        stay, leave = math.log(self._stay), math.log(self._leave)
        modes = range(len(MODES))
        scores = [0.0] * len(MODES)
        origins: list[list[int]] = []
        for evidence in recent:
            best = [
                max(modes, key=lambda i, j=j: scores[i] + (stay if i == j else leave))  # type: ignore[misc]
                for j in modes
            ]
            scores = [
                scores[best[j]] + (stay if best[j] == j else leave) + math.log(evidence.likelihood[j])
                for j in modes
            ]
            origins.append(best)
        path = [max(modes, key=scores.__getitem__)]
        for best in reversed(origins[1:]):
            path.append(best[path[-1]])
        return path[::-1]


def _length_of_last_run(path: list[int], value: int) -> int:
    """How many entries at the end of `path` are `value`."""
    length = 0
    for entry in reversed(path):
        if entry != value:
            break
        length += 1
    return length


def _normalised(values: tuple[float, ...]) -> tuple[float, ...]:
    total = sum(values)
    return tuple(value / total for value in values)
