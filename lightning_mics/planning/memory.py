"""How much memory a rank needs for model states, and the partition size that follows from it.

MiCS, section 3.1: the partition group is the smallest whole number of nodes whose memory holds the model states.
Activations depend on the batch and are not counted; a share of the device is left for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lightning_mics.topology import partition_sizes

# Share of a device that model states may take; the rest is for activations. The paper's own choices of partition size
# bound it: BERT 20B runs on 16 V100s, BERT 15B was not put on 8 nor BERT 50B on 32 (MiCS, table 1).
USABLE_SHARE = 0.75

ADAM_STATES = 2  # optimizers are made after sharding, so the most usual one is assumed


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What a model keeps, in bytes, all ranks of a partition group together.

    Attributes:
        parameters_bytes: Parameters as the optimizer sees them.
        gradients_bytes: One gradient per trainable parameter, in the wider of its dtype and the reduce dtype.
        optimizer_bytes: The two moments of Adam for each trainable parameter, in its dtype.
        root_bytes: What no block holds, as gathered; it stays from the forward to the end of the backward.
        block_bytes: The largest block, as gathered.
    """

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    root_bytes: int
    block_bytes: int

    def per_rank_bytes(self, partition_size: int) -> int:
        """Bytes on each rank: its part of the model states, the root, two gathered blocks and a block's gradients."""
        states = self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes
        return -(-states // partition_size) + self.root_bytes + 3 * self.block_bytes


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
    parameters = list(model.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    block_sizes = [_gathered_bytes(block.parameters(), gathered_dtype) for block in blocks]
    return ModelSize(
        parameters_bytes=sum(parameter.nbytes for parameter in parameters),
        gradients_bytes=sum(p.numel() * max(p.itemsize, (reduce_dtype or p.dtype).itemsize) for p in trainable),
        optimizer_bytes=ADAM_STATES * sum(parameter.nbytes for parameter in trainable),
        root_bytes=_gathered_bytes(parameters, gathered_dtype) - sum(block_sizes),
        block_bytes=max(block_sizes, default=0),
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
    fitting = (p for p in whole_nodes if size.per_rank_bytes(p) <= USABLE_SHARE * capacity_bytes)
    return next(fitting, world_size)


def _gathered_bytes(parameters: Iterable[nn.Parameter], gathered_dtype: torch.dtype | None) -> int:
    return sum(parameter.numel() * (gathered_dtype or parameter.dtype).itemsize for parameter in parameters)
