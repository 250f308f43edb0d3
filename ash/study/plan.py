"""The plan of a study: what is run, how often, and what is said when. Pure."""

from __future__ import annotations

import difflib
import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
from msgspec import Struct

from ash.domain.errors import StudyError
from ash.domain.values import MODES

CONDITIONS = ("autonomous", "cued", "no_memory", "placebo")
"""What a session can be run under:

autonomous: after the opening the agent is told to go on, in neutral words, turn after turn.
cued: the same, but at the turns of `cue_turns` a request for another mode comes in; the control, whose
    triggers are known.
no_memory: the same as autonomous, but the agent sees the opening alone and nothing it said since.
placebo: the same as cued, but the events are neutral remarks and their times are shuffled; what happens near
    them happens by chance.
"""

Kind = Literal["opening", "go_on", "cue", "remark"]

LARGEST_SEED = 2**32 - 2
"""llama.cpp takes 2**32 - 1 for `draw one yourself`."""


class Cue(Struct, frozen=True, forbid_unknown_fields=True):
    """A request for a mode."""

    text: str
    mode: str


class PlanSampling(Struct, frozen=True, forbid_unknown_fields=True):
    """What replaces the slice's own sampling; see docs/configuration.md. None leaves the slice's value."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    max_tokens: int | None = None


class Plan(Struct, frozen=True, forbid_unknown_fields=True):
    """One study.

    Attributes:
        name: part of file names and of the keys of the study's inputs.
        seeds: one session of every condition for each; the slice draws its tokens with it.
        turns: self-directed turns of a session, behind the opening.
        conditions: of CONDITIONS.
        slice: pins the sessions to a slice; None leaves the choice to the router.
        persona: None for the one of config.toml.
        openings: first inputs; a session's seed chooses one.
        go_on: neutral prompts for the next turn; a session's seed draws from them.
        cues, cue_turns: requests of the condition cued, and the turns (from 1) at which one comes in.
        remarks: neutral events of the condition placebo.
        bootstrap_seed: of the report's intervals.
    """

    name: str
    seeds: tuple[int, ...]
    turns: int
    openings: tuple[str, ...]
    conditions: tuple[str, ...] = CONDITIONS
    slice: str | None = None
    persona: str | None = None
    go_on: tuple[str, ...] = ("Go on.",)
    cues: tuple[Cue, ...] = ()
    cue_turns: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()
    sampling: PlanSampling = PlanSampling()
    bootstrap_seed: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 over the plan, hex: two runs of one study have the same."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class Step(Struct, frozen=True):
    """One input. `turn` 0 is the opening; `mode` is what a cue asks for."""

    turn: int
    kind: Kind
    text: str
    mode: str | None = None


def parse_plan(text: str, source: str) -> Plan:
    """The plan in TOML `text`; `source` names it in errors.

    Raises:
        StudyError: not TOML, or a key is unknown, missing or wrong; names the key.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"{source}: not TOML: {error}") from error
    _refuse_unknown(raw, Plan, source, "")
    _refuse_unknown(raw.get("sampling"), PlanSampling, source, "sampling.")
    for key in ("name", "seeds", "turns", "openings"):
        if key not in raw:
            raise StudyError(f"{source}: there is no {key}; every plan needs one (docs/study.md)")
    try:
        plan = msgspec.convert(raw, Plan)
    except msgspec.ValidationError as error:
        message, separator, place = str(error).partition(" - at `$.")
        where = f"{place.rstrip('`')}: {message}" if separator else message
        raise StudyError(f"{source}: {where}") from error
    for problem in _problems(plan):
        raise StudyError(f"{source}: {problem}")
    return plan


def _refuse_unknown(raw: object, kind: type[Struct], source: str, prefix: str) -> None:
    known = [field.name for field in msgspec.structs.fields(kind)]
    for key in raw if isinstance(raw, Mapping) else ():
        if key not in known:
            (near,) = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise StudyError(f"{source}: unknown key {prefix}{key}; did you mean {prefix}{near}?")


