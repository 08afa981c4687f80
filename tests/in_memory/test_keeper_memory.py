"""Slots are one complete step or nothing, and the step that all ranks have is not written over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightning_mics.in_memory.keeper.memory import BLOCK_BYTES, Area, PartLayout, Stamp, layout_digest, layouts_of

PRIVATE, ROWS = PartLayout("private", 3, 100, b"table"), PartLayout("rows", 3, 5000, b"other")


@pytest.fixture
def area() -> Iterator[Area]:
    area = Area(3, [PRIVATE, ROWS], local=True)
    yield area
    area.close()


def stamp(step: int, generation: int = 1) -> Stamp:
    return Stamp(generation, step, 8)


def write(area: Area, step: int, keep: int, generation: int = 1) -> int:
    number = area.next_slot((generation, keep))
    area.slots[number].clear()
    area.slots[number].complete(stamp(step, generation), {PRIVATE.key: 10, ROWS.key: BLOCK_BYTES + 1}, bytes(12))
    return number


def test_parts_are_one_after_the_other_from_a_page_on(area: Area) -> None:
    assert area.offsets == {PRIVATE.key: 0, ROWS.key: 4096}
    assert area.size_bytes == 4096 + 8192
    area.view(area.slots[0], ROWS.key, 5000)[:] = b"x" * 5000
    assert area.slots[0].memory[4096 + 4999] == ord("x")
    with pytest.raises(ValueError, match="do not fit"):
        area.view(area.slots[0], ROWS.key, 5001)


def test_steps_alternate_between_the_slots(area: Area) -> None:
    assert [write(area, step, keep=step - 1) for step in (1, 2, 3, 4)] == [0, 1, 0, 1]
    assert [slot.stamp for slot in area.slots] == [stamp(3), stamp(4)]


def test_a_step_that_all_ranks_have_stays_until_they_have_a_newer_one(area: Area) -> None:
    for step in (1, 2):
        write(area, step, keep=step - 1)
    assert write(area, 3, keep=1) == 1  # one of the ranks has not protected step 2
    assert [slot.stamp for slot in area.slots] == [stamp(1), stamp(3)]


def test_the_step_that_is_being_loaded_stays_though_a_later_generation_has_begun_to_save_it(area: Area) -> None:
    write(area, 5, keep=-1, generation=1)
    write(area, 5, keep=-1, generation=2)  # and some ranks died before they had it
    assert area.next_slot((1, 5)) == 1
    assert area.next_slot((2, 5)) == 0


def test_a_slot_that_is_being_written_holds_nothing(area: Area) -> None:
    write(area, 1, keep=-1)
    area.slots[0].clear()
    assert list(area.holdings()) == []


def test_a_slot_without_a_checksum_for_each_block_stays_empty(area: Area) -> None:
    with pytest.raises(ValueError, match="checksums"):
        area.slots[0].complete(stamp(1), {PRIVATE.key: 10, ROWS.key: BLOCK_BYTES + 1}, bytes(8))
    assert list(area.holdings()) == []


def test_layouts_arrive_as_they_were_sent() -> None:
    sent = [PRIVATE, ROWS]
    received = layouts_of([part.plain() for part in sent], b"".join(part.table for part in sent))
    assert received == sent
    assert layout_digest(received) == layout_digest(sent) != layout_digest([ROWS, PRIVATE])
    with pytest.raises(ValueError, match="is not the layout"):
        layouts_of([PRIVATE.plain(), ROWS.plain()], b"tab")
