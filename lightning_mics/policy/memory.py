"""Memory that a rank needs for model states, and the partition size that follows from it.

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
    """Sizes of a model, in bytes.

    Attributes:
        states_bytes: Parameters, gradients and optimizer states, over all ranks of a partition group.
        root_bytes: Unsharded parameters outside of all blocks; they stay from the forward to the end of the backward.
        root_reduced_bytes: Gradients of the root, in the dtype of the reduction.
        block_bytes: Unsharded parameters of the largest block.
        block_reduced_bytes: Gradients of the largest block, in the dtype of the reduction.
        gathered_bytes: All unsharded parameters.
        reduced_bytes: All gradients, in the dtype of the reduction.
        gradients_bytes: Gradients among the model states.
        blocks_gathered_bytes: Unsharded parameters of each block, in order.
        blocks_reduced_bytes: Gradients of each block, in the dtype of the reduction.
    """

    states_bytes: int
    root_bytes: int
    root_reduced_bytes: int
    block_bytes: int
    block_reduced_bytes: int
    gathered_bytes: int
    reduced_bytes: int
    gradients_bytes: int = 0
    blocks_gathered_bytes: tuple[int, ...] = ()
    blocks_reduced_bytes: tuple[int, ...] = ()

    def per_rank_bytes(self, partition_size: int) -> int:
        """Bytes on each rank at the peak of a backward, without activations.

        A rank holds its shard of the model states, the root with its gradients, and either the current block with its
        gradients, the next block already unsharded, and the previous one being reduced; or, at the end, the root being
        reduced.

        Args:
            partition_size: Ranks per partition group.
        """
        in_blocks = 3 * self.block_bytes + self.block_reduced_bytes
        return -(-self.states_bytes // partition_size) + 2 * self.root_bytes + max(in_blocks, self.root_reduced_bytes)

    def rank_bytes(
        self, partition_size: int, activations: Activations, *, cached_bytes: int = 0, micro_steps: int | None = None
    ) -> int:
        """Bytes on each rank at the peak of a step, with activations and caches.

        In a step of one micro-step, gradients grow as activations shrink: when the backward begins there are none, when
        it reaches the first block there are all.

        Args:
            partition_size: Ranks per partition group.
            activations: Activations of a micro-batch.
            cached_bytes: Cached parameters and accumulated gradients of a rank, in bytes.
            micro_steps: Micro-steps per optimizer step; None if it is not known.
        """
        in_blocks = self.per_rank_bytes(partition_size)
        at_head = -(-self.states_bytes // partition_size) + 2 * self.root_bytes + self.block_bytes
        peak = max(at_head + activations.at_head, in_blocks + activations.in_blocks)
        if micro_steps == 1:
            later = max(0, self.gradients_bytes - 2 * self.block_reduced_bytes) // partition_size
            peak = max(peak - later, in_blocks + activations.at_end)
        return cached_bytes + math.ceil(peak)


def measure_model(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    *,
    gathered_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> ModelSize:
    """Measure a model before it is sharded; it may be on the meta device.

    Args:
        model: The model, not sharded.
        blocks: Blocks of the model, each a parameter group, as :func:`~lightning_mics.sharding.blocks.find_blocks`
            lists them.
        gathered_dtype: Dtype of unsharded parameters; None is the dtype of the parameters.
        reduce_dtype: Dtype of gradient sums; None is the dtype of the gradients.
    """
    in_order = list(reversed(list(blocks)))
    blocks = set(in_order)
    root = _unit_parameters(model, blocks)
    units = [_unit_parameters(block, blocks) for block in in_order]
    gathered = tuple(_bytes_in(unit, gathered_dtype) for unit in units)
    reduced = tuple(_bytes_in((p for p in unit if p.requires_grad), reduce_dtype) for unit in units)
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
        gradients_bytes=gradients_bytes,
        blocks_gathered_bytes=gathered,
        blocks_reduced_bytes=reduced,
    )


def smallest_partition_size(size: ModelSize, *, world_size: int, ranks_per_node: int, capacity_bytes: int) -> int:
    """The smallest whole number of nodes, in ranks, that holds the model states; all ranks if none does.

    Args:
        size: Size of the model, from :func:`measure_model`.
        world_size: Ranks in the job.
        ranks_per_node: Ranks on each node.
        capacity_bytes: Memory of one rank's device, of which ``USABLE_SHARE`` is for model states.
    """
    sizes = partition_sizes(world_size=world_size, ranks_per_node=ranks_per_node)
    whole_nodes = (p for p in sizes if p >= ranks_per_node)
    return next((p for p in whole_nodes if fits(size, p, capacity_bytes)), world_size)


def fits(size: ModelSize, partition_size: int, capacity_bytes: int, *, cached_bytes: int = 0) -> bool:
    """Whether model states and caches leave enough of a device for activations.

    Args:
        size: Size of the model, from :func:`measure_model`.
        partition_size: Ranks per partition group.
        capacity_bytes: Memory of one rank's device, in bytes.
        cached_bytes: Cached parameters and accumulated gradients of a rank, in bytes.
    """
    return size.per_rank_bytes(partition_size) + cached_bytes <= USABLE_SHARE * capacity_bytes


def device_memory_bytes(device: torch.device, *, processes: int) -> int:
    """Memory of a rank's device in bytes: its accelerator, or an equal part of the machine's memory.

    Args:
        device: Device of the rank.
        processes: Number of ranks on the machine.
    """
    if device.type != "cpu":
        return int(torch.get_device_module(device).get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes


def in_gib(size_bytes: int) -> str:
    """``size_bytes`` in GiB for display: three digits, or all before the decimal point."""
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
        at_head: Peak in bytes until the backward of the last block: saved activations of all blocks, and the loss.
        in_blocks: Peak in bytes after that: saved activations of all blocks, and the work of one block.
        at_end: Peak in bytes from the backward of the first block on.
    """

    at_head: float = 0.0
    in_blocks: float = 0.0
    at_end: float = 0.0

    @property
    def peak(self) -> float:
        """Peak of the forward and backward, in bytes."""
        return max(self.at_head, self.in_blocks, self.at_end)

    def __add__(self, other: Activations) -> Activations:
        return Activations(self.at_head + other.at_head, self.in_blocks + other.in_blocks, self.at_end + other.at_end)

    def __mul__(self, factor: float) -> Activations:
        return Activations(self.at_head * factor, self.in_blocks * factor, self.at_end * factor)
