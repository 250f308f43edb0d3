"""The step planner: never over the batch, nobody starves, and those who decode stall for a bounded time."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ash.slices.worker.schedule import (
    AGEING_TOKENS,
    STEP_TOKENS,
    Allowance,
    Decoding,
    Prefill,
    StepPlan,
    plan_step,
)

decoding_lists = st.lists(st.integers(0, 50), max_size=20).map(
    lambda waits: [Decoding(key, waited) for key, waited in enumerate(waits)]
)
prefill_lists = st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 300)), max_size=20).map(
    lambda entries: [
        Prefill(1000 + key, remaining, key, waited) for key, (remaining, waited) in enumerate(entries)
    ]
)


@settings(deadline=None)  # a slow machine is no fault
@given(decoding_lists, prefill_lists, st.integers(2, 600), st.integers(0, 200), st.integers(0, 128))
def test_a_step_keeps_its_limits_and_wastes_nothing(
    decoding: list[Decoding], prefills: list[Prefill], batch: int, alone: int, beside: int
) -> None:
    plan = plan_step(decoding, prefills, batch=batch, allowance=Allowance(alone, beside))
    remaining = {prompt.key: prompt.remaining for prompt in prefills}
    assert plan.tokens <= batch
    assert len(set(plan.decode)) == len(plan.decode)
    assert len({key for key, _ in plan.prefill}) == len(plan.prefill)
    assert all(1 <= tokens <= remaining[key] for key, tokens in plan.prefill)
    prompt_tokens = sum(tokens for _, tokens in plan.prefill)
    assert bool(plan.tokens) == bool(decoding or prefills)
    if not decoding:
        # A prompt at a time, and more only as long as a step has few tokens and they fit as a whole.
        left = [tokens for key, tokens in remaining.items() if key not in dict(plan.prefill)]
        assert prompt_tokens >= min(STEP_TOKENS, batch) or not left or prompt_tokens + max(left) > batch
        assert not prefills or prompt_tokens >= min(batch, *remaining.values())
    elif plan.decode:
        # Everyone decodes as long as the batch has the room; prompts fill what is left and allowed.
        assert len(plan.decode) == min(len(decoding), batch - 1 if prefills else batch)
        room = batch - len(plan.decode)
        assert prompt_tokens == min(room, beside, sum(remaining.values()))
    else:
        # They wait only for prompts that are finished by this step.
        assert prompt_tokens <= alone
        assert all(tokens == remaining[key] for key, tokens in plan.prefill)


def test_short_prompts_are_answered_one_after_the_other_before_the_next_token_is_due() -> None:
    prefills = [Prefill(key, remaining=30, arrival=key) for key in range(3)]
    plan = plan_step([Decoding(9)], prefills, batch=512, allowance=Allowance(alone=90, beside=64))
    assert plan == StepPlan((), ((0, 30),))
    plan = plan_step([Decoding(9)], prefills[1:], batch=512, allowance=Allowance(alone=29, beside=0))
    assert plan == StepPlan((9,), ())


def test_a_long_prompt_is_computed_beside_the_others() -> None:
    prefills = [Prefill(1, remaining=500, arrival=0)]
    plan = plan_step([Decoding(0)], prefills, batch=512, allowance=Allowance(alone=150, beside=64))
    assert plan == StepPlan((0,), ((1, 64),))


def test_tiny_prompts_share_a_step() -> None:
    prefills = [Prefill(key, remaining=10, arrival=key) for key in range(5)]
    plan = plan_step([], prefills, batch=512, allowance=Allowance(0, 0))
    assert plan.prefill == ((0, 10), (1, 10), (2, 10))


def test_the_shortest_prompt_goes_first() -> None:
    prefills = [Prefill(1, remaining=500, arrival=0), Prefill(2, remaining=20, arrival=1)]
    plan = plan_step([Decoding(0)], prefills, batch=512, allowance=Allowance(alone=0, beside=64))
    assert plan.prefill == ((2, 20), (1, 44))


def test_of_equal_prompts_the_first_goes_first() -> None:
    prefills = [Prefill(1, remaining=100, arrival=5), Prefill(2, remaining=100, arrival=4)]
    plan = plan_step([Decoding(0)], prefills, batch=512, allowance=Allowance(alone=0, beside=64))
    assert plan.prefill == ((2, 64),)


def test_a_sequence_that_waited_goes_first() -> None:
    plan = plan_step([Decoding(0, 0), Decoding(1, 3), Decoding(2, 1)], [], batch=2, allowance=Allowance(8, 8))
    assert plan.decode == (1, 2)


@settings(deadline=None)  # a slow machine is no fault
@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 400), st.integers(0, 8))
def test_no_prompt_starves_under_a_stream_of_shorter_ones(
    long: int, chunk: int, short: int, decoding: int
) -> None:
    """A prompt is passed only by those that arrive within long / AGEING_TOKENS steps of it."""
    batch = decoding + chunk + 1
    remaining = {0: long}
    arrived = {0: 0}
    rivals = 0
    step = 0
    while 0 in remaining:
        # One rival a step, always as long as a step's prefill can be or shorter: the worst stream.
        rivals += 1
        remaining[rivals], arrived[rivals] = min(short, chunk), step
        prefills = [Prefill(key, left, key, step - arrived[key]) for key, left in remaining.items()]
        plan = plan_step(
            [Decoding(-1 - number) for number in range(decoding)],
            prefills,
            batch=batch,
            allowance=Allowance(0, chunk),
        )
        if decoding:
            assert len(plan.decode) == decoding
        for key, tokens in plan.prefill:
            remaining[key] -= tokens
            if not remaining[key]:
                del remaining[key]
        step += 1
        overtakers = long // AGEING_TOKENS + 1
        assert step <= overtakers + (long + overtakers * min(short, chunk)) // chunk + 2


@settings(deadline=None)  # a slow machine is no fault
@given(st.integers(2, 12), st.integers(2, 8), st.booleans())
def test_every_sequence_is_served_in_turn(sequences: int, batch: int, prompt_waits: bool) -> None:
    served_at = dict.fromkeys(range(sequences), 0)
    places = batch - 1 if prompt_waits else batch
    for step in range(1, 60):
        prompts = [Prefill(99, 10_000, 0, step)] if prompt_waits else []
        plan = plan_step(
            [Decoding(key, step - at) for key, at in served_at.items()],
            prompts,
            batch=batch,
            allowance=Allowance(0, 4),
        )
        assert bool(plan.prefill) == prompt_waits
        for key in plan.decode:
            served_at[key] = step
        assert all(step - at <= -(-sequences // places) for at in served_at.values())
