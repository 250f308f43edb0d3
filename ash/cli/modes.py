"""`ash modes`: how well the observer knows modes, genres and shifts."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from msgspec import Struct
from rich.table import Table

from ash.cli.options import DEFAULT_CONFIG, Config, out
from ash.config import ModesSettings, Settings, load
from ash.domain.errors import ConfigError
from ash.domain.values import ModeEstimate
from ash.instruments import mode_cusum, mode_filter, opened_instrument
from ash.modes.evaluation import TextReport, judge_texts
from ash.modes.filter import ModeFilter
from ash.modes.labelled import LabelledText, Stream, read_streams, read_texts
from ash.modes.shift_evaluation import (
    CurvePoint,
    ObservedTurn,
    StreamReport,
    agreement,
    curve,
    detect,
    detect_by_sums,
    judge_stream,
    judge_streams,
)

modes_app = typer.Typer(help="The observer of modes and shifts.", no_args_is_help=True)


class _Judged(Struct, frozen=True):
    """The filter as configured, over its thresholds, and beside its cross-check.

    `agreement`: share of the filter's alarms that the cumulative sums raise too.
    """

    report: StreamReport
    curve: list[CurvePoint]
    cusum: StreamReport
    agreement: float | None

    def to_json(self) -> dict[str, object]:
        """The figures of the filter on top, the others under `curve`, `cusum` and `cusum_agreement`."""
        points = [{"alarm": point.alarm, **msgspec.to_builtins(point.report)} for point in self.curve]
        # Without a model of triggers its figures for them would say nothing.
        cusum = {key: value for key, value in msgspec.to_builtins(self.cusum).items() if "trigger" not in key}
        return {
            **msgspec.to_builtins(self.report),
            "curve": points,
            "cusum": cusum,
            "cusum_agreement": self.agreement,
        }


@modes_app.callback()
def modes() -> None:
    """The observer of modes and shifts."""


@modes_app.command("eval")
def modes_eval(
    data: Annotated[Path | None, typer.Option(help="Texts, JSON Lines: text, mode, genre, source.")] = None,
    streams: Annotated[Path | None, typer.Option(help="Streams, JSON Lines: id, turns, switches.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Judge the observer on labelled texts or streams. Example: ash modes eval --data texts.jsonl --json."""
    if (data is None) == (streams is None):
        raise typer.BadParameter("give either --data FILE or --streams FILE")
    if data is not None:
        texts = read_texts(_lines(data, "--data"), str(data))
        report = judge_texts(texts, asyncio.run(_estimates(load(config), texts)))
        if as_json:
            _write_json(msgspec.to_builtins(report))
        else:
            _show_texts(report)
    elif streams is not None:
        read = read_streams(_lines(streams, "--streams"), str(streams))
        settings = load(config)
        observed = asyncio.run(observed_streams(settings, read))
        judged = _judged(settings.modes, read, observed)
        if as_json:
            _write_json(judged.to_json())
        else:
            _show_streams(judged)


def _lines(path: Path, option: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a readable file with {option} FILE") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8: {error.reason}; convert the file") from error
    # Not splitlines: JSON strings may hold the other characters that it takes for line ends.
    return text.split("\n")


async def _estimates(settings: Settings, texts: Sequence[LabelledText]) -> list[ModeEstimate]:
    async with opened_instrument(settings) as (encoder, instrument):
        vectors = await encoder.encode([text.text for text in texts])
    return [instrument.observe(vector, text.text) for vector, text in zip(vectors, texts, strict=True)]


async def observed_streams(settings: Settings, streams: Sequence[Stream]) -> list[list[ObservedTurn]]:
    """Every turn of every stream as the instrument sees it; what recurs is encoded once."""
    texts = list(dict.fromkeys(turn.text for stream in streams for turn in stream.turns))
    async with opened_instrument(settings) as (encoder, instrument):
        vectors = dict(zip(texts, await encoder.encode(texts), strict=True))
    return [
        [
            ObservedTurn(estimate=instrument.observe(vectors[turn.text], turn.text))
            if turn.role == "agent"
            else ObservedTurn(pull=instrument.pull(vectors[turn.text], turn.text))
            for turn in stream.turns
        ]
        for stream in streams
    ]


def _judged(
    settings: ModesSettings, streams: Sequence[Stream], observed: Sequence[Sequence[ObservedTurn]]
) -> _Judged:
    pairs = list(zip(streams, observed, strict=True))
    configured, cusum = mode_filter(settings), mode_cusum(settings)
    alarms = [detect(turns, configured) for turns in observed]
    sums = [detect_by_sums(turns, cusum) for turns in observed]

    def filter_at(alarm: float) -> ModeFilter:
        return mode_filter(msgspec.structs.replace(settings, alarm=alarm))

    raised = sum(map(len, alarms))
    agreed = sum(agreement(one, other) for one, other in zip(alarms, sums, strict=True))
    return _Judged(
        report=judge_streams([judge_stream(*pair) for pair in zip(streams, alarms, strict=True)]),
        curve=curve(pairs, filter_at),
        cusum=judge_streams([judge_stream(*pair) for pair in zip(streams, sums, strict=True)]),
        agreement=agreed / raised if raised else None,
    )


def _write_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def _show_texts(report: TextReport) -> None:
    hard = report.hard_cases
    out.print(
        f"{report.texts} texts, mode macro-F1 {report.mode_macro_f1:.3f}, "
        f"genre macro-F1 {_figure(report.genre_macro_f1)}, "
        f"hard cases {_figure(hard['accuracy'] if hard else None)}",
        soft_wrap=True,
    )
    table = Table("label", "F1", "taken for")
    for f1, found in ((report.mode_f1, report.confusion), (report.genre_f1, report.genre_confusion)):
        for label, value in f1.items():
            wrong = ", ".join(f"{other} {n}" for other, n in found[label].items() if other != label)
            table.add_row(label, f"{value:.3f}", wrong)
    out.print(table)
    table = Table("source", "texts", "accuracy of the mode")
    for source, row in report.per_source.items():
        table.add_row(source, f"{row['texts']:.0f}", f"{row['accuracy']:.3f}")
    out.print(table)


def _show_streams(judged: _Judged) -> None:
    report = judged.report
    out.print(
        f"{report.streams} streams, {report.shifts} shifts; dated to {_figure(report.onset_error_median)} "
        f"agent turns (median); triggers right {_figure(report.trigger_accuracy)}, "
        f"cusum agrees {_figure(judged.agreement)}",
        soft_wrap=True,
    )
    table = Table(
        "alarm",
        "precision",
        "recall",
        "delay median",
        "delay p90",
        "on noise",
        "false alarms",
        "per 1000 turns",
    )
    thresholds = [(f"{point.alarm:g}", point.report) for point in judged.curve]
    for name, row in [("configured", report), *thresholds, ("cusum", judged.cusum)]:
        figures = map(_figure, (row.precision, row.recall, row.delay_median, row.delay_p90))
        counts = (str(row.noise_false_alarms), str(row.false_alarms), _figure(row.false_alarms_per_1000))
        table.add_row(name, *figures, *counts)
    out.print(table)
    table = Table("true trigger", "found")
    for trigger, found in report.trigger_confusion.items():
        table.add_row(trigger, ", ".join(f"{name} {count}" for name, count in found.items()))
    out.print(table)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
