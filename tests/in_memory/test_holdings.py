"""Which step a job resumes from: the newest of which every part is somewhere."""

from __future__ import annotations

from lightning_mics.in_memory.holdings import Holdings
from lightning_mics.in_memory.keeper.memory import Stamp


def held(stamp: Stamp, *parts: tuple[str, int]) -> list[dict[str, object]]:
    plain = [stamp.generation, stamp.step, stamp.world_size]
    return [{"kind": kind, "rank": rank, "stamp": plain, "bytes": 1} for kind, rank in parts]


PRIVATE_AND_ROWS = [("private", 0), ("private", 1), ("rows", 0), ("rows", 1)]
OLD, NEW = Stamp(1, 7, 2), Stamp(1, 8, 2)


def test_the_newest_whole_step_is_found_across_nodes() -> None:
    of_nodes = [held(OLD, *PRIVATE_AND_ROWS), [*held(NEW, *PRIVATE_AND_ROWS[:3]), *held(OLD, ("rows", 1))]]
    holdings = Holdings.of(of_nodes)
    assert holdings.newest == OLD
    assert holdings.newest_in_part == NEW
    assert holdings.missing(NEW) == [("rows", 1)]
    assert holdings.nodes[OLD]["rows", 1] == [0, 1]
    assert Holdings.of([*of_nodes, held(NEW, ("rows", 1))]).newest == NEW


def test_a_later_generation_counts_more_than_a_later_step() -> None:
    again = Stamp(2, 7, 2)
    holdings = Holdings.of([[*held(Stamp(1, 9, 2), *PRIVATE_AND_ROWS), *held(again, *PRIVATE_AND_ROWS)]])
    assert holdings.newest == again
    assert holdings.next_generation == 3


def test_parts_of_different_starts_never_mix() -> None:
    first, second = Stamp(1, 8, 2), Stamp(2, 8, 2)
    assert Holdings.of([held(first, *PRIVATE_AND_ROWS[:2]), held(second, *PRIVATE_AND_ROWS[2:])]).newest is None


def test_without_anything_there_is_no_step_and_the_first_generation() -> None:
    holdings = Holdings.of([[], []])
    assert holdings.newest is None and holdings.newest_in_part is None
    assert holdings.next_generation == 1


def test_of_what_is_left_the_step_with_the_fewest_missing_parts_is_named() -> None:
    of_nodes = [held(OLD, *PRIVATE_AND_ROWS[:3]), held(NEW, *PRIVATE_AND_ROWS[:2])]
    assert Holdings.of(of_nodes).fullest == OLD
    assert Holdings.of([*of_nodes, held(NEW, ("rows", 1))]).fullest == NEW
