"""Which parameter groups keep their frozen weights on each rank: those that save most traffic for their memory.

Frozen weights that are cached on nodes cross nodes once per job, but are gathered inside the node at every use. On each
rank nothing of them is sent again. A block of E elements, T of which train, then takes E elements of each rank. With u
uses in each of s micro-steps it saves the gathers of s u E - T elements per step. So by what it saves for its memory,
s u - T/E, blocks that the backward uses come first, and of those the ones of which the smallest share trains::

    block                    uses    trains    order
    below all that trains    1       0         3
    without adapters         2       0         1
    with adapters            2       1 %       2

Whether a block is recomputed is no difference: it is recomputed with the weights that were gathered for its backward.
The root's own parameters are unsharded for the whole step in any case, so they join the first block.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_mics.sharding.blocks import evenly

UnitSize = tuple[int, int]  # elements of a parameter group, and those of them that require gradients


def units_on_ranks(sizes: Sequence[UnitSize], share: float) -> list[bool]:
    """Which parameter groups keep their frozen weights on each rank; blocks that are alike are spread over the depth.

    Args:
        sizes: Elements of each parameter group, and those that require gradients; the root's first.
        share: Share of the blocks with frozen weights, 0 to 1.
    """
    in_backward = used_in_backward(sizes)
    alike: dict[tuple[bool, float], list[int]] = {}
    for unit in frozen_blocks(sizes):
        elements, trained = sizes[unit]
        alike.setdefault((not in_backward[unit], trained / elements), []).append(unit)
    chosen: set[int] = set()
    left = int(share * len(frozen_blocks(sizes)) + 1e-6)  # a share may be a rounded quotient
    for _, units in sorted(alike.items()):
        count = min(left, len(units))
        chosen.update(unit for unit, taken in zip(units, evenly(count, len(units)), strict=True) if taken)
        left -= count
    if chosen and sizes[0][0] > sizes[0][1]:
        chosen.add(0)
    return [unit in chosen for unit in range(len(sizes))]


def frozen_blocks(sizes: Sequence[UnitSize]) -> list[int]:
    """Positions of the blocks that have frozen weights, among the parameter groups.

    Args:
        sizes: Elements of each parameter group, and those that require gradients; the root's first.
    """
    return [unit for unit, (elements, trained) in enumerate(sizes) if unit and elements > trained]


def used_in_backward(sizes: Sequence[UnitSize]) -> list[bool]:
    """Whether the weights of each parameter group are gathered for the backward too.

    No gradient reaches blocks below the first that trains, except where the root trains, which may be below. FSDP2
    gathers one block ahead, so also the last one that no gradient reaches.

    Args:
        sizes: Elements of each parameter group, and those that require gradients; the root's first.
    """
    trains = [trained > 0 for _, trained in sizes]
    first = 1 if not trains or trains[0] or True not in trains else trains.index(True)
    return [unit == 0 or unit >= first - 1 for unit in range(len(sizes))]
