"""A decode loop on a model of our own: every path that llama.cpp seldom takes, without a model file.

The fake model says the alphabet: after a prompt of n tokens it continues with tokens n, n + 1, ... of a
vocabulary of single letters, so every answer can be foreseen and shows whether the cache was kept right.
"""

import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ash.domain.values import Sampling
from ash.slices.worker.decoder import Decoder
from ash.slices.worker.generation import Generation, Prompt
from ash.slices.worker.inference import BatchEntry, Constraint, Sampler
from ash.slices.worker.messages import (
    Begun,
    Ended,
    Progress,
    Refused,
    Step,
    Update,
)
from ash.slices.worker.pace import Pace
from ash.slices.worker.schedule import Allowance
from ash.slices.worker.slots import SlotTable
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


@contextmanager
def tidy_bench() -> Iterator[Bench]:
    """A Bench that has freed every sampler and holds no generation when the block ends."""
    bench = Bench()
    yield bench
    assert all(sampler.closed for sampler in bench.inference.samplers)
    statistics = bench.decoder.statistics()
    assert (statistics.active, statistics.waiting) == (0, 0)


def alphabet(start: int, count: int) -> str:
    return "".join(LETTERS[number % 26] for number in range(start, start + count))
