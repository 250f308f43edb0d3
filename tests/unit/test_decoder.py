"""The decode loop: batches, pauses, cancelling, failures and what anybody is told."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ash.slices.worker.messages import (
    UNACKNOWLEDGED_TOKENS,
    Begun,
    Ended,
    Progress,
    Refused,
    Update,
)
from tests.decoder_bench import CONTEXT, END, LETTERS, Bench, alphabet, tidy_bench


@pytest.fixture
def bench() -> Iterator[Bench]:
    with tidy_bench() as bench:
        yield bench


def test_one_generation(bench: Bench) -> None:
    bench.submit(1, "abcde", max_output=4)
    bench.run()
    assert bench.text(1) == "fghi"
    assert bench.begun(1) == Begun(1, 5, 0, 0)
    end = bench.end(1)
    assert isinstance(end, Ended)
    assert (end.reason, end.output_tokens) == ("length", 4)


def test_one_frame_a_step(bench: Bench) -> None:
    bench.submit(1, "abc", max_output=6)
    bench.submit(2, "abcd", max_output=6)
    bench.run()
    assert (bench.text(1), bench.text(2)) == ("defghi", "efghij")
    assert len(bench.steps) <= len(bench.inference.batches) + 1
    assert any(
        {1, 2} <= {update.id for update in step.updates if isinstance(update, Progress)}
        for step in bench.steps
    )


def test_batches_keep_their_limits(bench: Bench) -> None:
    for number in range(6):
        bench.submit(number, "a" * (3 * number + 1), max_output=9)
    bench.run()
    for batch in bench.inference.batches:
        assert sum(len(entry.tokens) for entry in batch) <= 8
        assert [entry.slot for entry in batch] == sorted({entry.slot for entry in batch})
    for number in range(6):
        assert bench.text(number) == alphabet(3 * number + 1, 9)


def test_a_preempted_generation_hears_its_consumer() -> None:
    bench = Bench(slots=2)
    bench.decoder._context = bench.slots._context = 2000
    bench.inference.cells = 700
    bench.submit(1, max_output=500)
    bench.submit(2, max_output=500)
    shown = {1: 0, 2: 0}

    def consume(update: Update) -> None:
        if isinstance(update, Progress):
            shown[update.id] += update.tokens
            # The second reads only once it has been preempted.
            if update.id == 1 or bench.decoder.statistics().preempted:
                bench.decoder.acknowledge(update.id, shown[update.id])
                shown[update.id] = 0
        elif isinstance(update, Ended) and update.id == 1:
            bench.decoder.acknowledge(2, shown[2])

    bench.on_update = consume
    bench.run()
    assert bench.text(2) == alphabet(3, 500)


def test_the_same_session_waits_for_itself(bench: Bench) -> None:
    bench.submit(1, session="s")
    bench.submit(2, session="s")
    bench.submit(3, session="other")
    bench.run()
    kinds = [(type(update).__name__, update.id) for update in bench.updates]
    assert kinds.index(("Begun", 3)) < kinds.index(("Ended", 1)) < kinds.index(("Begun", 2))


def test_cancel_takes_effect_within_one_step(bench: Bench) -> None:
    bench.submit(1, max_output=30)
    bench.submit(2, max_output=6)
    bench.on_update = lambda update: (
        bench.decoder.cancel(1) if isinstance(update, Progress) and update.id == 1 else None
    )
    bench.run()
    end = bench.end(1)
    assert isinstance(end, Ended)
    assert (end.reason, end.output_tokens) == ("cancelled", 1)
    assert bench.text(2) == alphabet(3, 6)


def test_cancel_during_a_long_prompt(bench: Bench) -> None:
    bench.submit(1, "a" * 35)
    bench.inference.before_step = lambda step: bench.decoder.cancel(1) if step == 1 else None
    bench.run()
    end = bench.end(1)
    assert isinstance(end, Ended)
    assert (end.reason, end.output_tokens) == ("cancelled", 0)
    assert len(bench.inference.batches) == 2
    # What was computed of the prompt serves the next request.
    bench.submit(2, "a" * 35, session="1", max_output=1)
    bench.run()
    assert bench.begun(2).reused_tokens == 16
    assert bench.text(2) == LETTERS[35 % 26]


def test_cancel_while_waiting_and_twice_and_unknown(bench: Bench) -> None:
    for number in (1, 2, 3):
        bench.submit(number)
    for number in (3, 3, 77):
        bench.decoder.cancel(number)
    bench.run()
    assert bench.end(3) == Ended(3, "cancelled", 0, 0.0, 0.0)


def test_a_slow_consumer_pauses_its_own_generation_only() -> None:
    bench = Bench(slots=2)
    bench.decoder._context = bench.slots._context = 2000
    bench.submit(1, max_output=600)
    bench.submit(2, max_output=600)
    acknowledged = [0]

    def consume(update: Update) -> None:
        if isinstance(update, Progress) and update.id == 2:
            bench.decoder.acknowledge(2, update.tokens)
        if isinstance(update, Ended) and update.id == 2:
            acknowledged[0] = len(bench.text(1))
            bench.decoder.acknowledge(1, UNACKNOWLEDGED_TOKENS + 1)
        if isinstance(update, Progress) and update.id == 1 and acknowledged[0]:
            bench.decoder.acknowledge(1, update.tokens)

    bench.on_update = consume
    bench.run()
    assert acknowledged == [UNACKNOWLEDGED_TOKENS + 1]
    assert bench.text(1) == alphabet(3, 600)
    assert bench.text(2) == alphabet(3, 600)


def test_a_paused_generation_can_be_cancelled() -> None:
    bench = Bench(slots=2)
    bench.decoder._context = bench.slots._context = 2000
    bench.submit(1, max_output=600)
    bench.on_update = lambda update: (
        bench.decoder.cancel(1) if len(bench.text(1)) == UNACKNOWLEDGED_TOKENS + 1 else None
    )
    bench.run()
    end = bench.end(1)
    assert isinstance(end, Ended)
    assert end.reason == "cancelled"


def test_stop_strings_and_the_end_token(bench: Bench) -> None:
    bench.submit(1, "abc", max_output=20, stop=("hij",))
    bench.submit(2, "a", max_output=20, continuation="zz", stop=("zzb",))
    bench.run()
    assert bench.text(1) == "defg"
    assert bench.end(1).reason == "stop"  # type: ignore[union-attr] # Refused fails the test here
    assert bench.text(2) == ""
    assert bench.end(2).reason == "stop"  # type: ignore[union-attr] # Refused fails the test here
    assert [sampler.accepted for sampler in bench.inference.samplers] == [[], [25, 25]]


def test_the_end_token_is_not_counted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.inference, "sample", lambda sampler, index, constraint: END)
    bench.submit(1, "abc")
    bench.run()
    end = bench.end(1)
    assert isinstance(end, Ended)
    assert (end.reason, end.output_tokens, bench.text(1)) == ("stop", 0, "")


def test_the_context_ends_an_answer(bench: Bench) -> None:
    bench.submit(1, "abc", max_output=10_000)
    bench.run()
    assert len(bench.text(1)) == CONTEXT - 3
    assert bench.end(1).reason == "length"  # type: ignore[union-attr] # Refused fails the test here


def test_tokens_that_fail_fail_their_own_generation_by_name_and_no_other() -> None:
    bench = Bench(slots=2)
    bench.inference.poison = LETTERS.index("z")
    bench.submit(1, "azc", max_output=4)
    bench.submit(2, max_output=4)
    bench.submit(3, max_output=4)
    bench.run()
    end = bench.end(1)
    assert isinstance(end, Refused)
    assert "-3" in end.message
    assert bench.text(2) == bench.text(3) == "defg"
    # The session is usable afterwards.
    bench.submit(4, "abcd", session="1", max_output=2)
    bench.run()
    assert bench.text(4) == "ef"


def test_a_batch_that_fails_once_is_computed_again() -> None:
    bench = Bench(slots=2)
    bench.inference.codes = [0, -3]
    for number in (1, 2, 3):
        bench.submit(number, max_output=4)
    bench.run()
    for number in (1, 2, 3):
        assert bench.text(number) == "defg"


def test_statistics_count(bench: Bench) -> None:
    bench.submit(1, "abcde", max_output=4)
    bench.run()
    statistics = bench.decoder.statistics()
    assert statistics.prefilled_tokens == 5
    assert statistics.decoded_tokens == 4
    assert statistics.steps == len(bench.inference.batches)
    assert statistics.resident_sessions == 1
    assert statistics.step_age_s == 0.0


requests = st.lists(
    st.tuples(
        st.integers(0, 3),  # session
        st.text(alphabet="abc", min_size=1, max_size=12),  # what the user adds to the history
        st.integers(1, 14),  # max_output
        st.one_of(st.none(), st.integers(0, 6)),  # cancelled once it has shown so many letters
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)  # a slow machine is no fault
@given(
    requests,
    st.integers(1, 3),
    st.sampled_from([0, 20, 1000]),
    st.integers(4, 9),
    st.sampled_from([36, 50, 10_000]),
    st.integers(0, 3),
)
def test_any_mixture_of_requests_gets_its_own_answer(
    wanted: list[tuple[int, str, int, int | None]],
    slots: int,
    paged_bytes: int,
    batch: int,
    cells: int,
    rounds: int,
) -> None:
    """Slots, paging, preemption, shared batches and cancellations never show in anyone's text."""
    bench = Bench(slots=slots, paged_bytes=paged_bytes, batch=batch)
    bench.inference.cells = cells
    histories = dict.fromkeys(range(4), "")
    cancel_at: dict[int, int] = {}

    def on_update(update: Update) -> None:
        if isinstance(update, Progress) and len(bench.text(update.id)) > cancel_at.get(update.id, 99):
            bench.decoder.cancel(update.id)

    bench.on_update = on_update
    number = 0
    for _ in range(rounds + 1):
        first = number
        prompts: dict[int, tuple[int, str, int]] = {}
        for session, addition, max_output, cancelled in wanted:
            # A history too long begins anew, as one that was edited.
            if len(histories[session]) > CONTEXT // 2 - 12:
                histories[session] = ""
            text = histories[session] + addition
            bench.submit(number, text, session=str(session), max_output=max_output)
            prompts[number] = (session, text, max_output)
            if cancelled is not None:
                cancel_at[number] = cancelled
            number += 1
        bench.run()
        for each in range(first, number):
            session, text, max_output = prompts[each]
            end = bench.end(each)
            assert isinstance(end, Ended)
            answer = bench.text(each)
            assert alphabet(len(text), max_output).startswith(answer)
            assert end.output_tokens == len(answer)
            if each in cancel_at:
                assert len(answer) >= min(max_output, cancel_at[each] + 1)
            else:
                assert (end.reason, len(answer)) == ("length", min(max_output, CONTEXT - len(text)))
            histories[session] = text + answer
    assert all(sampler.closed for sampler in bench.inference.samplers)
    assert bench.states.ram_bytes <= paged_bytes
