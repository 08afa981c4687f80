"""How much memory a rank needs for model states, and the partition size that follows from it.

MiCS, section 3.1: the partition group is the smallest whole number of nodes whose memory holds the model states.
Activations depend on the batch and are not counted; a share of the device is left for them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lightning_mics.sharding.blocks import group_modules
from lightning_mics.topology import partition_sizes

# Share of a device that model states may take; the rest is for activations. The paper's own choices of partition size
# bound it: BERT 20B runs on 16 V100s, BERT 15B was not put on 8 nor BERT 50B on 32 (MiCS, table 1).
USABLE_SHARE = 0.75


ADAM_STATES = 2  # optimizers are made after sharding, so the most usual one is assumed


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What a model keeps, in bytes.

    Attributes:
        states_bytes: Parameters, gradients and the optimizer's states, all ranks of a partition group together.
        root_bytes: What no block holds, as gathered; it stays from the forward to the end of the backward.
        root_reduced_bytes: The gradients of that, in the dtype they are reduced in.
        block_bytes: The largest block, as gathered.
        block_reduced_bytes: The gradients of that, in the dtype they are reduced in.
        gathered_bytes: All parameters, as gathered.
        reduced_bytes: All gradients, in the dtype they are reduced in.
    """

    states_bytes: int
    root_bytes: int
    root_reduced_bytes: int
    block_bytes: int
    block_reduced_bytes: int
    gathered_bytes: int
    reduced_bytes: int

    def per_rank_bytes(self, partition_size: int) -> int:
        """Bytes on each rank at the peak of a backward, without activations.

        Besides its part of the model states a rank holds the root with its gradients, and either the block at work with
        its gradients, the next one already gathered, and the one before being reduced; or, at the end, the root being
        reduced.
        """
        in_blocks = 3 * self.block_bytes + self.block_reduced_bytes
        return -(-self.states_bytes // partition_size) + 2 * self.root_bytes + max(in_blocks, self.root_reduced_bytes)

    def at_head_bytes(self, partition_size: int) -> int:
        """Bytes on each rank when the backward begins, without activations: no block has gradients yet."""
        return -(-self.states_bytes // partition_size) + 2 * self.root_bytes + self.block_bytes

    def rank_bytes(self, partition_size: int, activations: Activations, *, cached_bytes: int = 0) -> int:
        """Bytes on each rank at the peak of a step, with ``activations`` and what is cached until the boundary."""
        at_head = self.at_head_bytes(partition_size) + activations.at_head
        in_blocks = self.per_rank_bytes(partition_size) + activations.in_blocks
        return cached_bytes + math.ceil(max(at_head, in_blocks))

    def largest_micro_batch(
        self, partition_size: int, sample: Activations, *, free_bytes: int, cached_bytes: int = 0
    ) -> int:
        """How many samples fit into ``free_bytes`` beside the model states; 0 if not even one does."""
        at_head = (free_bytes - cached_bytes - self.at_head_bytes(partition_size)) // sample.at_head
        in_blocks = (free_bytes - cached_bytes - self.per_rank_bytes(partition_size)) // sample.in_blocks
        return max(0, int(min(at_head, in_blocks)))


def measure_model(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    *,
    gathered_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> ModelSize:
    """Measure a model before it is sharded; it may be on the meta device.

    Args:
        model: The whole model.
        blocks: What is gathered together.
        gathered_dtype: Dtype of gathered parameters; None is that of the parameters.
        reduce_dtype: Dtype of gradient sums; None is that of the gradients.
    """
    blocks = set(blocks)
    root = _unit_parameters(model, blocks)
    units = [_unit_parameters(block, blocks) for block in blocks]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients_bytes = sum(p.numel() * max(p.itemsize, (reduce_dtype or p.dtype).itemsize) for p in trainable)
    return ModelSize(
        states_bytes=sum(parameter.nbytes for parameter in model.parameters())
        + gradients_bytes
        + ADAM_STATES * sum(parameter.nbytes for parameter in trainable),
        root_bytes=_bytes_in(root, gathered_dtype),
        root_reduced_bytes=_bytes_in(root, reduce_dtype),
        block_bytes=max((_bytes_in(unit, gathered_dtype) for unit in units), default=0),
        block_reduced_bytes=max((_bytes_in(unit, reduce_dtype) for unit in units), default=0),
        gathered_bytes=_bytes_in(model.parameters(), gathered_dtype),
        reduced_bytes=_bytes_in(trainable, reduce_dtype),
    )


def smallest_partition_size(size: ModelSize, *, world_size: int, ranks_per_node: int, capacity_bytes: int) -> int:
    """The smallest whole number of nodes, in ranks, that holds the model states; the whole job if none does.

    Args:
        size: From :func:`measure_model`.
        world_size: Ranks in the job.
        ranks_per_node: Ranks on each node.
        capacity_bytes: Memory of one rank's device, of which ``USABLE_SHARE`` is for model states.
    """
    sizes = partition_sizes(world_size=world_size, ranks_per_node=ranks_per_node)
    whole_nodes = (p for p in sizes if p >= ranks_per_node)
    return next((p for p in whole_nodes if fits(size, p, capacity_bytes)), world_size)


def fits(size: ModelSize, partition_size: int, capacity_bytes: int, *, cached_bytes: int = 0) -> bool:
    """Whether model states, and what is cached beside them, leave enough of a device for activations."""
    return size.per_rank_bytes(partition_size) + cached_bytes <= USABLE_SHARE * capacity_bytes


def device_memory_bytes(device: torch.device, *, processes: int) -> int:
    """Memory of a rank's device: of its GPU, or its part of the machine's, which has so many ``processes``."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes


def in_gib(size_bytes: int) -> str:
    """``size_bytes`` for people: three digits, or all before the point, and the unit."""
    size = size_bytes / 2**30
    return f"{size:,.0f} GiB" if size >= 1000 else f"{size:.3g} GiB"


def _unit_parameters(unit: nn.Module, blocks: set[nn.Module]) -> set[nn.Parameter]:
    return {parameter for module in group_modules(unit, blocks) for parameter in module.parameters(recurse=False)}


def _bytes_in(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None) -> int:
    return sum(parameter.numel() * (dtype or parameter.dtype).itemsize for parameter in parameters)


@dataclass(frozen=True)
class Activations:
    """The most bytes that are allocated at any moment of a forward and backward.

    Attributes:
        at_head: Until the backward of the last block begins: what blocks keep, and the loss.
        in_blocks: After that: what blocks keep, and one block at work.
    """

    at_head: float
    in_blocks: float

    @property
    def peak(self) -> float:
        """At any moment."""
        return max(self.at_head, self.in_blocks)

    def __add__(self, other: Activations) -> Activations:
        return Activations(self.at_head + other.at_head, self.in_blocks + other.in_blocks)

    def __mul__(self, factor: float) -> Activations:
        return Activations(self.at_head * factor, self.in_blocks * factor)
