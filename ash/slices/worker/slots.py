"""Which sessions have their KV cache in a slot, and where it goes when another one needs the slot.

A session keeps its slot while it can: the next turn then computes only what is new. When every slot is taken,
the session that has been idle longest is saved (StateStore) and put back when it returns: about a thousand
times faster than computing its history again. What a new session shares with others, the system prompt above
all, is copied instead of computed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from ash.slices.worker.inference import KvMemory
from ash.slices.worker.sequence import TokenisedText, TokenSequence, shared_length
from ash.slices.worker.state_files import Checkpoint, SavedState
from ash.slices.worker.states import StateStore

_PREFIX_BYTES: Final = 64 * 1024 * 1024
"""For the KV state of system prompts; a thousand tokens take 7 MB with Gemma 3 270M, 23 with SmolLM2 135M."""

_WORTH_COPYING: Final = 16
"""Tokens from which on it pays to copy another session's beginning: a copy takes as long as eight tokens."""


class Resident(Struct, eq=False):
    """A session in a slot; `busy` while a generation uses it.

    `forgotten` sessions leave no trace once they are idle. `saved` is the number of cached tokens when the
    state was last saved, `checkpoint` where it can go back to although its sliding windows have moved on.
    """

    session: str
    slot: int
    sequence: TokenSequence
    busy: bool = True
    forgotten: bool = False
    saved: int = 0
    checkpoint: Checkpoint | None = None


