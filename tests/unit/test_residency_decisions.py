"""The policy of residency, case by case; random traces are in tests/property."""

from __future__ import annotations

import pytest

from ash.slices.residency import (
    Actions,
    Admission,
    Arrival,
    Eviction,
    Phase,
    Refusal,
    Residency,
    ResidencyLimits,
    Resident,
)


class World:
    """A residency over slices of the given sizes, driven step by step; loads and evictions end at once."""

    def __init__(
        self,
        sizes: dict[str, int],
        *,
        pinned: str = "",
        budget_bytes: int | None = 100,
        min_resident_s: float = 5.0,
        patience_s: float = 10.0,
    ) -> None:
        self.residency = Residency(
            ResidencyLimits(budget_bytes, min_resident_s, patience_s),
            [Resident(name, size, slots=2, pinned=name in pinned) for name, size in sizes.items()],
        )
        self.arrivals = 0

    def ask(self, name: str, now: float = 0.0) -> Arrival:
        self.arrivals += 1
        arrival = Arrival(self.arrivals, now)
        self.residency.request(name, arrival)
        return arrival

    def use(self, *names: str, now: float = 0.0) -> None:
        """Load each and run something short on it."""
        for name in names:
            arrival = self.ask(name, now)
            assert self.residency.step(now).load == (name,)
            self.residency.loaded(name, now)
            assert self.residency.step(now).admit == (Admission(name, arrival),)
            self.residency.leave(name, arrival, now)


def test_a_load_begins_at_once_where_there_is_room() -> None:
    world = World({"a": 60, "b": 40})
    world.ask("a")
    world.ask("b")
    assert world.residency.step(0.0) == Actions(load=("a", "b"))
    assert world.residency.committed_bytes == 100


def test_without_a_budget_everything_fits() -> None:
    world = World({"a": 60, "b": 1 << 40}, budget_bytes=None)
    world.use("a", "b")
    assert world.residency.step(100.0) == Actions()


def test_the_idle_one_that_was_used_longest_ago_goes() -> None:
    world = World({"a": 30, "b": 30, "c": 30, "d": 30})
    world.use("b", now=0.0)
    world.use("a", now=1.0)
    world.use("c", now=2.0)
    world.ask("d", 10.0)
    assert world.residency.step(10.0).evict == (Eviction("b", "d"),)
    assert world.residency.step(10.0) == Actions(), "its bytes count until it is gone, and they are enough"
    world.residency.unloaded("b")
    assert world.residency.step(10.0).load == ("d",)


def test_an_idle_one_goes_before_a_busy_one_that_was_used_longer_ago() -> None:
    world = World({"a": 50, "b": 50, "c": 50})
    world.use("a", now=0.0)
    long = world.ask("a", 0.0)
    world.residency.step(0.0)
    world.use("b", now=1.0)
    world.ask("c", 7.0)
    assert world.residency.step(7.0).evict == (Eviction("b", "c"),)
    world.residency.leave("a", long, 8.0)


def test_no_more_go_than_have_to() -> None:
    world = World({"small": 20, "large": 70, "next": 60})
    world.use("small", now=0.0)
    world.use("large", now=1.0)
    world.ask("next", 10.0)
    assert world.residency.step(10.0).evict == (Eviction("large", "next"),)


def test_none_goes_before_all_can() -> None:
    """What is idle stays useful while the busy one that has to go with it finishes."""
    world = World({"idle": 40, "busy": 60, "next": 100})
    world.use("idle")
    running = world.ask("busy")
    world.residency.step(0.0)
    world.residency.loaded("busy", 0.0)
    world.residency.step(0.0)
    world.ask("next", 6.0)
    assert world.residency.step(6.0).evict == ()
    world.residency.leave("busy", running, 7.0)
    assert {each.slice for each in world.residency.step(7.0).evict} == {"idle", "busy"}


def test_a_used_slice_stays_its_time_and_an_unused_one_does_not() -> None:
    world = World({"a": 60, "b": 60})
    world.use("a", now=0.0)
    world.ask("b", 1.0)
    assert world.residency.step(1.0) == Actions(wake_at=5.0)
    assert world.residency.step(5.0).evict == (Eviction("a", "b"),)
    unused = World({"a": 60, "b": 60})
    gave_up = unused.ask("a")
    unused.residency.step(0.0)
    unused.residency.leave("a", gave_up, 0.5)
    unused.residency.loaded("a", 1.0)
    unused.ask("b", 1.0)
    assert unused.residency.step(1.0).evict == (Eviction("a", "b"),)


def test_a_pinned_slice_is_neither_evicted_nor_held_back() -> None:
    world = World({"kept": 60, "b": 40, "c": 40}, pinned="kept")
    world.use("kept", "b")
    world.ask("c", 100.0)
    assert world.residency.step(100.0).evict == (Eviction("b", "c"),)
    late = [world.ask("kept", 200.0) for _ in range(5)]
    assert world.residency.step(200.0).admit == tuple(Admission("kept", arrival) for arrival in late)


