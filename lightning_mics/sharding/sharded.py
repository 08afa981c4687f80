"""The handle of a sharded model: process groups, accumulation schedule and start report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_mics.sharding.schedule import AccumulationSchedule
from lightning_mics.techniques.partition_groups import PartitionGroups


@dataclass(frozen=True)
class Sharded:
    """Process groups, schedule and report of a model that a policy has sharded.

    Attributes:
        groups: Process groups and mesh of this rank.
        schedule: Accumulation schedule of the model.
        report: Table of groups, techniques and memory, as text.
        blocks: Modules that are parameter groups of their own.
        memory_advice: Options that would take less memory, as text for errors; empty for none.
        chosen: Values of the options that were "auto", by name.
    """

    groups: PartitionGroups
    schedule: AccumulationSchedule
    report: str
    blocks: tuple[nn.Module, ...]
    memory_advice: str = ""
    chosen: Mapping[str, Any] = field(default_factory=dict)

    def without_weights(self) -> list[str]:
        """FQNs of the frozen parameters that were on the meta device, and to which nothing has given weights."""
        base = self.schedule.base_weights
        return [] if base is None else base.unset()

    def prepare_to_save(self, *, beside: bool = False) -> None:
        """Check cached weights and give all ranks rank 0's buffers before a checkpoint is saved; every rank calls it.

        Args:
            beside: Whether it is saved beside the training, at a boundary. Then no rank waits for others: rank 0's
                buffers are saved, and all ranks have them when the next forward begins.

        Raises:
            RuntimeError: If weights changed in a way that torch does not record while they were cached, or replicas
                differ that are compared while training.
        """
        self.schedule.cache.check_arrived(wait=True)
        if self.schedule.replicas is not None and not beside:
            self.schedule.replicas.before_save()
        if beside:
            self.schedule.buffers.compare_beside()
        else:
            self.schedule.buffers.make_equal()


def sharded(model: nn.Module) -> Sharded:
    """The groups, schedule and report of a model that the Trainer, Fabric or Accelerate has sharded.

    Args:
        model: The model, or a module around it: what ``fabric.setup``, ``accelerator.prepare`` or ``torch.compile``
            returned, or a LightningModule that holds it.

    Raises:
        ValueError: If no module in ``model`` was sharded by a strategy or plugin, or more than one was.
    """
    own: Sharded | None = vars(model).get("_mics")
    if own is not None:
        return own
    found: dict[str, Sharded] = {
        name: vars(module)["_mics"] for name, module in model.named_modules() if "_mics" in vars(module)
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} is not sharded, nor is a module in it: sharding happens when the Trainer starts, "
            "in `fabric.setup`, or in `accelerator.prepare` with fsdp_plugin=MiCSPlugin(...); then pass the model that "
            "was given to it, not a part of it"
        )
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} sharded models, {', '.join(map(repr, found))}: pass one of them"
        )
    inner: Sharded
    (inner,) = found.values()
    return inner