def _problems(plan: Plan) -> list[str]:
    """What is wrong with the values, each with its key."""
    problems: list[str] = []

    def check(holds: bool, problem: str) -> None:
        if not holds:
            problems.append(problem)

    unknown = [name for name in plan.conditions if name not in CONDITIONS]
    check(not unknown, f"conditions: {', '.join(unknown)} is unknown; there are {', '.join(CONDITIONS)}")
    check(bool(plan.conditions), f"conditions: there is none; write some of {', '.join(CONDITIONS)}")
    check(len(set(plan.conditions)) == len(plan.conditions), "conditions: one stands there twice")
    check(bool(plan.seeds), "seeds: there is none; every session of a condition needs one")
    check(
        len(set(plan.seeds)) == len(plan.seeds), "seeds: one stands there twice; its sessions would be equal"
    )
    check(
        all(0 <= seed <= LARGEST_SEED for seed in plan.seeds),
        f"seeds: each lies between 0 and {LARGEST_SEED}",
    )
    check(plan.turns >= 1, f"turns: it is {plan.turns}; a session has at least 1 self-directed turn")
    for key in ("openings", "go_on", "remarks"):
        check(all(text.strip() for text in getattr(plan, key)), f"{key}: a text is blank")
    check(bool(plan.openings), "openings: there is none; a session begins with one")
    check(bool(plan.go_on), "go_on: there is none; it is what stands for a self-directed turn")
    wrong = [cue.mode for cue in plan.cues if cue.mode not in MODES]
    check(not wrong, f"cues: mode {', '.join(wrong)} is unknown; there are {', '.join(MODES)}")
    if {"cued", "placebo"} & set(plan.conditions):
        check(bool(plan.cue_turns), "cue_turns: the conditions cued and placebo need at least one")
        inside = all(1 <= turn <= plan.turns for turn in plan.cue_turns)
        check(inside, f"cue_turns: each lies between 1 and turns = {plan.turns}")
        check(len(set(plan.cue_turns)) == len(plan.cue_turns), "cue_turns: one stands there twice")
    check("cued" not in plan.conditions or bool(plan.cues), "cues: the condition cued needs at least one")
    check(
        "placebo" not in plan.conditions or bool(plan.remarks),
        "remarks: the condition placebo needs at least one",
    )
    check(bool(plan.name) and "/" not in plan.name, "name: it is empty or holds a slash")
    return problems


def schedule(plan: Plan, condition: str, seed: int) -> tuple[Step, ...]:
    """What is said to the session of `seed` under `condition`: the opening and `plan.turns` inputs behind it.

    Opening and neutral prompts depend on the seed alone, so that the sessions of one seed differ only in what
    their conditions say.
    """
    shared = np.random.default_rng([seed, 0])
    opening = plan.openings[shared.integers(len(plan.openings))]
    go_on = [plan.go_on[shared.integers(len(plan.go_on))] for _ in range(plan.turns)]
    steps = {turn: Step(turn, "go_on", text) for turn, text in enumerate(go_on, start=1)}
    own = np.random.default_rng([seed, 1 + CONDITIONS.index(condition)])
    if condition == "cued":
        for number, turn in enumerate(sorted(plan.cue_turns), start=int(own.integers(len(plan.cues)))):
            cue = plan.cues[number % len(plan.cues)]
            steps[turn] = Step(turn, "cue", cue.text, cue.mode)
    elif condition == "placebo":
        for turn in own.choice(np.arange(1, plan.turns + 1), size=len(plan.cue_turns), replace=False):
            steps[int(turn)] = Step(int(turn), "remark", plan.remarks[own.integers(len(plan.remarks))])
    return (Step(0, "opening", opening), *(steps[turn] for turn in sorted(steps)))


def input_key(plan: Plan, condition: str, seed: int, step: Step) -> str:
    """The idempotency key of an input: the log then says which of them are a study's, and of what kind."""
    return f"study/{plan.name}/{condition}/{seed}/{step.turn}/{step.kind}"


def step_of(steps: Sequence[Step], key: str | None) -> Step | None:
    """The step that an input with this key was; None for one that is no study's."""
    if key is None or not key.startswith("study/"):
        return None
    turn, kind = key.split("/")[-2:]
    return next((step for step in steps if str(step.turn) == turn and step.kind == kind), None)
