"""The table of peers.py, and the ratios that are its goals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.harness.rounds import Round
from benchmarks.harness.stats import median, paired_ratios, percentile
from benchmarks.harness.table import markdown, number

ASH = "Ash"
DEFAULT = "llama-server"
TUNED = "llama-server tuned"
ALL_SLOTS = "llama-server -np N"
"""As many slots as sessions, everything else at its defaults, which are four slots."""

LIMIT = "llama-batched-bench"

Throughput = Callable[[Round], float | None]


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio that should be reached: `mine` by `other`, over `sessions`, in round `number` (0: all).

    `at_least` tells whether more is better.
    """

    what: str
    sessions: int
    mine: str
    other: str
    bound: float
    at_least: bool
    measure: str
    number: int = 0


GOALS = (
    Goal("decode, window", 16, ASH, LIMIT, 0.95, True, "window"),
    Goal("decode, steady", 16, ASH, LIMIT, 0.95, True, "steady"),
    Goal("decode, window", 16, ASH, DEFAULT, 1.15, True, "window"),
    Goal("decode, window", 16, ASH, ALL_SLOTS, 1.15, True, "window"),
    Goal("decode, window", 16, ASH, TUNED, 1.0, True, "window"),
    Goal("decode, steady", 16, ASH, ALL_SLOTS, 1.15, True, "steady"),
    Goal("decode, steady", 16, ASH, TUNED, 1.0, True, "steady"),
    Goal("tokens with prefill", 16, ASH, DEFAULT, 1.15, True, "wall"),
    Goal("tokens with prefill", 16, ASH, ALL_SLOTS, 1.15, True, "wall"),
    Goal("tokens with prefill", 16, ASH, TUNED, 1.0, True, "wall"),
    Goal("first token p50", 16, ASH, DEFAULT, 0.5, False, "first token", 3),
    Goal("first token p50", 16, ASH, ALL_SLOTS, 0.5, False, "first token", 3),
    Goal("first token p50", 16, ASH, TUNED, 0.8, False, "first token", 3),
    Goal("decode, window", 1, ASH, DEFAULT, 0.95, True, "window"),
    Goal("decode, window", 1, ASH, TUNED, 0.95, True, "window"),
)


