"""The decode loop on a model of our own: every path that llama.cpp seldom takes, without a model file.

The fake model says the alphabet: after a prompt of n tokens it continues with tokens n, n + 1, ... of a
vocabulary of single letters, so every answer can be foreseen and shows whether the cache was kept right.
"""

import string
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ash.domain.values import Sampling
from ash.slices.worker import slots as slots_module
from ash.slices.worker.decoder import Decoder
from ash.slices.worker.generation import Generation, Prompt
from ash.slices.worker.inference import BatchEntry, Constraint, Sampler
from ash.slices.worker.messages import (
    UNACKNOWLEDGED_TOKENS,
    Begun,
    Ended,
    Progress,
    Refused,
    Step,
    Update,
)
from ash.slices.worker.pace import Pace
from ash.slices.worker.schedule import Allowance
from ash.slices.worker.sequence import SequenceRecord, TokenSequence
from ash.slices.worker.slots import SlotTable
from ash.slices.worker.state_files import SavedState
from ash.slices.worker.states import StateStore
from ash.slices.worker.tokenising import tokenised

LETTERS = string.ascii_lowercase
END = 26
CONTEXT = 40


class LetterVocabulary:
    """Tokens are letters; token 26 ends an answer."""

    def tokenise(self, text: bytes) -> list[int]:
        return [LETTERS.index(chr(byte)) for byte in text]

    def piece(self, token: int) -> bytes:
        return b"" if token == END else LETTERS[token].encode()

    def pieces(self) -> list[bytes]:
        raise NotImplementedError("only output formats need the whole vocabulary")

    def shown_piece(self, token: int) -> bytes:
        return self.piece(token)

    def is_end(self, token: int) -> bool:
        return token == END

    def is_control(self, token: int) -> bool:
        return token == END


class CountingSampler:
    """Remembers whether it was freed."""

    def __init__(self) -> None:
        self.accepted: list[int] = []
        self.closed = False

    def accept(self, token: int) -> None:
        self.accepted.append(token)

    def close(self) -> None:
        self.closed = True


class AlphabetInference:
    """A KV cache of token lists; the token behind a position is the position's number, modulo the letters."""

    def __init__(self, *, cells: int = 10_000) -> None:
        self.cache: dict[int, list[int]] = {}
        self.cells = cells
        self.window = 0
        self.first: dict[int, int] = {}
        self.poison: int | None = None
        self.codes: list[int] = []
        self.batches: list[list[BatchEntry]] = []
        self.samplers: list[CountingSampler] = []
        self.before_step: Callable[[int], None] = lambda step: None
        self._logits: dict[int, int] = {}

    def decode(self, entries: Sequence[BatchEntry]) -> int:
        self.before_step(len(self.batches))
        self.batches.append(list(entries))
        assert entries, "an empty batch is an error of the caller"
        if self.codes and (code := self.codes.pop(0)):
            # As llama.cpp: what was computed before a fatal error stays in the cache.
            for entry in entries:
                self.cache.setdefault(entry.slot, []).extend(entry.tokens)
            return code
        if any(self.poison in entry.tokens for entry in entries):
            for entry in entries:
                self.cache.setdefault(entry.slot, []).extend(entry.tokens)
            return -3
        if self.used + sum(len(entry.tokens) for entry in entries) > self.cells:
            return 1
        self._logits.clear()
        index = -1
        for entry in entries:
            held = self.cache.setdefault(entry.slot, [])
            assert entry.position == len(held), "positions of a sequence have no gaps"
            held.extend(entry.tokens)
            if self.window:
                self.first[entry.slot] = max(self.first.get(entry.slot, 0), len(held) - self.window)
            index += len(entry.tokens)
            if entry.wants_logits:
                self._logits[index] = len(held) % 26
        return 0

    @property
    def used(self) -> int:
        return sum(map(len, self.cache.values()))

    def sample(self, sampler: Sampler, index: int, constraint: Constraint | None) -> int:
        return self._logits.pop(index)

    def new_sampler(self, sampling: Sampling, *, seed: int) -> CountingSampler:
        self.samplers.append(CountingSampler())
        return self.samplers[-1]

    def first_position(self, slot: int) -> int:
        return self.first.get(slot, 0) if self.cache.get(slot) else -1

    def remove(self, slot: int, start: int) -> bool:
        del self.cache.setdefault(slot, [])[start:]
        if not start:
            self.first.pop(slot, None)
        return True

    def save_windows(self, slot: int) -> bytearray:
        return bytearray([self.first.get(slot, 0)])

    def restore_windows(self, slot: int, windows: bytearray) -> bool:
        self.first[slot] = windows[0]
        return True

    def state_bytes(self, slot: int) -> int:
        return len(self.cache.get(slot, ()))

    def save(self, slot: int) -> bytearray:
        return bytearray(self.cache[slot])

    def restore(self, slot: int, state: bytearray) -> bool:
        assert not self.cache.get(slot), "a state goes into an empty sequence"
        self.cache[slot] = list(state)
        if self.window:
            # A saved state holds the window and no more.
            self.first[slot] = max(0, len(state) - self.window)
        return True


