"""Plans: every mistake is named with its key, and a schedule follows from its seed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ash.domain.errors import StudyError
from ash.study.plan import CONDITIONS, Plan, input_key, parse_plan, schedule, step_of

GOOD = """
name = "trial"
seeds = [1, 2, 3]
turns = 8
openings = ["Explain tries.", "Explain kidneys."]
go_on = ["Go on.", "Please continue."]
cue_turns = [3, 6]
remarks = ["It rains.", "It is late."]
[[cues]]
text = "Write a poem."
mode = "creative"
[[cues]]
text = "Let us chat."
mode = "conversational"
[sampling]
temperature = 0.9
"""


def plan() -> Plan:
    return parse_plan(GOOD, "plan.toml")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("seeds = [1, 2, 3]", "", "there is no seeds"),
        ("seeds = [1, 2, 3]", "seeds = []", "seeds: there is none"),
        ("seeds = [1, 2, 3]", "seeds = [1, 1]", "seeds: one stands there twice"),
        ("seeds = [1, 2, 3]", "seeds = [-1]", "seeds: each lies between"),
        ("seeds = [1, 2, 3]", 'seeds = ["a"]', r"seeds\[0\]: Expected `int`, got `str`"),
        ("turns = 8", "turns = 0", "turns: it is 0"),
        ("turns = 8", "tuns = 8", "unknown key tuns; did you mean turns"),
        ("temperature", "temprature", "unknown key sampling.temprature; did you mean sampling.temperature"),
        (
            "turns = 8",
            'turns = 8\nconditions = ["cued", "drunk"]',
            "conditions: drunk is unknown; there are auto",
        ),
        ("turns = 8", "turns = 8\nconditions = []", "conditions: there is none"),
        ('openings = ["Explain tries.", "Explain kidneys."]', "openings = []", "openings: there is none"),
        ('go_on = ["Go on.", "Please continue."]', 'go_on = [" "]', "go_on: a text is blank"),
        ("cue_turns = [3, 6]", "cue_turns = [9]", "cue_turns: each lies between 1 and turns = 8"),
        ("cue_turns = [3, 6]", "", "cue_turns: the conditions cued and placebo need"),
        ('remarks = ["It rains.", "It is late."]', "", "remarks: the condition placebo"),
        ('mode = "creative"', 'mode = "odd"', "cues: mode odd is unknown"),
        ('name = "trial"', 'name = "a/b"', "name: it is empty or holds a slash"),
        ("[sampling]", "[sampling", "not TOML"),
    ],
)
def test_a_mistake_is_named_with_its_key(old: str, new: str, problem: str) -> None:
    assert old in GOOD
    with pytest.raises(StudyError, match=f"plan.toml: {problem}"):
        parse_plan(GOOD.replace(old, new, 1), "plan.toml")


def test_the_plan_of_the_documentation_is_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "study.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    assert parse_plan(example, "docs/study.md").conditions == CONDITIONS
    assert all(condition in text for condition in CONDITIONS)


def test_what_a_condition_does_not_need_may_be_missing() -> None:
    text = 'name = "n"\nseeds = [1]\nturns = 2\nopenings = ["Hi"]\nconditions = ["autonomous", "no_memory"]'
    assert parse_plan(text, "plan.toml").go_on == ("Go on.",)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_schedule_is_an_opening_and_one_input_a_turn(condition: str) -> None:
    steps = schedule(plan(), condition, 2)
    assert [step.turn for step in steps] == list(range(9))
    assert steps[0].kind == "opening"
    assert steps == schedule(plan(), condition, 2)


def test_sessions_of_one_seed_differ_only_in_what_their_conditions_say() -> None:
    by_condition = {condition: schedule(plan(), condition, 1) for condition in CONDITIONS}
    assert by_condition["autonomous"] == by_condition["no_memory"]
    cued = by_condition["cued"]
    assert [step.turn for step in cued if step.kind == "cue"] == [3, 6]
    assert {step.mode for step in cued if step.kind == "cue"} == {"creative", "conversational"}
    for turn, step in enumerate(cued):
        if step.kind != "cue":
            assert step == by_condition["autonomous"][turn]


def test_the_events_of_the_placebo_are_as_many_as_cues_and_elsewhere_for_other_seeds() -> None:
    times = {
        seed: [step.turn for step in schedule(plan(), "placebo", seed) if step.kind == "remark"]
        for seed in range(20)
    }
    assert {len(turns) for turns in times.values()} == {2}
    assert len({tuple(turns) for turns in times.values()}) > 5


def test_an_input_is_found_again_by_its_key() -> None:
    steps = schedule(plan(), "cued", 1)
    keys = [input_key(plan(), "cued", 1, step) for step in steps]
    assert len(set(keys)) == len(keys)
    assert [step_of(steps, key) for key in keys] == list(steps)
    assert step_of(steps, None) is None
    assert step_of(steps, "a client's own key") is None


def test_another_plan_has_another_digest() -> None:
    assert plan().digest == plan().digest
    assert plan().digest != parse_plan(GOOD.replace("turns = 8", "turns = 7"), "p").digest
