"""The choice of an earlier run, which a run that resumes from its checkpoint keeps.

Another choice adds up gradients in another order, so losses would not continue bit for bit; and measured rates may
differ from day to day.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from lightning_mics.checkpoint.origin import saved_choice, saved_topology
from lightning_mics.policy.choice import Choice, choose, options_that_may_be_auto
from lightning_mics.policy.memory import ModelSize
from lightning_mics.sharding.options import CommunicationOptions

KEPT = '"auto": as in the checkpoint'


def choice_of_checkpoint(
    meta: Mapping[str, Any],
    size: ModelSize,
    *,
    world_size: int,
    ranks_per_node: int,
    capacity_bytes: int,
    partition_size: int | Literal["auto"],
    communication: CommunicationOptions,
) -> tuple[Choice | None, str]:
    """The choice that a checkpoint has recorded, if it is one for this job too.

    Args:
        meta: Entries of the checkpoint; empty if there is none.
        size: Size of the model.
        world_size: Ranks in the job.
        ranks_per_node: Ranks on each node.
        capacity_bytes: Memory of one rank's device.
        partition_size: Ranks per partition group, or "auto".
        communication: Options of the user.

    Returns:
        The choice, or None, and what became of it in words: empty if the checkpoint has recorded none.
    """
    saved, topology = saved_choice(meta), saved_topology(meta)
    if not saved:
        return None, ""
    if topology is None or (topology.world_size, topology.ranks_per_node) != (world_size, ranks_per_node):
        before = f"{topology.world_size} ranks, {topology.ranks_per_node} per node" if topology else "another job"
        return None, f"chosen anew: the checkpoint is of {before}"
    given = options_that_may_be_auto(partition_size, communication)
    if saved.keys() != {name for name, value in given.items() if value == "auto"}:
        return None, 'chosen anew: other options are "auto" than in the run that saved the checkpoint'
    options = dict(saved)
    try:
        choice = choose(
            size,
            world_size=world_size,
            ranks_per_node=ranks_per_node,
            capacity_bytes=capacity_bytes,
            partition_size=options.pop("partition_size", partition_size),
            communication=replace(communication, **options),
        )
        replace(communication, **options).check(choice.topology)
    except (TypeError, ValueError):
        return None, "chosen anew: the options in the checkpoint do not fit this job"
    if not choice.fits:
        return None, "chosen anew: the options in the checkpoint leave too little memory here"
    reasons = {name: KEPT if name in saved and name != "hierarchical" else why for name, why in choice.reasons.items()}
    return replace(choice, reasons=reasons), "the choice of the checkpoint is kept"