class FixedPace(Pace):
    """As many prompt tokens a step as the test says."""

    def __init__(self, chunk: int, batch: int) -> None:
        super().__init__(stall_s=1.0, batch=batch)
        self.chunk = chunk

    def allowance(self, *, waited_s: float) -> Allowance:
        return Allowance(alone=0, beside=self.chunk)


class Bench:
    """A decoder on the fake model, run until every generation has ended."""

    def __init__(self, *, slots: int = 2, paged_bytes: int = 1000, batch: int = 8, chunk: int = 3) -> None:
        self.inference = AlphabetInference()
        self.vocabulary = LetterVocabulary()
        self.updates: list[Update] = []
        self.steps: list[Step] = []
        self.states = StateStore(ram_bytes=paged_bytes, folder=None)
        self.slots = SlotTable(self.inference, self.states, slots=slots, context=CONTEXT, sliding_window=0)
        self.decoder = Decoder(
            self.inference,
            self.vocabulary,
            self.slots,
            slot_count=slots,
            context=CONTEXT,
            batch=batch,
            pace=FixedPace(chunk, batch),
            send=self._take,
        )
        self.on_update: Callable[[Update], None] = lambda update: None
        self._open = 0

    def _take(self, step: Step) -> None:
        assert step.updates, "no empty frames"
        self.steps.append(step)
        for update in step.updates:
            self.updates.append(update)
            self.on_update(update)
            if isinstance(update, Ended | Refused):
                self._open -= 1
        if not self._open:
            self.decoder.stop()

    def submit(
        self,
        number: int,
        text: str = "abc",
        *,
        session: str | None = None,
        max_output: int = 5,
        stop: tuple[str, ...] = (),
        continuation: str = "",
        shared: int = 0,
    ) -> None:
        self._open += 1
        prompt = Prompt(
            tokenised(self.vocabulary, text.encode()),
            0,
            max_output,
            tuple(self.vocabulary.tokenise(continuation.encode())),
            shared_tokens=shared,
        )
        self.decoder.submit(
            Generation(
                number, session or str(number), prompt, Sampling(), stop=stop, continuation=continuation
            )
        )

    def run(self) -> None:
        self.decoder._running = True
        self.decoder.run()

    def text(self, number: int) -> str:
        return "".join(u.text for u in self.updates if isinstance(u, Progress) and u.id == number)

    def end(self, number: int) -> Ended | Refused:
        (end,) = (u for u in self.updates if isinstance(u, Ended | Refused) and u.id == number)
        return end

    def begun(self, number: int) -> Begun:
        (begun,) = (u for u in self.updates if isinstance(u, Begun) and u.id == number)
        return begun


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    assert all(sampler.closed for sampler in bench.inference.samplers)
    statistics = bench.decoder.statistics()
    assert (statistics.active, statistics.waiting) == (0, 0)


def alphabet(start: int, count: int) -> str:
    return "".join(LETTERS[number % 26] for number in range(start, start + count))


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


def test_the_same_session_waits_for_itself(bench: Bench) -> None:
    bench.submit(1, session="s")
    bench.submit(2, session="s")
    bench.submit(3, session="other")
    bench.run()
    kinds = [(type(update).__name__, update.id) for update in bench.updates]
    assert kinds.index(("Begun", 3)) < kinds.index(("Ended", 1)) < kinds.index(("Begun", 2))


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