@dataclass
class Report:
    """Rounds of all systems. Those with more than `foreign_limit` of foreign CPU use are not counted.

    Attributes:
        limit_options: the settings with which llama-batched-bench was fastest.
    """

    foreign_limit: float
    limit_options: Sequence[str] = ()
    _rounds: list[Round] = field(default_factory=list)
    _resident: dict[tuple[str, int], int] = field(default_factory=dict)

    def add(self, results: Sequence[Round], *, resident_bytes: int) -> None:
        """Add one conversation and the memory that its system had at the end."""
        self._rounds += results
        key = (results[0].system, results[0].sessions)
        self._resident[key] = max(resident_bytes, self._resident.get(key, 0))

    def line(self, results: Sequence[Round]) -> str:
        """Progress, for one conversation."""
        first, speeds = results[0], [number(result.window_tokens_per_s) for result in results]
        foreign = max(result.foreign_cpu for result in results)
        failed = next((f"; failed: {result.failures[0]}" for result in results if result.failures), "")
        return (
            f"repetition {first.repetition + 1}, {first.sessions} sessions, {first.system}: "
            f"{' / '.join(speeds)} tok/s, foreign CPU {foreign:.0%}{failed}"
        )

    def table(self) -> str:
        """One row for each number of sessions and system; a/b/c are the rounds of the conversation."""
        headers = [
            "system",
            "sessions",
            "decode tok/s",
            "steady tok/s",
            "with prefill tok/s",
            "first token p50 ms",
            "p95 ms",
            "gap p50 ms",
            "gap p99 ms",
            "PSS MB",
            "rounds kept",
        ]
        keys = dict.fromkeys((result.sessions, result.system) for result in self._rounds)
        rows = [self._row(sessions, system) for sessions, system in sorted(keys, key=lambda key: key[0])]
        notes = [f"rounds with over {self.foreign_limit:.0%} foreign CPU use are left out"]
        if self.limit_options:
            notes.append(f"llama-batched-bench at its best: {' '.join(self.limit_options)}")
        failures = {failure for result in self._rounds for failure in result.failures}
        notes += [f"failed: {failure}" for failure in sorted(failures)]
        return "\n".join([markdown(headers, rows), "", *notes])

    def _row(self, sessions: int, system: str) -> list[str]:
        every = [result for result in self._rounds if (result.sessions, result.system) == (sessions, system)]
        numbers = sorted({result.number for result in every})
        kept = [result for result in every if self._counts(result)]

        def by_round(measure: Callable[[list[Round]], float | None], scale: float = 1.0) -> str:
            values = [measure([result for result in kept if result.number == each]) for each in numbers]
            if all(value is None for value in values):
                return "-"
            return "/".join(number(value, scale=scale) for value in values)

        def speed(throughput: Throughput) -> str:
            return by_round(lambda results: median(_present(map(throughput, results))))

        gaps = [gap for result in kept for gap in result.gaps_s]
        return [
            system,
            str(sessions),
            speed(lambda result: result.window_tokens_per_s),
            speed(lambda result: result.steady_tokens_per_s),
            speed(lambda result: result.wall_tokens_per_s),
            by_round(lambda results: percentile(_first_tokens(results), 50), 1000),
            by_round(lambda results: percentile(_first_tokens(results), 95), 1000),
            number(percentile(gaps, 50), scale=1000),
            number(percentile(gaps, 99), scale=1000),
            number(self._resident.get((system, sessions)) or None, scale=1e-6),
            f"{len(kept)}/{len(every)}",
        ]

    def goals(self) -> str:
        """The ratios, each the median over repetitions of what was measured side by side."""
        rows = []
        measured = {result.sessions for result in self._rounds}
        for goal in GOALS:
            if goal.sessions not in measured:
                continue
            rounds = sorted({result.number for result in self._rounds})
            each = [median(self._ratios(goal, [number_])) for number_ in rounds]
            ratio = median(self._ratios(goal, [goal.number] if goal.number else rounds))
            sign = ">=" if goal.at_least else "<="
            if ratio is None:
                verdict = "no quiet pair"
            elif ratio >= goal.bound if goal.at_least else ratio <= goal.bound:
                verdict = "reached"
            else:
                verdict = "not reached"
            rows.append(
                [
                    f"{goal.what}: {goal.mine} / {goal.other}",
                    str(goal.sessions),
                    f"round {goal.number}" if goal.number else "all rounds",
                    "/".join(number(value, 2) for value in each),
                    number(ratio, 2),
                    f"{sign} {goal.bound:g}",
                    verdict,
                ]
            )
        return markdown(["ratio", "sessions", "over", "by round", "median", "goal", "verdict"], rows)

    def raw(self) -> dict[str, object]:
        """Everything that was measured, for --json."""
        return {
            "limit_options": list(self.limit_options),
            "resident_bytes": [
                {"system": system, "sessions": sessions, "bytes": size}
                for (system, sessions), size in self._resident.items()
            ],
            "rounds": [dataclasses.asdict(result) for result in self._rounds],
        }

    def _counts(self, result: Round) -> bool:
        return not result.failures and result.foreign_cpu <= self.foreign_limit

    def _ratios(self, goal: Goal, numbers: Sequence[int]) -> Sequence[float]:
        """Ratios of the repetitions in which both sides were quiet in all rounds of `numbers`."""
        return paired_ratios(self._values(goal.mine, goal, numbers), self._values(goal.other, goal, numbers))

    def _values(self, system: str, goal: Goal, numbers: Sequence[int]) -> dict[int, float]:
        """By repetition, the measure over the rounds `numbers` together."""
        found: dict[int, list[Round]] = {}
        for result in self._rounds:
            if (result.system, result.sessions) == (system, goal.sessions) and result.number in numbers:
                found.setdefault(result.repetition, []).append(result)
        values = {}
        for repetition, results in found.items():
            if len(results) == len(numbers) and all(map(self._counts, results)):
                value = _measured(goal.measure, results)
                if value is not None:
                    values[repetition] = value
        return values


def _measured(measure: str, results: Sequence[Round]) -> float | None:
    """A goal's measure over several rounds of one conversation."""
    match measure:
        case "window":
            seconds = sum(result.window_s for result in results)
            return sum(result.tokens for result in results) / seconds if seconds else None
        case "wall":
            seconds = sum(result.wall_s for result in results)
            return sum(result.tokens for result in results) / seconds if seconds else None
        case "steady":
            seconds = sum(result.steady_s for result in results)
            return sum(result.steady_tokens for result in results) / seconds if seconds else None
        case _:
            return percentile(_first_tokens(results), 50)


def _first_tokens(results: Iterable[Round]) -> list[float]:
    return [seconds for result in results for seconds in result.first_token_s]


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
