"""Memory that a rank needs for model states, and the partition size that follows from it.

MiCS, section 3.1: the partition group is the smallest whole number of nodes whose memory holds the model states.
Activations depend on the batch and are not counted; a share of the device is left for them. Where they are known, all
tensors of a step are counted (:mod:`lightning_mics.policy.step_memory`), and only a reserve is left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lightning_mics._torch.host_memory import host_memory_bytes
from lightning_mics.sharding.blocks import group_modules
from lightning_mics.sharding.modules.frozen_blocks import UnitSize
from lightning_mics.sharding.optimizers.offload import Offload
from lightning_mics.topology import partition_sizes

# Share of a device that model states may take; the rest is for activations. The paper's own choices of partition size
# bound it: BERT 20B runs on 16 V100s, BERT 15B was not put on 8 nor BERT 50B on 32 (MiCS, table 1).
USABLE_SHARE = 0.75


# What a GPU holds besides tensors, for each rank: the CUDA context (about 0.5 GB), and NCCL's buffers for the groups of
# nodes, rails and replicas (0.3 to 1 GB).
RESERVED_BYTES = 1_500_000_000


# Share of a device that tensors cannot use: the allocator's pools of the streams that gather, reduce and compute do not
# lend each other what is free in them, and its blocks leave gaps.
RESERVED_SHARE = 0.06


ADAM_STATES = 2  # optimizers are made after sharding, so the most usual one is assumed


# Values per scale of torchao's AdamW8bit and AdamW4bit, by bits of a code. Scales are float32; shards that are smaller,
# or not whole blocks, stay in float32 (torchao/optim/adam.py, _new_buffer).
LOW_BIT_BLOCKS = {8: 256, 4: 128}
SMALLEST_LOW_BIT_SHARD = 4096


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Sizes of a model, in bytes.

    Attributes:
        states_bytes: Parameters and their averages, gradients and optimizer states, over all ranks of a partition
            group; without those in host memory.
        root_bytes: Unsharded parameters outside of all blocks; they stay from the forward to the end of the backward.
        root_reduced_bytes: Gradients of the root, in the dtype of the reduction.
        block_bytes: Unsharded parameters of the largest block.
        block_reduced_bytes: Gradients of the largest block, in the dtype of the reduction.
        gathered_bytes: All unsharded parameters.
        reduced_bytes: All gradients, in the dtype of the reduction.
        gradients_bytes: Gradients among the model states.
        offloaded_bytes: Model states in host memory, with what a step copies there, over all ranks of a partition
            group.
        offload: Which model states are in host memory.
        buffers_bytes: Buffers, which every rank has.
        cast_bytes: Gradients in the dtype of parameters, where they are reduced in another.
        blocks_gathered_bytes: Unsharded parameters of each block, in order.
        blocks_reduced_bytes: Gradients of each block, in the dtype of the reduction.
        units: Elements of each parameter group, and those of them that require gradients; the root's first.
    """

    states_bytes: int
    root_bytes: int
    root_reduced_bytes: int
    block_bytes: int
    block_reduced_bytes: int
    gathered_bytes: int
    reduced_bytes: int
    gradients_bytes: int = 0
    offloaded_bytes: int = 0
    offload: Offload = False
    buffers_bytes: int = 0
    cast_bytes: int = 0
    blocks_gathered_bytes: tuple[int, ...] = ()
    blocks_reduced_bytes: tuple[int, ...] = ()
    units: tuple[UnitSize, ...] = ()

    def per_rank_host_bytes(self, partition_size: int) -> int:
        """Bytes of model states that each rank has in host memory at most.

        Args:
            partition_size: Ranks per partition group.
        """
        return -(-self.offloaded_bytes // partition_size)

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


def measure_model(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    *,
    gathered_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    offload: Offload = False,
    averages: int = 0,
) -> ModelSize:
    """Measure a model before it is sharded; it may be on the meta device.

    Args:
        model: The model, not sharded.
        blocks: Blocks of the model, each a parameter group, as :func:`~lightning_mics.sharding.blocks.find_blocks`
            lists them.
        gathered_dtype: Dtype of unsharded parameters; None is the dtype of the parameters.
        reduce_dtype: Dtype of gradient sums; None is the dtype of the gradients.
        offload: Which model states are in host memory; see :mod:`~lightning_mics.sharding.optimizers.offload`.
        averages: Number of averages of the weights that are kept, where the weights are.
    """
    in_order = list(reversed(list(blocks)))
    blocks = set(in_order)
    root = _unit_parameters(model, blocks)
    units = [_unit_parameters(block, blocks) for block in in_order]
    gathered = tuple(_bytes_in(unit, gathered_dtype) for unit in units)
    reduced = tuple(_bytes_in((p for p in unit if p.requires_grad), reduce_dtype) for unit in units)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients_bytes = sum(p.numel() * max(p.itemsize, (reduce_dtype or p.dtype).itemsize) for p in trainable)
    weights_bytes = (1 + averages) * sum(parameter.nbytes for parameter in model.parameters())
    trained_bytes = sum(parameter.nbytes for parameter in trainable)
    adam_bytes = ADAM_STATES * trained_bytes
    on_device = {False: weights_bytes + gradients_bytes + adam_bytes, "optimizer": weights_bytes + gradients_bytes}
    on_host = {"optimizer": adam_bytes + 2 * trained_bytes, True: weights_bytes + trained_bytes + adam_bytes}
    return ModelSize(
        states_bytes=on_device.get(offload, 0),
        root_bytes=_bytes_in(root, gathered_dtype),
        root_reduced_bytes=_bytes_in(root, reduce_dtype),
        block_bytes=max((_bytes_in(unit, gathered_dtype) for unit in units), default=0),
        block_reduced_bytes=max((_bytes_in(unit, reduce_dtype) for unit in units), default=0),
        gathered_bytes=_bytes_in(model.parameters(), gathered_dtype),
        reduced_bytes=_bytes_in(trainable, reduce_dtype),
        gradients_bytes=0 if offload is True else gradients_bytes,
        offloaded_bytes=on_host.get(offload, 0),
        offload=offload,
        buffers_bytes=(1 + averages) * sum(buffer.nbytes for buffer in model.buffers()),
        cast_bytes=sum(p.nbytes for p in trainable if reduce_dtype not in (None, p.dtype)),
        blocks_gathered_bytes=gathered,
        blocks_reduced_bytes=reduced,
        units=tuple(map(_elements, (root, *units))),
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


def saved_by_low_bits(shard_elements: int, *, bits: int) -> int:
    """Bytes that the states of Adam take less in codes of some bits than in float32, for one shard.

    Args:
        shard_elements: Number of elements of the shard.
        bits: Bits of a code, 8 or 4.
    """
    block = LOW_BIT_BLOCKS[bits]
    if shard_elements < SMALLEST_LOW_BIT_SHARD or shard_elements % block:
        return 0
    return ADAM_STATES * (4 * shard_elements - shard_elements * bits // 8 - 4 * (shard_elements // block))


def usable_bytes(capacity_bytes: int) -> int:
    """Memory of a device that is left for tensors where all of them are known, activations too.

    Args:
        capacity_bytes: Memory of the device.
    """
    return int((1 - RESERVED_SHARE) * capacity_bytes) - RESERVED_BYTES


def device_memory_bytes(device: torch.device, *, processes: int) -> int:
    """Memory of a rank's device in bytes: its accelerator, or an equal part of what this host has.

    Args:
        device: Device of the rank.
        processes: Number of ranks on the machine.
    """
    if device.type != "cpu":
        return int(torch.get_device_module(device).get_device_properties(device).total_memory)
    return host_memory_bytes() // processes


def in_gib(size_bytes: int) -> str:
    """``size_bytes`` in GiB for display: three digits, or all before the decimal point."""
    size = size_bytes / 2**30
    return f"{size:,.0f} GiB" if size >= 1000 else f"{size:.3g} GiB"


def _unit_parameters(unit: nn.Module, blocks: set[nn.Module]) -> set[nn.Parameter]:
    return {parameter for module in group_modules(unit, blocks) for parameter in module.parameters(recurse=False)}


def _elements(parameters: Iterable[nn.Parameter]) -> UnitSize:
    listed = list(parameters)
    return sum(p.numel() for p in listed), sum(p.numel() for p in listed if p.requires_grad)


def _bytes_in(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None) -> int:
    return sum(parameter.numel() * (dtype or parameter.dtype).itemsize for parameter in parameters)
