"""Which sessions have their KV cache in a slot, and where it goes when another one needs the slot.

A session keeps its slot while it can: the next turn then computes only what is new. When every slot is taken,
the session that has been idle longest is saved to RAM (least recently used first out, within a budget of
bytes) and put back when it returns: about a thousand times faster than computing its history again.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable

from msgspec import Struct

from ash.slices.worker.inference import KvMemory
from ash.slices.worker.sequence import TokenisedText, TokenSequence


class Resident(Struct, eq=False):
    """A session in a slot; `busy` while a generation uses it."""

    session: str
    slot: int
    sequence: TokenSequence
    busy: bool = True


class _Paged(Struct, frozen=True):
    sequence: TokenSequence
    state: bytearray


class SlotTable:
    """Gives sessions slots and reuses what these hold.

    Args:
        memory: the KV cache.
        slots: how many sequences it has.
        context: the most tokens of a sequence.
        sliding_window: tokens that the model's sliding-window layers look back; 0 if it has none.
        paged_bytes: budget for saved states.
    """

    def __init__(
        self, memory: KvMemory, *, slots: int, context: int, sliding_window: int, paged_bytes: int
    ) -> None:
        self._memory = memory
        self._context = context
        self._sliding_window = sliding_window
        self._paged_limit = paged_bytes
        # The lowest free slot first: llama.cpp computes neighbouring sequences together.
        self._free = list(range(slots))
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self._paged: OrderedDict[str, _Paged] = OrderedDict()
        self.paged_bytes = 0

    @property
    def resident_sessions(self) -> int:
        """Sessions that have a slot."""
        return len(self._residents)

    @property
    def paged_sessions(self) -> int:
        """Sessions whose state is saved in RAM."""
        return len(self._paged)

    def is_busy(self, session: str) -> bool:
        """True while a generation of `session` holds its slot."""
        resident = self._residents.get(session)
        return resident is not None and resident.busy

    def claim(self, session: str, sequence: TokenSequence | None = None) -> Resident | None:
        """Give `session` a slot, with what the cache still has of it; None when every slot is busy.

        `sequence` is what the session had when it was preempted; it is computed again where the cache has
        lost it.
        """
        resident = self._residents.get(session)
        if resident is not None:
            assert not resident.busy, "a session has one generation at a time"
            resident.busy = True
            return resident
        if not self._free and not self.page_out_idle():
            return None
        slot = heapq.heappop(self._free)
        resident = Resident(session, slot, sequence or TokenSequence())
        self._residents[session] = resident
        paged = self._paged.pop(session, None)
        if paged is not None:
            self.paged_bytes -= len(paged.state)
            resident.sequence = paged.sequence
            if not self._memory.restore(slot, paged.state):
                self._empty(resident)
        return resident

    def release(self, resident: Resident) -> None:
        """The generation is over; the session keeps its slot until another one needs it."""
        resident.busy = False
        self._residents.move_to_end(resident.session)

    def load(
        self, resident: Resident, prompt: TokenisedText, tokenise: Callable[[bytes], TokenisedText]
    ) -> int:
        """Make the sequence hold `prompt` and return how many of its tokens need no computing.

        Where the prompt goes on behind what the session had, only the new text is tokenised: history keeps
        the tokens that the model sampled. At least one token is left to compute, for its logits.
        """
        sequence = resident.sequence
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
        return sequence.cached

    def cut(self, resident: Resident) -> None:
        """Remove from the cache what lies behind the `cached` tokens of the sequence."""
        sequence = resident.sequence
        first = self._memory.first_position(resident.slot)
        # As llama-server checks: every sliding-window layer must still hold the window before the cut.
        window_is_held = first <= max(0, sequence.cached - self._sliding_window)
        if not window_is_held or not self._memory.remove(resident.slot, sequence.cached):
            self._empty(resident)

    def page_out_idle(self) -> bool:
        """Take the slot of the session that has been idle longest; False when all are busy."""
        idle = next((resident for resident in self._residents.values() if not resident.busy), None)
        if idle is None:
            return False
        self.page_out(idle)
        return True

    def page_out(self, resident: Resident) -> None:
        """Save a session's state, if the budget allows, and free its slot."""
        size = self._memory.state_bytes(resident.slot)
        if resident.sequence.cached and size <= self._paged_limit:
            state = self._memory.save(resident.slot)
            self._paged[resident.session] = _Paged(resident.sequence, state)
            self.paged_bytes += len(state)
            self._memory.remove(resident.slot, 0)
            while self.paged_bytes > self._paged_limit:
                _, oldest = self._paged.popitem(last=False)
                self.paged_bytes -= len(oldest.state)
                oldest.sequence.cached = 0
        else:
            self._empty(resident)
        del self._residents[resident.session]
        heapq.heappush(self._free, resident.slot)

    def _empty(self, resident: Resident) -> None:
        self._memory.remove(resident.slot, 0)
        resident.sequence.cached = 0
