"""The policy of residency under random traces, on a simulated clock."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from itertools import groupby, pairwise

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct

from ash.slices.residency import Arrival, Phase, Residency, ResidencyLimits, Resident


class Ask(Struct, frozen=True):
    """A run that comes `gap` seconds after the one before and keeps the slice busy for `lasts`."""

    gap: float
    slice: str
    lasts: float


class Simulation:
    """Slices that load, answer and are evicted in simulated time; checks every rule at every moment."""

    def __init__(
        self,
        limits: ResidencyLimits,
        slices: Sequence[Resident],
        *,
        load_s: float = 1.0,
        evict_s: float = 0.2,
        growth: float = 1.0,
    ) -> None:
        self.limits = limits
        self.budget = limits.budget_bytes or 0
        self.slices = list(slices)
        self.residency = Residency(limits, self.slices)
        self.load_s, self.evict_s, self.growth = load_s, evict_s, growth
        self.now = 0.0
        self.events: list[tuple[float, int, str, str, Arrival | None]] = []
        self.order = itertools.count()
        self.lasts: dict[Arrival, float] = {}
        self.admitted: list[tuple[str, Arrival, float]] = []
        self.waits: dict[Arrival, float] = {}
        self.refused: list[Arrival] = []
        self.loads: list[str] = []
        self.evictions: list[str] = []
        self.in_memory: dict[str, int] = {}
        self.running: dict[str, int] = {each.name: 0 for each in self.slices}

    def at(self, time: float, what: str, name: str = "", arrival: Arrival | None = None) -> None:
        heapq.heappush(self.events, (time, next(self.order), what, name, arrival))

    def run(self, asks: Sequence[Ask]) -> None:
        time = 0.0
        for number, ask in enumerate(asks, 1):
            time += ask.gap
            arrival = Arrival(number, time)
            self.lasts[arrival] = ask.lasts
            self.at(time, "ask", ask.slice, arrival)
        while self.events:
            self.now, _, what, name, arrival = heapq.heappop(self.events)
            self.happen(what, name, arrival)
            self.act()

    def happen(self, what: str, name: str, arrival: Arrival | None) -> None:
        match what:
            case "ask":
                assert arrival is not None
                self.residency.request(name, arrival)
            case "done":
                assert arrival is not None
                self.running[name] -= 1
                self.residency.leave(name, arrival, self.now)
                measured = int(self.residency[name].bytes * self.growth)
                self.residency.measured(name, measured)
                self.in_memory[name] = self.residency[name].bytes
            case "loaded":
                self.residency.loaded(name, self.now)
            case "evicted":
                self.residency.unloaded(name)
                del self.in_memory[name]

    def act(self) -> None:
        actions = self.residency.step(self.now)
        for admission in actions.admit:
            assert admission.slice in self.in_memory
            self.running[admission.slice] += 1
            self.admitted.append((admission.slice, admission.arrival, self.now))
            self.waits[admission.arrival] = self.now - admission.arrival.since
            self.at(self.now + self.lasts[admission.arrival], "done", admission.slice, admission.arrival)
        for eviction in actions.evict:
            state = self.residency[eviction.slice]
            assert self.running[eviction.slice] == 0, "a slice with a running generation was evicted"
            assert not state.pinned, "a pinned slice was evicted"
            assert not state.is_used or self.now >= state.loaded_at + self.limits.min_resident_s
            self.evictions.append(eviction.slice)
            self.at(self.now + self.evict_s, "evicted", eviction.slice)
        for name in actions.load:
            assert name not in self.in_memory
            self.in_memory[name] = self.residency[name].bytes
            self.loads.append(name)
            self.at(self.now + self.load_s, "loaded", name)
            assert sum(self.in_memory.values()) <= self.budget, "a load was begun over the budget"
        self.refused += [refusal.arrival for refusal in actions.refuse]
        assert sum(self.in_memory.values()) == self.residency.committed_bytes
        if actions.wake_at is not None:
            assert actions.wake_at > self.now
            self.at(actions.wake_at, "wake")


NAMES = ("a", "b", "c", "d")
seconds = st.floats(0, 20).map(lambda value: round(value, 1))
asks = st.lists(st.builds(Ask, gap=seconds, slice=st.sampled_from(NAMES), lasts=seconds), max_size=40)
busy_asks = st.lists(
    st.builds(Ask, gap=st.sampled_from([0.0, 0.1, 0.5]), slice=st.sampled_from(NAMES), lasts=seconds),
    max_size=60,
)
limits = st.builds(
    ResidencyLimits,
    budget_bytes=st.just(100),
    min_resident_s=st.sampled_from([0.0, 1.0, 5.0, 30.0]),
    patience_s=st.sampled_from([0.0, 1.0, 10.0, 60.0]),
)


endless_asks = st.lists(
    st.builds(Ask, gap=st.sampled_from([0.1, 0.5]), slice=st.sampled_from("aaab"), lasts=st.just(1.0)),
    min_size=60,
    max_size=60,
)
impatient = st.builds(
    ResidencyLimits,
    budget_bytes=st.just(100),
    min_resident_s=st.sampled_from([0.0, 1.0, 5.0]),
    patience_s=st.sampled_from([0.0, 1.0, 10.0]),
)


@st.composite
def slices(draw: st.DrawFn, *, largest: int = 100, least: int = 1, pins: bool = True) -> list[Resident]:
    return [
        Resident(
            name,
            bytes=draw(st.integers(least, largest)),
            slots=draw(st.integers(1, 4)),
            pinned=pins and draw(st.booleans()),
        )
        for name in NAMES
    ]


@given(limits, slices(), st.one_of(asks, busy_asks))
def test_everybody_is_served_or_refused_and_the_budget_holds(
    limits: ResidencyLimits, slices: list[Resident], trace: list[Ask]
) -> None:
    simulation = Simulation(limits, slices)
    simulation.run(trace)
    assert len(simulation.waits) + len(simulation.refused) == len(trace)
    assert set(simulation.waits).isdisjoint(simulation.refused)
    assert all(state.running == 0 and not state.waiting for state in slices)
    pinned = sum(state.bytes for state in slices if state.pinned)
    assert not simulation.refused or pinned > 0, "what fits the whole budget is refused for pinned ones only"


@given(impatient, slices(pins=False), st.one_of(asks, busy_asks, endless_asks))
def test_no_slice_starves(limits: ResidencyLimits, slices: list[Resident], trace: list[Ask]) -> None:
    """However many runs come: a slice that is waited for is served again once every other had its turn."""
    simulation = Simulation(limits, slices)
    simulation.run(trace)
    longest = max((ask.lasts for ask in trace), default=0.0)
    turn = max(limits.patience_s, limits.min_resident_s) + longest + simulation.load_s + simulation.evict_s
    names = {ask.slice for ask in trace}
    for name in names:
        served = [(arrival, time) for slice_name, arrival, time in simulation.admitted if slice_name == name]
        assert served == sorted(served), "runs of one slice are admitted in the order of their arrival"
        for (_, before), (arrival, time) in pairwise([(Arrival(0, 0.0), 0.0), *served]):
            assert time - max(before, arrival.since) <= (len(names) + 1) * turn


def test_a_busy_slice_gives_way_after_its_patience() -> None:
    """Slice a is asked for without end; the bound above, for the case that is sure to break without it."""
    trace = [Ask(0.2, "a", 1.0) for _ in range(300)]
    trace.insert(10, Ask(0.0, "b", 1.0))
    simulation = Simulation(ResidencyLimits(100), [Resident("a", 60, slots=8), Resident("b", 60)])
    simulation.run(trace)
    (wait,) = [wait for arrival, wait in simulation.waits.items() if arrival.number == 11]
    assert 10.0 <= wait <= 10.0 + 1.0 + simulation.evict_s + simulation.load_s + 0.01
    assert simulation.loads == ["a", "b", "a"]


def test_a_turn_ends_with_one_set_of_slots() -> None:
    """While b waits, a lets in who came later only as slots are free: its turn ends with two long answers."""
    trace = [Ask(0.0, "a", 1.0), Ask(0.0, "b", 1.0), *(Ask(0.0, "a", 30.0) for _ in range(20))]
    simulation = Simulation(ResidencyLimits(100), [Resident("a", 60, slots=2), Resident("b", 60, slots=2)])
    simulation.run(trace)
    assert list(simulation.waits)[:4] == [Arrival(number, 0.0) for number in (1, 3, 4, 2)]


@given(limits, slices(least=51, pins=False), st.one_of(asks, busy_asks))
def test_one_at_a_time_loads_never_more_often_than_first_come_first_served(
    limits: ResidencyLimits, slices: list[Resident], trace: list[Ask]
) -> None:
    simulation = Simulation(limits, slices)
    simulation.run(trace)
    in_order_of_arrival = len(list(groupby(trace, key=lambda ask: ask.slice)))
    assert len(simulation.loads) <= in_order_of_arrival


@given(slices(least=51, pins=False), busy_asks)
def test_without_patience_it_is_first_come_first_served(slices: list[Resident], trace: list[Ask]) -> None:
    """The naive policy of the benchmark."""
    simulation = Simulation(ResidencyLimits(100, min_resident_s=0.0, patience_s=0.0), slices)
    simulation.run(trace)
    admitted = list(simulation.waits)
    assert admitted == sorted(admitted)


def test_alternating_runs_are_collated() -> None:
    """A B A B every 0.5 s: a load for each where they come first served, one for each turn where collated."""
    trace = [Ask(0.5, "ab"[number % 2], 1.0) for number in range(60)]

    def loads(limits: ResidencyLimits) -> int:
        simulation = Simulation(limits, [Resident("a", 60, slots=8), Resident("b", 60, slots=8)])
        simulation.run(trace)
        return len(simulation.loads)

    assert loads(ResidencyLimits(100, min_resident_s=0.0, patience_s=0.0)) == 60
    assert loads(ResidencyLimits(100, min_resident_s=5.0, patience_s=10.0)) <= 4


@given(limits, slices(), st.one_of(asks, busy_asks), st.floats(0.5, 2.0))
def test_slices_that_grow_are_brought_back_to_the_budget(
    limits: ResidencyLimits, slices: list[Resident], trace: list[Ask], growth: float
) -> None:
    """Measured sizes may exceed the budget; then nothing is loaded, and idle slices go until it holds."""
    simulation = Simulation(limits, slices, growth=growth)
    simulation.run(trace)
    assert len(simulation.waits) + len(simulation.refused) == len(trace)
    over = simulation.residency.committed_bytes > 100
    left = [state for state in slices if state.phase is not Phase.OUT]
    assert not over or all(state.pinned for state in left)


@settings(max_examples=300)
@given(st.data(), limits)
def test_any_order_of_events_keeps_the_rules(data: st.DataObject, limits: ResidencyLimits) -> None:
    """Crashes, runs that give up, and a clock that jumps."""
    states = [Resident(name, bytes=30 + 20 * index, slots=2) for index, name in enumerate(NAMES)]
    residency = Residency(limits, states)
    now, numbers = 0.0, itertools.count(1)
    inside: list[tuple[str, Arrival]] = []
    waiting: list[tuple[str, Arrival]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        now += data.draw(st.sampled_from([0.0, 0.5, 7.0]))
        what = data.draw(st.sampled_from(["ask", "leave", "give up", "crash", "loaded", "failed", "evicted"]))
        state = data.draw(st.sampled_from(states))
        match what:
            case "ask":
                arrival = Arrival(next(numbers), now)
                residency.request(state.name, arrival)
                waiting.append((state.name, arrival))
            case "leave" if inside:
                residency.leave(*inside.pop(data.draw(st.integers(0, len(inside) - 1))), now)
            case "give up" if waiting:
                residency.leave(*waiting.pop(data.draw(st.integers(0, len(waiting) - 1))), now)
            case "crash" if state.phase is Phase.READY:
                residency.unloaded(state.name)
            case "loaded" if state.phase is Phase.LOADING:
                residency.loaded(state.name, now)
            case "failed" if state.phase is Phase.LOADING:
                residency.unloaded(state.name)
                failed = {(state.name, arrival) for arrival in residency.fail_waiting(state.name)}
                waiting = [each for each in waiting if each not in failed]
            case "evicted" if state.phase is Phase.EVICTING:
                residency.unloaded(state.name)
        actions = residency.step(now)
        entered = [(each.slice, each.arrival) for each in actions.admit]
        inside += entered
        waiting = [each for each in waiting if each not in entered]
        assert not actions.refuse
        for eviction in actions.evict:
            assert all(name != eviction.slice for name, _ in inside)
        if actions.load:
            assert residency.committed_bytes <= 100
        assert {(each.name, arrival) for each in states for arrival in each.waiting} == set(waiting)
        assert sum(each.running for each in states) == len(inside)


def test_a_second_step_has_nothing_left_to_do() -> None:
    residency = Residency(ResidencyLimits(100), [Resident("a", 60), Resident("b", 60)])
    residency.request("a", Arrival(1, 0.0))
    residency.request("b", Arrival(2, 0.0))
    first = residency.step(0.0)
    assert first.load == ("a",)
    second = residency.step(0.0)
    assert msgspec.structs.replace(second, wake_at=None) == type(second)()
