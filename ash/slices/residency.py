"""Which slices are in memory: the policy of residency, without clock or process; `admission` carries it out.

Runs ask for a slice and are admitted once it is in memory. Slices that do not fit together take turns:

- A slice that does not fit waits for room. Meanwhile its requests accumulate, and those in memory go on.
- Room is made by slices that are idle, least recently used first; never by one with running generations,
  never by a pinned one, and not within `min_resident_s` of its load unless nobody has used it.
- When the victims stay busy, they keep their turn for `patience_s`; then they admit nobody who came after the
  oldest request that waits for room, finish what runs, and are evicted.
- Until then a victim lets in who came later only while it has a free slot, so that its turn ends with the
  answers of one set of slots and not with a queue.

With room for one slice at a time this never loads more often than first come, first served: every load is
caused by a request that came after the one that caused the load before, and that wants another slice.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from enum import StrEnum

import msgspec
from msgspec import Struct


class ResidencyLimits(Struct, frozen=True):
    """What may be in memory and for how long.

    Attributes:
        budget_bytes: for weights, KV and compute buffers of all local slices together; None is no limit.
        min_resident_s: a slice that was used stays at least so long after its load.
        patience_s: a busy slice keeps its turn for so long against one that waits for room.
    """

    budget_bytes: int | None = None
    min_resident_s: float = 5.0
    patience_s: float = 10.0


class Arrival(Struct, frozen=True, order=True):
    """When a run came: `number` orders all runs, `since` is seconds on the caller's clock."""

    number: int
    since: float


class Phase(StrEnum):
    """Where a slice is. Its bytes count from the start of the load to the end of the eviction."""

    OUT = "out"
    LOADING = "loading"
    READY = "ready"
    EVICTING = "evicting"


class Resident(Struct):
    """What the policy knows of a slice.

    Attributes:
        name: of the slice.
        bytes: what it takes: an estimate, or the most that was measured since its load; 0 for one that takes
            no room, which is never evicted.
        slots: generations that run at the same time.
        pinned: never evicted once loaded.
        phase: where it is.
        loaded_at: end of the load, in seconds.
        used_at: last admission or end of a generation, in seconds.
        is_used: somebody was admitted since the load.
        is_measured: `bytes` was measured since the load.
        running: runs that were admitted and have not left.
        waiting: runs that were not admitted yet, first come first.
    """

    name: str
    bytes: int = 0
    slots: int = 1
    pinned: bool = False
    phase: Phase = Phase.OUT
    loaded_at: float = 0.0
    used_at: float = 0.0
    is_used: bool = False
    is_measured: bool = False
    running: int = 0
    waiting: list[Arrival] = msgspec.field(default_factory=list)


class Admission(Struct, frozen=True):
    """This run may use the slice now."""

    slice: str
    arrival: Arrival


class Eviction(Struct, frozen=True):
    """Free a slice to make room for another one; None: the budget is exceeded."""

    slice: str
    room_for: str | None


class Refusal(Struct, frozen=True):
    """This run cannot be served: even with everything evicted that can be, the slice does not fit."""

    slice: str
    arrival: Arrival
    needed_bytes: int
    available_bytes: int


class Actions(Struct, frozen=True):
    """What to do now. Already counted as done or begun; `wake_at` is when time alone changes the answer."""

    admit: tuple[Admission, ...] = ()
    refuse: tuple[Refusal, ...] = ()
    evict: tuple[Eviction, ...] = ()
    load: tuple[str, ...] = ()
    wake_at: float | None = None


class _Contest(Struct, frozen=True):
    """The slice that waits for room, and those that have to go for it."""

    waits: Resident
    victims: tuple[Resident, ...]
    turn_ends_at: float


