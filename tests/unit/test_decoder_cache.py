"""The decode loop and the KV cache: what is reused, shared, paged out, cut, moved and forgotten."""

from collections.abc import Iterator

import pytest

from ash.slices.worker import slots as slots_module
from ash.slices.worker.messages import (
    Begun,
    Refused,
)
from ash.slices.worker.sequence import SequenceRecord, TokenSequence
from ash.slices.worker.state_files import SavedState
from tests.decoder_bench import LETTERS, Bench, alphabet, tidy_bench


@pytest.fixture
def bench() -> Iterator[Bench]:
    with tidy_bench() as bench:
        yield bench


def test_a_turn_computes_only_what_is_new(bench: Bench) -> None:
    bench.submit(1, "abc", session="s", max_output=5)
    bench.run()
    bench.submit(2, "abc" + bench.text(1) + "xyz", session="s", max_output=2)
    bench.run()
    # The token sampled last was never computed; it comes with the next prompt.
    assert bench.begun(2) == Begun(2, 11, 7, 0)
    assert bench.text(2) == alphabet(11, 2)


def test_a_changed_history_is_cut_where_it_differs(bench: Bench) -> None:
    bench.submit(1, "abcdef", session="s")
    bench.run()
    bench.submit(2, "abcxyz", session="s", max_output=1)
    bench.run()
    assert bench.begun(2) == Begun(2, 6, 3, 0)
    assert bench.text(2) == "g"


def test_the_same_prompt_again_still_computes_one_token(bench: Bench) -> None:
    bench.submit(1, "abcdef", session="s", max_output=1)
    bench.run()
    bench.submit(2, "abcdef", session="s", max_output=1)
    bench.run()
    assert bench.begun(2) == Begun(2, 6, 5, 0)
    assert bench.text(2) == "g"


@pytest.mark.parametrize(
    ("kept", "reused"),
    [
        (6, 0),  # an edit in the turn before: the checkpoint lies behind it
        (15, 15),  # another question
        (17, 15),  # the same turn again
        (20, 15),  # the answer was cut short
        (22, 22),  # the conversation goes on
    ],
)
@pytest.mark.parametrize("paged", [False, True])
def test_a_cut_that_opens_the_sliding_window_goes_back_to_where_the_turn_began(
    kept: int, reused: int, *, paged: bool
) -> None:
    """22 tokens are cached: a turn of 15, and from a checkpoint on one of 7. A window of four is held."""
    bench = Bench(slots=1 if paged else 2)
    bench.inference.window = 4
    bench.slots._sliding_window = 4
    bench.submit(1, "abcdefghij", session="s", max_output=6)
    bench.run()
    second = "abcdefghij" + bench.text(1) + "x"
    bench.submit(2, second, session="s", max_output=6)
    bench.run()
    if paged:
        bench.submit(3, "other", session="other", max_output=1)
        bench.run()
    history = second + bench.text(2)
    bench.submit(4, history[:kept] + ("z" if kept != 17 else ""), session="s", max_output=1)
    bench.run()
    assert bench.begun(4).reused_tokens == reused
    assert bench.text(4) == LETTERS[(kept + (kept != 17)) % 26]


def test_windows_of_tokens_that_were_cut_are_never_put_back() -> None:
    bench = Bench(slots=1, batch=4)
    bench.inference.window = 8
    bench.slots._sliding_window = 4
    bench.submit(1, "abcdefghij", session="s", max_output=1)
    bench.run()
    bench.submit(2, "abcdefghijk", session="s", max_output=4)
    bench.run()
    bench.submit(3, "abcdefghzyxwv", session="s", max_output=1)
    bench.run()
    bench.submit(4, "abcdefghzyxq", session="s", max_output=1)
    bench.run()
    held = bench.inference.cache[0]
    assert held == bench.vocabulary.tokenise(b"abcdefghzyxq")


def test_a_preempted_generation_does_not_take_up_an_older_state() -> None:
    bench = Bench(slots=2)
    bench.states.put("s", SavedState(SequenceRecord([0, 1], [1, 2], b"ab", 2), bytearray([0, 1])), keep=True)
    claimed = bench.slots.claim("s", TokenSequence.of(SequenceRecord([5, 6, 7], [1, 2, 3], b"fgh", 0)))
    assert claimed is not None
    assert claimed.sequence.tokens == [5, 6, 7]


def test_a_session_forgotten_while_it_is_busy_leaves_nothing() -> None:
    bench = Bench(slots=2)
    bench.submit(1, "abc", session="secret", max_output=6)
    bench.inference.before_step = lambda step: bench.decoder.forget("secret") if step == 2 else None
    bench.run()
    assert bench.slots.resident_sessions == 0
    assert bench.inference.cache[0] == []


def test_an_idle_session_is_paged_out_and_returns_without_computing(bench: Bench) -> None:
    for number in (1, 2, 3):
        bench.submit(number, session=f"s{number}", max_output=3)
    bench.run()
    assert bench.states.ram_sessions == 1
    bench.submit(4, "abcdef", session="s1", max_output=2)
    bench.run()
    assert bench.begun(4) == Begun(4, 6, 5, 0)
    assert bench.text(4) == "gh"
    # Session 2 had to go for it: its five tokens are all that is paged.
    assert (bench.states.ram_sessions, bench.states.ram_bytes) == (1, 5)


