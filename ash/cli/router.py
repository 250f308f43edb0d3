"""`ash router`: fit it, ask it why, measure it."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.table import Table

from ash import logs
from ash.app import slice_specs
from ash.cli.options import DEFAULT_CONFIG, Config, out
from ash.config import Settings, load
from ash.domain.errors import ConfigError
from ash.domain.ports import Encoder
from ash.domain.values import Route, Situation, SliceFacts
from ash.heads.cache import HeadCache
from ash.heads.head import Head
from ash.instruments import opened_reference, opened_router, router_examples
from ash.routing.anchors import Anchors, load_anchors
from ash.routing.baselines import (
    encoder_baseline,
    fit_plain_head,
    length_baseline,
    majority_baseline,
    plain_head_key,
)
from ash.routing.evaluation import LabelledPrompt, Report, Scores, evaluate, parse_prompts

router_app = typer.Typer(help="Which slice answers, and how good that choice is.", no_args_is_help=True)

JsonOutput = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]


@router_app.command("fit")
def router_fit(config: Config = DEFAULT_CONFIG) -> None:
    """Fit the router on its anchors anew; a light encoder is made first where it has not been."""
    settings = _settings(config)

    async def fit() -> str:
        async with opened_router(settings, refit=True) as opened:
            return opened.encoder.identity

    started = time.perf_counter()
    identity = asyncio.run(fit())
    count = len(router_examples().texts)
    out.print(f"fitted on {count} examples with {identity} in {time.perf_counter() - started:.0f} s")


@router_app.command("explain")
def router_explain(
    text: Annotated[str, typer.Argument(help="The input.")],
    current: Annotated[str | None, typer.Option(help="The slice that the session is on.")] = None,
    pinned: Annotated[str | None, typer.Option(help="The slice that the user pinned.")] = None,
    history_tokens: Annotated[int, typer.Option(help="Tokens that a switch would prefill again.")] = 0,
    *,
    as_json: JsonOutput = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Say where an input would go and why. Example: ash router explain "write a parser in C"."""
    settings = _settings(config)
    situation = Situation(
        current=current,
        pinned=pinned,
        in_tool_loop=False,
        wants_vision=False,
        history_tokens=history_tokens,
        slices=_slice_facts(settings, current),
    )
    route = asyncio.run(_route(settings, text, situation))
    if as_json:
        _write_json(msgspec.to_builtins(route))
    else:
        _show_route(route)


@router_app.command("eval")
def router_eval(
    data: Annotated[Path, typer.Option(help="JSON Lines with the fields text, tier, intent, source?.")],
    as_json: JsonOutput = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Measure the router on labelled prompts, plain baselines beside it.

    Brier score and ECE are of the tier; those of the intent are named so. Example: ash router eval --data
    prompts.jsonl --json.
    """
    prompts = _read_prompts(data)
    report, baselines = asyncio.run(_evaluated(_settings(config), prompts))
    if as_json:
        scores = {name: msgspec.to_builtins(found) for name, found in baselines.items()}
        _write_json({**report.to_json(), "baselines": scores})
    else:
        _show_report(report, baselines)


def _settings(config: Path) -> Settings:
    """The settings; logs go to standard error, because standard output belongs to the result."""
    settings = load(config)
    logs.configure(settings.log.level, None)
    return settings


def _slice_facts(settings: Settings, current: str | None) -> tuple[SliceFacts, ...]:
    """The catalogue as a server would see it that has loaded `current` alone."""
    return tuple(
        SliceFacts(spec.name, spec.tier, spec.context, spec.vision, resident=spec.name == current)
        for spec in slice_specs(settings)
    )


async def _route(settings: Settings, text: str, situation: Situation) -> Route:
    async with opened_router(settings) as opened:
        (vector,) = await opened.encoder.encode([text])
        return opened.router.decide(vector, text, situation)


def _read_prompts(path: Path) -> list[LabelledPrompt]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a readable file with --data FILE") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8: {error.reason}; convert the file") from error
    # Not splitlines: JSON strings may hold the other characters that it takes for line ends.
    return parse_prompts(text.split("\n"), str(path))


async def _evaluated(
    settings: Settings, prompts: list[LabelledPrompt]
) -> tuple[Report, Mapping[str, Scores]]:
    anchors, texts = load_anchors(), [prompt.text for prompt in prompts]
    async with opened_router(settings) as opened:
        vectors = await opened.encoder.encode(texts)
    async with opened_reference(settings.router.encoder) as reference:
        plain = await _plain_head(anchors, reference, opened.cache)
        plain_vectors = await reference.encode(texts)
    found = [
        opened.router.probabilities(vector, prompt.text)
        for vector, prompt in zip(vectors, prompts, strict=True)
    ]
    baselines = {
        "majority": majority_baseline(prompts),
        "length": length_baseline(anchors, prompts),
        "encoder_logistic": encoder_baseline(plain, prompts, plain_vectors),
    }
    return evaluate(prompts, found), baselines


async def _plain_head(anchors: Anchors, encoder: Encoder, cache: HeadCache) -> Head:
    """The baseline's head, fitted once."""
    key = plain_head_key(anchors, encoder.identity)
    head = cache.load(key)
    if head is None:
        head = fit_plain_head(anchors, await encoder.encode(anchors.texts()))
        cache.store(key, head)
    return head


def _write_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def _show_route(route: Route) -> None:
    out.print(f"{route.slice}: {route.reason}", soft_wrap=True, markup=False)
    table = Table("intent", "probability")
    for intent, probability in sorted(route.probabilities.items(), key=lambda pair: -pair[1])[:5]:
        table.add_row(intent, f"{probability:.3f}")
    out.print(table)
    table = Table("not taken", "probability", "price s", "because")
    for other in route.alternatives:
        chance, price = other["probability"], other["priceS"]
        table.add_row(str(other["slice"]), f"{chance:.3f}", f"{price:.1f}", str(other["reason"]))
    out.print(table)


def _show_report(report: Report, baselines: Mapping[str, Scores]) -> None:
    out.print(_scores_table("method", {"router": report.scores, **baselines}))
    out.print(_scores_table("source", report.per_source))
    mean = report.mean_over_sources
    out.print(f"mean over sources: tier {mean['tier_accuracy']:.3f}, intent {mean['intent_accuracy']:.3f}")
    table = Table("coverage", "share of wrong tiers")
    for coverage, risk in report.risk_coverage.points:
        table.add_row(f"{coverage:.2f}", f"{risk:.4f}")
    out.print(table)
    out.print(f"area under risk and coverage: {report.risk_coverage.area:.4f}")
    table = Table("intent", "F1", "taken for")
    for intent, f1 in report.per_intent_f1.items():
        row = sorted(report.confusion.get(intent, {}).items(), key=lambda pair: -pair[1])
        wrong = ", ".join(f"{other} {count}" for other, count in row if other != intent)
        table.add_row(intent, f"{f1:.3f}", wrong)
    out.print(table)


def _scores_table(first: str, rows: Mapping[str, Scores]) -> Table:
    table = Table(first, "rows", "tier", "intent", "intent macro-F1", "tier Brier", "tier ECE", "intent ECE")
    for name, scores in rows.items():
        figures = (
            scores.tier_accuracy,
            scores.intent_accuracy,
            scores.intent_macro_f1,
            scores.brier,
            scores.ece,
            scores.intent_ece,
        )
        table.add_row(name, str(scores.rows), *(f"{figure:.3f}" for figure in figures))
    return table