class Residency:
    """The state of all slices and the decisions over it. Tell it what happens, then ask for a `step`.

    Args:
        limits: budget and times.
        slices: in the order of the catalogue, all of them out of memory.
    """

    def __init__(self, limits: ResidencyLimits, slices: Iterable[Resident]) -> None:
        self._limits = limits
        self._slices = {each.name: each for each in slices}

    def __getitem__(self, name: str) -> Resident:
        """The state of a slice."""
        return self._slices[name]

    @property
    def committed_bytes(self) -> int:
        """Bytes of everything in memory, on its way in or on its way out."""
        return sum(each.bytes for each in self._slices.values() if each.phase is not Phase.OUT)

    def request(self, name: str, arrival: Arrival) -> None:
        """A run wants the slice. One that comes again (after a crash) keeps its place by its arrival."""
        insort(self._slices[name].waiting, arrival)

    def leave(self, name: str, arrival: Arrival, now: float) -> None:
        """A run no longer waits for the slice, or no longer uses it."""
        state = self._slices[name]
        if arrival in state.waiting:
            state.waiting.remove(arrival)
            return
        assert state.running > 0, f"slice {name} is left by a run that it did not admit"
        state.running -= 1
        state.used_at = now

    def fail_waiting(self, name: str) -> list[Arrival]:
        """Take everybody out who waits for the slice; returns them. They must not `leave` any more."""
        state = self._slices[name]
        waiting, state.waiting = state.waiting, []
        return waiting

    def expect(self, name: str, expected_bytes: int) -> None:
        """What the slice will take; while it is in memory, only if nothing is known of it."""
        state = self._slices[name]
        if state.phase is Phase.OUT or state.bytes == 0:
            state.bytes = expected_bytes

    def measured(self, name: str, measured_bytes: int) -> None:
        """What the slice takes now. The most since the load counts: it may need as much again."""
        state = self._slices[name]
        if state.phase is Phase.READY:
            state.bytes = max(state.bytes, measured_bytes) if state.is_measured else measured_bytes
            state.is_measured = True

    def loaded(self, name: str, now: float) -> None:
        """The slice is in memory."""
        state = self._slices[name]
        state.phase = Phase.READY
        state.loaded_at = state.used_at = now
        state.is_used = state.is_measured = False

    def unloaded(self, name: str) -> None:
        """The slice is out of memory: evicted, crashed, or its load failed."""
        self._slices[name].phase = Phase.OUT

    def step(self, now: float) -> Actions:
        """Everything that is to be done at `now`; the caller has done it, or begun it, when it asks again."""
        refusals = self._refuse_what_never_fits()
        queue = sorted(
            (each for each in self._slices.values() if each.phase is Phase.OUT and each.waiting),
            # What takes no room has to wait for none.
            key=lambda each: (each.bytes > 0, each.waiting[0]),
        )
        loads: list[str] = []
        while queue and self._fits(queue[0]):
            loads.append(self._begin_load(queue.pop(0)))
        contest = self._contest(queue[0], now) if queue else None
        admissions = self._admit(contest, now)
        evictions: list[Eviction] = []
        if contest is not None and all(self._is_evictable(each, now) for each in contest.victims):
            for victim in contest.victims:
                victim.phase = Phase.EVICTING
                evictions.append(Eviction(victim.name, contest.waits.name))
        elif queue and now < queue[0].waiting[0].since + self._limits.patience_s and not self._is_evicting():
            # Smaller ones may overtake for a while, yet never take the room that is made for the first.
            loads += [self._begin_load(each) for each in queue[1:] if self._fits(each)]
        evictions += self._shrink_to_budget(now)
        return Actions(admissions, refusals, tuple(evictions), tuple(loads), self._wake_at(contest, now))

    def _refuse_what_never_fits(self) -> tuple[Refusal, ...]:
        budget = self._limits.budget_bytes
        if budget is None:
            return ()
        kept = sum(
            each.bytes for each in self._slices.values() if each.pinned and each.phase is not Phase.OUT
        )
        available = max(0, budget - kept)
        return tuple(
            Refusal(each.name, arrival, each.bytes, available)
            for each in self._slices.values()
            if each.phase is Phase.OUT and each.bytes > available
            for arrival in self.fail_waiting(each.name)
        )

    def _fits(self, state: Resident) -> bool:
        budget = self._limits.budget_bytes
        return budget is None or state.bytes == 0 or self.committed_bytes + state.bytes <= budget

    def _begin_load(self, state: Resident) -> str:
        state.phase = Phase.LOADING
        return state.name

    def _is_evicting(self) -> bool:
        return any(each.phase is Phase.EVICTING for each in self._slices.values())

    def _is_evictable(self, state: Resident, now: float) -> bool:
        """Idle, not pinned, and long enough in memory; a slice that nobody used has no such time."""
        return (
            state.phase is Phase.READY
            and not state.pinned
            and state.running == 0
            and (not state.is_used or now >= state.loaded_at + self._limits.min_resident_s)
        )

    def _contest(self, waits: Resident, now: float) -> _Contest | None:
        """Who has to go for `waits`; None while room is made already, or has to become ready first."""
        budget = self._limits.budget_bytes
        assert budget is not None
        leaving = sum(each.bytes for each in self._slices.values() if each.phase is Phase.EVICTING)
        missing = waits.bytes - (budget - self.committed_bytes) - leaving
        candidates = sorted(
            (
                each
                for each in self._slices.values()
                if each.phase is Phase.READY and not each.pinned and each.bytes
            ),
            key=lambda each: (not self._is_evictable(each, now), each.running > 0, each.used_at),
        )
        if missing <= 0 or sum(each.bytes for each in candidates) < missing:
            return None
        victims: list[Resident] = []
        for candidate in candidates:
            if missing <= 0:
                break
            victims.append(candidate)
            missing -= candidate.bytes
        for victim in reversed(victims[:-1]):
            # A large one that was added later may make smaller ones needless.
            if missing + victim.bytes <= 0:
                victims.remove(victim)
                missing += victim.bytes
        turn_ends_at = max(
            max(
                max(waits.waiting[0].since, each.loaded_at) + self._limits.patience_s,
                each.loaded_at + self._limits.min_resident_s,
            )
            for each in victims
        )
        return _Contest(waits, tuple(victims), turn_ends_at)

    def _admit(self, contest: _Contest | None, now: float) -> tuple[Admission, ...]:
        admitted: list[Admission] = []
        for state in self._slices.values():
            if state.phase is not Phase.READY:
                continue
            while state.waiting and self._may_enter(state, contest, now):
                admitted.append(Admission(state.name, state.waiting.pop(0)))
                state.running += 1
                state.used_at = now
                state.is_used = True
        return tuple(admitted)

    def _may_enter(self, state: Resident, contest: _Contest | None, now: float) -> bool:
        """Whether the first that waits for `state` is admitted."""
        if contest is None or all(each is not state for each in contest.victims):
            return True
        if state.waiting[0] < contest.waits.waiting[0]:
            return True
        return now < contest.turn_ends_at and state.running < state.slots

    def _shrink_to_budget(self, now: float) -> Sequence[Eviction]:
        """Evict idle slices when what is in memory has grown over the budget."""
        budget = self._limits.budget_bytes
        if budget is None:
            return ()
        leaving = sum(each.bytes for each in self._slices.values() if each.phase is Phase.EVICTING)
        excess = self.committed_bytes - leaving - budget
        evictions = []
        for state in sorted(self._slices.values(), key=lambda each: each.used_at):
            if excess > 0 and state.bytes and not state.waiting and self._is_evictable(state, now):
                state.phase = Phase.EVICTING
                excess -= state.bytes
                evictions.append(Eviction(state.name, None))
        return evictions

    def _wake_at(self, contest: _Contest | None, now: float) -> float | None:
        budget = self._limits.budget_bytes
        if budget is None:
            return None
        times = [contest.turn_ends_at] if contest is not None else []
        if contest is not None or self.committed_bytes > budget:
            times += [
                each.loaded_at + self._limits.min_resident_s
                for each in self._slices.values()
                if each.phase is Phase.READY and not each.pinned and each.running == 0
            ]
        return min((time for time in times if time > now), default=None)
