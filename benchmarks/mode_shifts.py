"""Shift detectors side by side: delay against false alarms, null streams, and what observing costs.

    python benchmarks/mode_shifts.py --texts TEXTS.jsonl --streams STREAMS.jsonl

Needs the extra `bench` (river, ruptures). Every detector sees the same calibrated probabilities; what differs
is how it decides. ADWIN (Bifet & Gavalda 2007) and Page-Hinkley (1954) watch the probability of each mode and
name the mode that is most probable over the last three messages; PELT (Killick 2012) sees a whole session at
once, so its delay is that of the date it gives and no online figure.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import ruptures
from river import drift
from scipy import stats

from ash.cli.modes import observed_streams
from ash.config import Settings, load
from ash.domain.values import MODES, ModeEstimate
from ash.instruments import opened_instrument
from ash.modes.cusum import Cusum
from ash.modes.filter import ModeFilter
from ash.modes.labelled import LabelledText, Stream, Turn, read_streams, read_texts
from ash.modes.shift_evaluation import (
    Alarm,
    ObservedTurn,
    detect,
    detect_by_sums,
    judge_stream,
    judge_streams,
)

Detector = Callable[[Sequence[ObservedTurn]], list[Alarm]]

NULL_SESSIONS = 10
NULL_TURNS = 500
NULL_NOISE = 0.05
RECENT = 3


def answers(turns: Sequence[ObservedTurn]) -> list[tuple[int, ModeEstimate]]:
    return [(number, turn.estimate) for number, turn in enumerate(turns) if turn.estimate is not None]


def each_change(turns: Sequence[ObservedTurn]) -> list[Alarm]:
    """An alarm whenever the most probable mode is another than before."""
    alarms: list[Alarm] = []
    before = None
    for number, estimate in answers(turns):
        if before is not None and estimate.mode != before:
            alarms.append(Alarm(number, number, estimate.mode, "undetermined"))
        before = estimate.mode
    return alarms


def majority(turns: Sequence[ObservedTurn], length: int = 9) -> list[Alarm]:
    """An alarm when more than half of the last `length` messages are of another mode than established."""
    alarms: list[Alarm] = []
    recent: deque[tuple[int, str]] = deque(maxlen=length)
    established = None
    for number, estimate in answers(turns):
        recent.append((number, estimate.mode))
        modes = [mode for _, mode in recent]
        leading = max(MODES, key=modes.count)
        if modes.count(leading) * 2 <= length or leading == established:
            continue
        if established is not None:
            onset = next(seq for seq, mode in recent if mode == leading)
            alarms.append(Alarm(onset, number, leading, "undetermined"))
        established = leading
    return alarms


def drifts(turns: Sequence[ObservedTurn], make: Callable[[], drift.ADWIN | drift.PageHinkley]) -> list[Alarm]:
    """One detector on the probability of each mode; any of them alarms, the last messages name the mode."""
    detectors = {mode: make() for mode in MODES}
    recent: deque[ModeEstimate] = deque(maxlen=RECENT)
    established = None
    alarms: list[Alarm] = []
    for number, estimate in answers(turns):
        recent.append(estimate)
        drifted = False
        for mode, detector in detectors.items():
            detector.update(estimate.probabilities[mode])
            drifted = drifted or detector.drift_detected
        leading = max(MODES, key=lambda mode: sum(item.probabilities[mode] for item in recent))
        if established is None and len(recent) == RECENT:
            established = leading
        elif drifted and leading != established:
            alarms.append(Alarm(number, number, leading, "undetermined"))
            established = leading
    return alarms


def pelt(turns: Sequence[ObservedTurn], penalty: float) -> list[Alarm]:
    """Offline segments of the probabilities; a segment in another mode than the one before is a shift."""
    seen = answers(turns)
    signal = np.array([[estimate.probabilities[mode] for mode in MODES] for _, estimate in seen])
    ends = ruptures.Pelt(model="l2", min_size=3, jump=1).fit(signal).predict(pen=penalty)
    alarms: list[Alarm] = []
    before, start = None, 0
    for end in ends:
        mode = MODES[int(signal[start:end].mean(axis=0).argmax())]
        if before is not None and mode != before:
            alarms.append(Alarm(seen[start][0], seen[start][0], mode, "undetermined"))
        before, start = mode, end
    return alarms


def detectors(settings: Settings) -> list[tuple[str, Detector]]:
    modes = settings.modes

    def hidden(alarm: float, confirm: int) -> Detector:
        held = ModeFilter(
            stay=modes.stay, alarm=alarm, noise=modes.noise, confirm=confirm, window=modes.window
        )
        return lambda turns: detect(turns, held)

    def sums(threshold: float) -> Detector:
        held = Cusum(threshold=threshold, drift=modes.cusum_drift, cap=modes.cusum_cap)
        return lambda turns: detect_by_sums(turns, held)

    rows: list[tuple[str, Detector]] = [("each change", each_change), ("majority of 9", majority)]
    rows += [
        (
            f"ADWIN delta {delta:g}",
            lambda turns, d=delta: drifts(turns, lambda: drift.ADWIN(delta=d, clock=1)),
        )
        for delta in (0.002, 0.05, 0.3)
    ]
    rows += [
        (
            f"Page-Hinkley {level:g}",
            lambda turns, h=level: drifts(
                turns, lambda: drift.PageHinkley(min_instances=5, delta=0.05, threshold=h)
            ),
        )
        for level in (1.0, 2.0, 4.0)
    ]
    rows += [(f"PELT (offline) {p:g}", lambda turns, p=p: pelt(turns, p)) for p in (1.0, 2.0)]
    rows += [(f"CUSUM {level:g}", sums(level)) for level in (4.0, 6.0, 8.0, 12.0)]
    rows += [
        (f"HMM alarm {alarm:g} confirm {confirm}", hidden(alarm, confirm))
        for confirm in (1, 2, 3)
        for alarm in (0.6, 0.9, 0.99)
    ]
    return rows


def show_curve(
    rows: Sequence[tuple[str, Detector]], pairs: Sequence[tuple[Stream, list[ObservedTurn]]]
) -> None:
    print(f"{'detector':26} {'prec':>6} {'recall':>6} {'med':>5} {'p90':>5} {'noise':>5} {'false/1000':>10}")
    for name, detector in rows:
        report = judge_streams([judge_stream(stream, detector(turns)) for stream, turns in pairs])
        figures = (report.precision, report.recall, report.delay_median, report.delay_p90)
        cells = ["-" if figure is None else f"{figure:.3f}" for figure in figures]
        print(
            f"{name:26} {cells[0]:>6} {cells[1]:>6} {cells[2]:>5} {cells[3]:>5} "
            f"{report.noise_false_alarms:5d} {report.false_alarms_per_1000 or 0:10.2f}"
        )


def null_streams(texts: Sequence[LabelledText], noise: float, seed: int) -> list[Stream]:
    """Sessions in one mode; with probability `noise` a message is of another, never two in a row."""
    generator = random.Random(seed)
    by_mode = {mode: [text for text in texts if text.mode == mode] for mode in MODES}
    streams = []
    for number in range(NULL_SESSIONS):
        settled = MODES[number % len(MODES)]
        turns: list[Turn] = []
        for _ in range(NULL_TURNS):
            off = bool(turns) and not turns[-1].noise and generator.random() < noise
            mode = generator.choice([other for other in MODES if other != settled]) if off else settled
            text = generator.choice(by_mode[mode])
            turns.append(Turn("agent", text.text, text.mode, text.genre, off))
        streams.append(Stream(f"null-{number}", tuple(turns), ()))
    return streams


def poisson_interval(count: int, turns: int) -> tuple[float, float]:
    """Exact 95% interval of events per 1000 turns (Garwood 1936)."""
    low = stats.chi2.ppf(0.025, 2 * count) / 2 if count else 0.0
    return 1000 * low / turns, 1000 * stats.chi2.ppf(0.975, 2 * count + 2) / 2 / turns


def show_null(rows: Sequence[tuple[str, Detector]], observed: Sequence[list[ObservedTurn]]) -> None:
    total = NULL_SESSIONS * NULL_TURNS
    for name, detector in rows:
        if "offline" in name:
            continue  # sees the end of a session before it dates its start: no false alarms to count online
        count = sum(len(detector(turns)) for turns in observed)
        low, high = poisson_interval(count, total)
        rate = f"{1000 * count / total:7.2f} [{low:.2f}, {high:.2f}]"
        print(f"{name:26} {count:5d} in {total} turns: {rate} per 1000")


async def show_cost(settings: Settings, texts: Sequence[str]) -> None:
    """Milliseconds a message: median and 90th percentile."""
    async with opened_instrument(settings) as (encoder, instrument):
        await encoder.encode(["warm"])
        encoded, alone, both = [], [], []
        held = ModeFilter()
        state = held.initial()
        for seq, text in enumerate(texts):
            started = time.perf_counter()
            (vector,) = await encoder.encode([text])
            between = time.perf_counter()
            estimate = instrument.observe(vector, text)
            state, _, _ = held.step(state, estimate.probabilities, seq)
            ended = time.perf_counter()
            encoded.append(between - started)
            alone.append(ended - between)
            both.append(ended - started)
    for name, values in (("features, heads, filter", alone), ("encoder", encoded), ("together", both)):
        deciles = statistics.quantiles(values, n=10)
        print(f"{name:26} p50 {1000 * deciles[4]:7.3f} ms, p90 {1000 * deciles[8]:7.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--streams", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path("config.toml"))
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    settings = load(arguments.config)
    texts = read_texts(arguments.texts.read_text(encoding="utf-8").split("\n"), str(arguments.texts))
    streams = read_streams(arguments.streams.read_text(encoding="utf-8").split("\n"), str(arguments.streams))
    rows = detectors(settings)
    nulls = [null_streams(texts, noise, arguments.seed) for noise in (0.0, NULL_NOISE)]
    observed = asyncio.run(observed_streams(settings, [*streams, *nulls[0], *nulls[1]]))
    print(f"{len(streams)} streams, {sum(len(stream.switches) for stream in streams)} shifts")
    show_curve(rows, list(zip(streams, observed[: len(streams)], strict=True)))
    for number, noise in enumerate((0.0, NULL_NOISE)):
        print(f"\nnull streams, {NULL_SESSIONS} x {NULL_TURNS} turns in one mode, {noise:.0%} off it")
        first = len(streams) + number * NULL_SESSIONS
        show_null(rows, observed[first : first + NULL_SESSIONS])
    print("\ncost of a message")
    asyncio.run(show_cost(settings, [text.text for text in texts][:300]))


if __name__ == "__main__":
    main()
