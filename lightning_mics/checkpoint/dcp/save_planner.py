"""The save planner for ``torch.distributed.checkpoint``: which bytes each rank writes.

torch's planner lets one replica write all of a shard; this one lets each rank write its own rows. It takes the tensors
when it is made, and can copy them, so that training may continue while they are written.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from lightning_mics._torch.streams import current_stream
from lightning_mics.checkpoint.dcp.rows import divide

BLOCK_BYTES = 2**28  # torch gives pinned memory in powers of two
ALIGNED_TO = 64  # bytes: a line of the cache


class HostBuffers:
    """Host memory for copies of tensors, reused from one checkpoint to the next; pinned for tensors on a device.

    It is a few large blocks whatever the number of tensors: torch rounds pinned memory up to a power of two, and
    pinning new memory waits for the device.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []  # each [bytes], uint8

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.nbytes for block in self._blocks)

    def copy(self, values: Mapping[MetadataIndex, Tensor]) -> dict[MetadataIndex, Tensor]:
        """Copy tensors to the host; returns when the copies are complete.

        Args:
            values: Tensors to copy, each [any shape], by entry of the checkpoint.

        Returns:
            The copies, of the same shapes, in memory that the next call overwrites.
        """
        devices = {tensor.device for tensor in values.values() if tensor.device.type != "cpu"}
        sizes = {index: -(-tensor.nbytes // ALIGNED_TO) * ALIGNED_TO for index, tensor in values.items()}
        copies: dict[MetadataIndex, Tensor] = {}
        for number, (block_bytes, indices) in enumerate(_packed(sizes)):
            block, start = self._block(number, block_bytes, pinned=bool(devices)), 0
            for index in indices:
                memory = block[start : start + values[index].nbytes]
                copies[index] = memory.view(values[index].dtype).view(values[index].shape)
                copies[index].copy_(values[index], non_blocking=True)
                start += sizes[index]
        for device in devices:
            current_stream(device).synchronize()
        return copies

    def _block(self, number: int, size_bytes: int, *, pinned: bool) -> Tensor:
        """The block of this number, [at least size_bytes]; one that is too small is replaced."""
        if number == len(self._blocks) or self._blocks[number].nbytes < size_bytes:
            del self._blocks[number : number + 1]  # its memory first
            self._blocks.insert(number, torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned))
        return self._blocks[number]


def _packed(sizes: Mapping[MetadataIndex, int]) -> list[tuple[int, list[MetadataIndex]]]:
    """Entries packed into blocks: the bytes of each block, a power of two, and what is in it.

    The largest go first, so that small ones fill what these leave; only the last block may be much larger than what
    is in it.

    Args:
        sizes: Size of each entry in bytes.
    """
    blocks: list[tuple[int, list[MetadataIndex]]] = []  # bytes in use
    for index in sorted(sizes, key=lambda index: -sizes[index]):
        for number, (used, indices) in enumerate(blocks):
            if used + sizes[index] <= max(BLOCK_BYTES, _power_of_two(sizes[indices[0]])):
                blocks[number] = (used + sizes[index], [*indices, index])
                break
        else:
            blocks.append((sizes[index], [index]))
    return [(_power_of_two(used), indices) for used, indices in blocks]


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


class OwnRowsSavePlanner(DefaultSavePlanner):
    """Plans to write a state that is taken when the planner is made.

    Args:
        state: Nested dicts of tensors and plain values, with the same names on all ranks.
        buffers: Host memory to copy to; None writes the tensors themselves, which must not change meanwhile.

    Attributes:
        has_copies: Whether all tensors to write are copies in host memory.
    """

    def __init__(self, state: dict[str, Any], *, buffers: HostBuffers | None) -> None:
        super().__init__(dedup_save_to_lowest_rank=True)  # buffers of one rank, which belong together
        super().set_up_planner(state)
        sharded = {name: value for name, value in self.state_dict.items() if isinstance(value, DTensor)}
        self.state_dict = {name: value for name, value in self.state_dict.items() if name not in sharded}
        self.has_copies = buffers is not None
        self._items: list[WriteItem] = []
        own: dict[MetadataIndex, Tensor] = {}
        for name, shard in divide(sharded).items():
            for rows in shard.own():
                index = MetadataIndex(name, rows.offsets)
                own[index] = rows.values
                facts = TensorWriteData(
                    rows.chunk, TensorProperties.create_from_tensor(rows.values), shard.unsharded_size
                )
                self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=facts))
        self._values: Mapping[MetadataIndex, Tensor] = own if buffers is None else buffers.copy(own)
        if buffers is not None:
            self.state_dict = {name: _copied(value) for name, value in self.state_dict.items()}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Prepare to plan.

        Args:
            state_dict: Ignored; the state was taken when the planner was made.
            storage_meta: Ignored.
            is_coordinator: Whether this rank coordinates.
        """
        self.is_coordinator = is_coordinator

    @property
    def own_bytes(self) -> int:
        """Bytes of this rank's rows."""
        return sum(values.nbytes for values in self._values.values())

    def create_local_plan(self) -> SavePlan:
        """Plan to write this rank's rows, and unsharded values, which torch lets rank 0 write."""
        plan = create_default_local_save_plan(self.state_dict, self.is_coordinator)
        self.plan = replace(plan, items=[*plan.items, *self._items], planner_data=self.mappings)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The value to write for the entry ``index``: [rows, ...] of a shard, or an unsharded value."""
        own = self._values.get(index)
        return super().lookup_object(index) if own is None else own


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