class SlotTable:
    """Gives sessions slots and reuses what these hold.

    Args:
        memory: the KV cache.
        states: takes the sessions that lose their slot.
        slots: how many sequences the cache has.
        context: the most tokens of a sequence.
        sliding_window: tokens that the model's sliding-window layers look back; 0 if it has none.
    """

    def __init__(
        self, memory: KvMemory, states: StateStore, *, slots: int, context: int, sliding_window: int
    ) -> None:
        self._memory = memory
        self._states = states
        self._context = context
        self._sliding_window = sliding_window
        self._free = set(range(slots))
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self._prefixes: OrderedDict[tuple[int, ...], bytearray] = OrderedDict()

    @property
    def resident_sessions(self) -> int:
        """Sessions that have a slot."""
        return len(self._residents)

    @property
    def unsaved_sessions(self) -> int:
        """Sessions in a slot whose state was not saved since it changed."""
        return sum(resident.saved != resident.sequence.cached for resident in list(self._residents.values()))

    def is_busy(self, session: str) -> bool:
        """True while a generation of `session` holds its slot."""
        resident = self._residents.get(session)
        return resident is not None and resident.busy

    def holds(self, session: str) -> bool:
        """True when `session` has a slot."""
        return session in self._residents

    def claim(self, session: str, sequence: TokenSequence | None = None) -> Resident | None:
        """Give `session` a slot, with what is left of its KV state; None when every slot is busy.

        `sequence` is what the session had when it was preempted; it is computed again where its state was
        lost.
        """
        resident = self._residents.get(session)
        if resident is not None:
            assert not resident.busy, "a session has one generation at a time"
            resident.busy = True
            return resident
        if not self._free and not self.page_out_idle():
            return None
        slot = min(self._free)
        self._free.remove(slot)
        resident = Resident(session, slot, sequence or TokenSequence())
        resident.sequence.cached = 0
        self._residents[session] = resident
        saved = self._states.take(session)
        if saved is not None and (sequence is None or saved.sequence.tokens == sequence.tokens):
            # A preempted sequence is newer than a state that was saved before it.
            resident.sequence = TokenSequence.of(saved.sequence)
            resident.saved = resident.sequence.cached
            resident.checkpoint = saved.checkpoint
            if not self._memory.restore(slot, saved.state):
                self._empty(resident)
        return resident

    def release(self, resident: Resident) -> None:
        """The generation is over; the session keeps its slot until another one needs it."""
        resident.busy = False
        self._residents.move_to_end(resident.session)
        if resident.forgotten:
            self._give_back(resident)

    def load(
        self, resident: Resident, prompt: TokenisedText, tokenise: Callable[[bytes], TokenisedText]
    ) -> int:
        """Make the sequence hold `prompt` and return how many of its tokens need no computing.

        Where the prompt goes on behind what the session had, only the new text is tokenised: history keeps
        the tokens that the model sampled. At least one token is left to compute, for its logits.
        """
        sequence = resident.sequence
        if not sequence.cached:
            self._copy_beginning(resident, prompt)
        held = sequence.cached
        if len(sequence) and sequence.is_prefix_of(prompt.text):
            sequence.extend(tokenise(sequence.text_behind(prompt.text)))
        else:
            ours, theirs = sequence.common_boundary(prompt)
            sequence.truncate(ours)
            sequence.extend(prompt.behind(theirs))
        if len(sequence) > self._context:
            # Text in parts can take a few tokens more than text in one piece, and only the latter was
            # promised to fit.
            sequence.clear()
            sequence.extend(prompt)
        if sequence.pending == 0:
            sequence.cached -= 1
        if sequence.cached < held:
            self.cut(resident)
        self._set_checkpoint(resident)
        return sequence.cached

    def cut(self, resident: Resident) -> None:
        """Remove from the cache what lies behind the `cached` tokens of the sequence."""
        sequence = resident.sequence
        if resident.checkpoint is not None and resident.checkpoint.length > sequence.cached:
            # Its windows are those of tokens that are cut now.
            resident.checkpoint = None
        resident.saved = min(resident.saved, sequence.cached)
        first = self._memory.first_position(resident.slot)
        # As llama-server checks: every sliding-window layer must still hold the window before the cut.
        if first <= max(0, sequence.cached - self._sliding_window):
            if not self._memory.remove(resident.slot, sequence.cached):
                self._empty(resident)
            return
        checkpoint = resident.checkpoint
        if (
            checkpoint is None
            or not self._memory.restore_windows(resident.slot, checkpoint.windows)
            or not self._memory.remove(resident.slot, checkpoint.length)
        ):
            self._empty(resident)
            return
        sequence.cached = checkpoint.length
        resident.saved = min(resident.saved, sequence.cached)

    def has_prefix(self, tokens: tuple[int, ...]) -> bool:
        """True when the KV state of these first tokens is kept."""
        return tokens in self._prefixes

    def save_prefix(self, resident: Resident, tokens: tuple[int, ...]) -> None:
        """Keep the KV state of `tokens`, which are just what the slot holds, for other sessions."""
        self._prefixes[tokens] = self._memory.save(resident.slot)
        while sum(map(len, self._prefixes.values())) > _PREFIX_BYTES:
            self._prefixes.popitem(last=False)

    def save_one_idle(self, *, wait: bool = False) -> bool:
        """Save the state of a session that is idle and has changed; False when nothing is left to save.

        The session keeps its slot; its state outlives this process.
        """
        for resident in self._residents.values():
            if resident.busy or resident.saved == resident.sequence.cached:
                continue
            if not self._states.accepts(self._memory.state_bytes(resident.slot), wait=wait):
                continue
            self._states.put(resident.session, self._saved(resident), keep=False)
            resident.saved = resident.sequence.cached
            return True
        return False

    def page_out_idle(self) -> bool:
        """Take the slot of the session that has been idle longest; False when all are busy."""
        idle = next((resident for resident in self._residents.values() if not resident.busy), None)
        if idle is None:
            return False
        self.page_out(idle)
        return True

    def page_out(self, resident: Resident) -> None:
        """Save a session's state and free its slot."""
        if resident.sequence.cached and not resident.forgotten:
            is_saved = resident.saved == resident.sequence.cached
            self._states.put(resident.session, self._saved(resident), keep=True, is_saved=is_saved)
        self._give_back(resident)

    def forget(self, session: str) -> None:
        """Remove every trace of an idle session; what a generation still holds goes when that ends."""
        resident = self._residents.get(session)
        if resident is not None and resident.busy:
            resident.forgotten = True
        elif resident is not None:
            self._give_back(resident)
        self._states.forget(session)

    def move(self, source: int, target: int) -> None:
        """Bring the session in slot `source` to `target`; an idle one that is there goes the other way."""
        coming = self._in_slot(source)
        assert coming is not None, "an empty slot has nothing to move"
        going = self._in_slot(target)
        state = self._lift(coming)
        if going is None:
            self._free.remove(target)
            self._free.add(source)
        else:
            other = self._lift(going)
            self._put_down(going, source, other)
        self._put_down(coming, target, state)

    def _saved(self, resident: Resident) -> SavedState:
        state = self._memory.save(resident.slot)
        return SavedState(resident.sequence.record(), state, resident.checkpoint)

    def _set_checkpoint(self, resident: Resident) -> None:
        """Remember where the turn begins: one that is retried or edited comes back to it.

        Only models with sliding windows need it: llama.cpp cuts everything else anywhere.
        """
        length = resident.sequence.cached
        if (
            self._sliding_window
            and length
            and (resident.checkpoint is None or resident.checkpoint.length != length)
        ):
            resident.checkpoint = Checkpoint(length, self._memory.save_windows(resident.slot))

    def _in_slot(self, slot: int) -> Resident | None:
        return next((resident for resident in self._residents.values() if resident.slot == slot), None)

    def _lift(self, resident: Resident) -> bytearray | None:
        if not resident.sequence.cached:
            return None
        state = self._memory.save(resident.slot)
        self._memory.remove(resident.slot, 0)
        return state

    def _put_down(self, resident: Resident, slot: int, state: bytearray | None) -> None:
        resident.slot = slot
        if state is not None and not self._memory.restore(slot, state):
            self._empty(resident)

    def _copy_beginning(self, resident: Resident, prompt: TokenisedText) -> None:
        """Fill an empty slot with what a kept prefix or another session has of the same tokens already."""
        sequence = resident.sequence
        if not len(sequence):
            sequence.extend(prompt)
        wanted = sequence.tokens
        kept = max(
            (prefix for prefix in self._prefixes if tuple(wanted[: len(prefix)]) == prefix),
            key=len,
            default=(),
        )
        donors = [
            (shared_length(other.sequence.cached_tokens, wanted), other) for other in self._residents.values()
        ]
        shared, donor = max(donors, key=lambda entry: entry[0])
        if shared >= len(kept) + _WORTH_COPYING:
            state = self._memory.save(donor.slot)
            if self._copy(resident, state, length=donor.sequence.cached, shared=shared):
                return
        if kept:
            self._prefixes.move_to_end(kept)
            self._copy(resident, self._prefixes[kept], length=len(kept), shared=len(kept))

    def _copy(self, resident: Resident, state: bytearray, *, length: int, shared: int) -> bool:
        """Put the state of `length` tokens into an empty slot and keep `shared` of them."""
        if not self._memory.restore(resident.slot, state):
            self._empty(resident)
            return False
        resident.sequence.cached = shared
        if length > shared:
            self.cut(resident)
        return resident.sequence.cached > 0

    def _give_back(self, resident: Resident) -> None:
        self._memory.remove(resident.slot, 0)
        del self._residents[resident.session]
        self._free.add(resident.slot)

    def _empty(self, resident: Resident) -> None:
        self._memory.remove(resident.slot, 0)
        resident.sequence.cached = 0
        resident.saved = 0
        resident.checkpoint = None
