"""The handle of a sharded model: its groups, its schedule, its report."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_mics.sharding.schedule import AccumulationSchedule
from lightning_mics.techniques.partition_groups import PartitionGroups


@dataclass(frozen=True)
class Sharded:
    """What belongs to a model that a policy has sharded.

    Attributes:
        groups: Process groups and mesh of this rank.
        schedule: Accumulation schedule; its three parts are for integrations.
        report: Table of groups, techniques and memory, for people.
        blocks: Modules that are parameter groups of their own.
    """

    groups: PartitionGroups
    schedule: AccumulationSchedule
    report: str
    blocks: tuple[nn.Module, ...]


def sharded_of(model: nn.Module) -> Sharded:
    """What belongs to a model that Fabric has set up or Accelerate has prepared.

    Raises:
        ValueError: If neither has.
    """
    sharded: Sharded | None = vars(model).get("_mics")
    if sharded is None:
        raise ValueError(
            "the model was not prepared by an Accelerator with fsdp_plugin=MiCSPlugin(...), nor set up by Fabric under "
            "strategy 'mics'"
        )
    return sharded