def test_the_session_that_was_idle_longest_is_paged_out(bench: Bench) -> None:
    for number, session in enumerate(("a", "b")):
        bench.submit(number, session=session, max_output=3)
    bench.run()
    bench.submit(2, "abcdef", session="a", max_output=1)
    bench.run()
    bench.submit(3, session="c", max_output=1)
    bench.run()
    assert list(bench.states._ram) == ["b"]


def test_the_paging_budget_drops_the_oldest() -> None:
    bench = Bench(slots=1, paged_bytes=8)
    for number in (1, 2, 3):
        bench.submit(number, session=f"s{number}", max_output=3)
    bench.run()
    assert (bench.states.ram_sessions, bench.states.ram_bytes) == (1, 5)
    bench.submit(4, "abcdef", session="s1", max_output=1)
    bench.run()
    assert bench.begun(4).reused_tokens == 0
    assert bench.text(4) == "g"


def test_without_a_budget_nothing_is_kept() -> None:
    bench = Bench(slots=1, paged_bytes=0)
    for number in (1, 2):
        bench.submit(number, session=f"s{number}")
    bench.run()
    assert bench.states.ram_sessions == 0


def test_the_system_prompt_is_computed_once_for_all_sessions() -> None:
    bench = Bench(slots=3)
    for number, addition in enumerate(("x", "yy", "zzz")):
        bench.submit(number, "system" + addition, max_output=2, shared=6)
    bench.run()
    assert [bench.begun(number).reused_tokens for number in range(3)] == [0, 6, 6]
    assert [bench.text(number) for number in range(3)] == [alphabet(7, 2), alphabet(8, 2), alphabet(9, 2)]
    prompts = sum(len(entry.tokens) for batch in bench.inference.batches for entry in batch)
    assert (
        prompts == len("system") + len("xyyzzz") + 3
    )  # each answer's first token is computed for the second


def test_a_cancelled_system_prompt_is_computed_by_the_next_session() -> None:
    bench = Bench(slots=2, batch=4)
    bench.submit(1, "systemprompt", max_output=2, shared=11)
    bench.submit(2, "systemprompx", max_output=2, shared=11)
    bench.inference.before_step = lambda step: bench.decoder.cancel(1) if step == 1 else None
    bench.run()
    assert bench.begun(2).reused_tokens == 0
    assert bench.text(2) == alphabet(12, 2)


def test_a_fork_copies_what_its_parent_has_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "_WORTH_COPYING", 4)
    bench = Bench(slots=2)
    bench.submit(1, "abcdefgh", session="parent", max_output=4)
    bench.run()
    bench.submit(2, "abcdefgh" + bench.text(1)[:2] + "zz", session="fork", max_output=2)
    bench.run()
    assert bench.begun(2).reused_tokens == 10
    assert bench.text(2) == alphabet(12, 2)
    # The parent has lost nothing.
    bench.submit(3, "abcdefgh" + bench.text(1) + "z", session="parent", max_output=2)
    bench.run()
    assert bench.begun(3).reused_tokens == 11


def test_sequences_that_decode_are_brought_together() -> None:
    bench = Bench(slots=4)
    for number in range(4):
        bench.submit(number, session=f"s{number}", max_output=2)
    bench.run()
    for number, session in ((10, "s1"), (11, "s3")):
        bench.submit(number, "abcde" + "f" * (number - 9), session=session, max_output=9)
    bench.inference.batches.clear()
    bench.run()
    together = [[entry.slot for entry in batch] for batch in bench.inference.batches if len(batch) == 2]
    assert together[0] == [1, 3]
    assert together[-1] in ([0, 1], [1, 2], [2, 3])
    assert bench.text(10) == alphabet(6, 9)
    assert bench.text(11) == alphabet(7, 9)


def test_a_forgotten_session_leaves_nothing() -> None:
    bench = Bench(slots=1)
    bench.submit(1, "abcde", session="secret", max_output=2)
    bench.submit(2, "xyz", session="other", max_output=2)
    bench.run()
    bench.decoder.forget("secret")
    bench.submit(3, "abcde", session="secret", max_output=2)
    bench.run()
    assert bench.begun(3).reused_tokens == 0
    bench.decoder.forget("secret")
    bench.submit(4, "abcde", session="secret", max_output=2)
    bench.run()
    assert bench.begun(4).reused_tokens == 0


def test_a_full_cache_pages_out_an_idle_session_first() -> None:
    bench = Bench(slots=2)
    bench.submit(1, max_output=6)
    bench.run()
    bench.inference.cells = 16
    bench.submit(2, max_output=9)
    bench.run()
    assert bench.text(2) == alphabet(3, 9)
    assert bench.decoder.statistics().preempted == 0
    assert bench.states.ram_sessions == 1


@pytest.mark.parametrize("paged_bytes", [0, 1000])
def test_a_full_cache_preempts_the_newest_and_loses_nothing(paged_bytes: int) -> None:
    bench = Bench(slots=3, paged_bytes=paged_bytes)
    bench.inference.cells = 40
    for number in (1, 2, 3):
        bench.submit(number, "abcdef", max_output=15)
    bench.run()
    assert bench.decoder.statistics().preempted >= 1
    for number in (1, 2, 3):
        assert bench.text(number) == alphabet(6, 15)
        assert isinstance(bench.begun(number), Begun)


def test_a_cache_too_small_for_one_fails_that_one() -> None:
    bench = Bench(slots=2)
    bench.inference.cells = 8
    bench.submit(1, "abcdef", max_output=15)
    bench.run()
    end = bench.end(1)
    assert isinstance(end, Refused)
    assert "no room" in end.message
    bench.submit(2, "abc", max_output=2)
    bench.run()
    assert bench.text(2) == "de"
