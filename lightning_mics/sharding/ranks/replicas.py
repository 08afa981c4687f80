"""Replicas hold the same weights, bit for bit: compared at start, after loading, and every some optimizer steps.

A rank compares a checksum per parameter of its own rows with the ranks that hold the same rows in other replicas. While
training, one small all-reduce is begun after a step and read after the next one, so nothing waits for it::

    step          n                              n + 1
    ranks     checksums, all-reduce begins       it is read: if a checksum differs, all ranks stop
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_mics._torch.optimizers.steps import call_after_steps
from lightning_mics.techniques.partition_groups import PartitionGroups

SUMMED_AT_ONCE = 2**22  # elements, as 64-bit integers, which take several times the parameter's memory
SUMMED_AT_ONCE_ON_CPU = 2**15  # what stays in a cache


def checked_every(steps: int | None) -> int | None:
    """The interval between two comparisons, in optimizer steps.

    Args:
        steps: Number of optimizer steps; None for never.

    Raises:
        ValueError: If it is not a positive integer.
    """
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ValueError(f"certify_every_n_steps={steps!r} is neither None nor a positive number of optimizer steps")
    return steps


@torch.no_grad()
def verify_replicas(model: nn.Module, groups: PartitionGroups) -> None:
    """Check that all replicas hold the same parameters, bit for bit; every rank calls it.

    Compares a checksum per parameter over the replication group.

    Args:
        model: The sharded model.
        groups: Process groups of this rank.

    Raises:
        RuntimeError: If they differ; the message names the first parameters that do.
    """
    if groups.topology.replicas == 1 or next(model.parameters(), None) is None:
        return
    names, checksums = _checksums(model)
    of_replicas = [torch.empty_like(checksums) for _ in range(groups.topology.replicas)]
    dist.all_gather(of_replicas, checksums, group=groups.replication)
    same = (torch.stack(of_replicas) == checksums).all(dim=0)  # [parameters]
    # a rank whose own part agrees must raise with the others
    if groups.control.largest((~same.all()).int().cpu(), "compares replicas"):
        raise RuntimeError(
            _message([name for name, ok in zip(names, same.tolist(), strict=True) if not ok], len(names))
        )


@dataclass(frozen=True)
class _Comparison:
    """A comparison in flight: the largest checksums, and the largest of their complements, of all replicas."""

    step: int
    names: list[str]
    largest: Tensor  # [2, parameters]
    work: Any


class ReplicaCheck:
    """Compares the replicas of a model while it trains; each rank makes it.

    Args:
        model: The sharded model.
        groups: Process groups of this rank.
        every: Number of optimizer steps between two comparisons.
        trains_with: Function that returns whether an optimizer holds parameters of the model.
    """

    def __init__(
        self, model: nn.Module, groups: PartitionGroups, *, every: int, trains_with: Callable[[Optimizer], bool]
    ) -> None:
        self._model = model
        self._groups = groups
        self._every = every
        self._trains_with = trains_with
        self._steps = 0
        self._begun: _Comparison | None = None
        if groups.topology.replicas > 1:
            call_after_steps(self._after_step)

    def read(self) -> None:
        """Wait for the comparison in flight, if there is one; every rank calls it.

        Raises:
            RuntimeError: If replicas differ; the message names parameters and step.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return
        begun.work.wait()
        largest, largest_of_complements = begun.largest.tolist()
        apart = [
            name
            for name, most, least in zip(begun.names, largest, largest_of_complements, strict=True)
            if most != ~least
        ]
        if apart:
            raise RuntimeError(f"after optimizer step {begun.step}: {_message(apart, len(begun.names))}")

    def before_save(self) -> None:
        """Compare now, so that no checkpoint of replicas that differ replaces a good one; every rank calls it.

        Raises:
            RuntimeError: If replicas differ.
        """
        self.read()
        if self._steps:
            verify_replicas(self._model, self._groups)

    def _after_step(self, optimizer: Optimizer) -> None:
        if not self._trains_with(optimizer):
            return
        self._steps += 1
        self.read()
        if self._steps % self._every == 0:
            self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        names, checksums = _checksums(self._model)
        both = torch.stack([checksums, ~checksums])
        work = dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self._groups.replication, async_op=True)
        self._begun = _Comparison(self._steps, names, both, work)


def checksum(tensor: Tensor) -> Tensor:
    """The sum of all bit patterns, each weighted by its position: integers, so exact in any order of addition: [].

    Args:
        tensor: Tensor of any dtype: [any].
    """
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    bits = tensor.detach().contiguous().flatten().view(integer)
    at_once = SUMMED_AT_ONCE_ON_CPU if bits.device.type == "cpu" else SUMMED_AT_ONCE
    positions = torch.arange(1, min(at_once, bits.numel()) + 1, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), at_once):
        part = bits[start : start + at_once]
        total += (part * positions[: part.numel()]).sum() + start * part.sum()
    return total


def _checksums(model: nn.Module) -> tuple[list[str], Tensor]:
    """The names of all parameters, and checksums of this rank's rows of them, [parameters]."""
    names, shards = zip(*((name, _local(parameter)) for name, parameter in model.named_parameters()), strict=True)
    return list(names), torch.stack([checksum(shard) for shard in shards])


def _message(differing: list[str], parameters: int) -> str:
    rank = dist.get_rank()
    if not differing:
        what = f"rows that rank {rank} does not hold"
    else:
        what = f"{len(differing)} of {parameters} parameters that rank {rank} holds a part of, as in {differing[:3]}"
    return f"the replicas of the model differ in {what}; they must be equal at all times"


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