def test_room_is_not_hoped_for_from_a_pinned_slice() -> None:
    world = World({"kept": 60, "b": 40, "c": 40}, pinned="kept", patience_s=10.0)
    world.use("kept")
    running = world.ask("b")
    world.residency.step(0.0)
    world.residency.loaded("b", 0.0)
    world.residency.step(0.0)
    world.ask("c", 20.0)
    late = world.ask("b", 31.0)
    assert world.residency.step(31.0) == Actions(), "the busy slice gives way, not the idle pinned one"
    world.residency.leave("b", running, 32.0)
    assert world.residency.step(32.0).evict == (Eviction("b", "c"),)
    assert world.residency["b"].waiting == [late]


def test_what_never_fits_is_refused_with_the_numbers() -> None:
    world = World({"kept": 30, "large": 80, "huge": 101}, pinned="kept")
    huge = world.ask("huge")
    assert world.residency.step(0.0).refuse == (Refusal("huge", huge, 101, 100),)
    world.use("large")
    world.ask("kept", 10.0)
    assert world.residency.step(10.0).evict == (Eviction("large", "kept"),)
    world.residency.unloaded("large")
    assert world.residency.step(10.0).load == ("kept",)
    large = world.ask("large", 11.0)
    assert world.residency.step(11.0).refuse == (Refusal("large", large, 80, 70),)


def test_smaller_ones_overtake_for_a_while_and_never_into_the_room_of_the_first() -> None:
    world = World({"busy": 60, "first": 80, "small": 20, "tiny": 20}, patience_s=10.0)
    running = world.ask("busy")
    world.residency.step(0.0)
    world.residency.loaded("busy", 0.0)
    world.residency.step(0.0)
    world.ask("first", 1.0)
    world.ask("small", 2.0)
    assert world.residency.step(2.0).load == ("small",)
    world.residency.loaded("small", 2.0)
    world.residency.step(2.0)
    world.ask("tiny", 12.0)
    assert world.residency.step(12.0).load == (), "the patience of the first is over"
    world.residency.leave("busy", running, 13.0)
    assert world.residency.step(13.0).evict == (Eviction("busy", "first"),)
    assert world.residency.step(13.0).load == ()


def test_room_that_is_being_made_is_not_taken_by_others() -> None:
    world = World({"old": 70, "first": 80, "small": 20}, patience_s=10.0)
    world.use("old")
    world.ask("first", 6.0)
    world.ask("small", 6.0)
    actions = world.residency.step(6.0)
    assert (actions.evict, actions.load) == ((Eviction("old", "first"),), ())
    world.ask("small", 6.1)
    assert world.residency.step(6.1).load == ()


def test_what_takes_no_room_waits_for_none() -> None:
    world = World({"busy": 100, "first": 80, "remote": 0}, pinned="remote")
    world.ask("busy")
    world.residency.step(0.0)
    world.residency.loaded("busy", 0.0)
    world.residency.step(0.0)
    world.ask("first", 1.0)
    assert world.residency.step(30.0).load == ()
    world.ask("remote", 31.0)
    assert world.residency.step(31.0).load == ("remote",)


def test_a_run_that_comes_again_keeps_its_place() -> None:
    world = World({"a": 60})
    first = world.ask("a")
    world.residency.step(0.0)
    world.residency.loaded("a", 0.0)
    world.residency.step(0.0)
    world.residency.unloaded("a")
    second = world.ask("a")
    world.residency.leave("a", first, 1.0)
    world.residency.request("a", first)
    assert world.residency["a"].waiting == [first, second]


def test_the_most_that_was_measured_counts_and_replaces_the_estimate() -> None:
    world = World({"a": 60})
    world.residency.expect("a", 70)
    world.residency.measured("a", 10)
    assert world.residency["a"].bytes == 70, "nothing is measured of a slice that is not loaded"
    world.use("a")
    for measured, counted in ((40, 40), (50, 50), (45, 50)):
        world.residency.measured("a", measured)
        assert world.residency["a"].bytes == counted
    world.residency.expect("a", 70)
    assert world.residency["a"].bytes == 50, "nothing is expected of a slice that is loaded"


def test_a_slice_that_outgrew_the_budget_goes_when_it_is_idle() -> None:
    world = World({"a": 50, "b": 50}, min_resident_s=5.0)
    world.use("a", now=0.0)
    world.use("b", now=1.0)
    world.residency.measured("b", 60)
    assert world.residency.step(2.0) == Actions(wake_at=5.0)
    assert world.residency.step(5.0).evict == (Eviction("a", None),)
    world.residency.unloaded("a")
    assert world.residency.step(100.0) == Actions()


def test_leaving_what_was_never_entered_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="did not admit"):
        World({"a": 60}).residency.leave("a", Arrival(1, 0.0), 0.0)


def test_a_failed_load_takes_its_waiting_runs_along() -> None:
    world = World({"a": 60})
    first, second = world.ask("a"), world.ask("a")
    world.residency.step(0.0)
    world.residency.unloaded("a")
    assert world.residency.fail_waiting("a") == [first, second]
    assert world.residency["a"].phase is Phase.OUT
    assert world.residency.step(0.0) == Actions()
