"""The save planner for ``torch.distributed.checkpoint``: which bytes each rank writes.

torch's planner lets one replica write all of a shard; this one lets each rank write its own rows. It takes the tensors
when it is made, and can copy them, so that training may continue while they are written.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from lightning_mics._torch.streams import current_stream, has_streams
from lightning_mics.checkpoint.dcp.rows import divide


class HostBuffers:
    """Host memory for copies of tensors, reused from one checkpoint to the next; pinned for tensors on CUDA."""

    def __init__(self) -> None:
        self._buffers: dict[MetadataIndex, Tensor] = {}

    def copy(self, index: MetadataIndex, values: Tensor) -> Tensor:
        """Begin a copy; from CUDA it is complete after a synchronization.

        Args:
            index: Entry of the checkpoint, by which the buffer is found again.
            values: Tensor to copy, [any shape].

        Returns:
            The buffer, of the same shape.
        """
        buffer = self._buffers.get(index)
        if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
            buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._buffers[index] = buffer
        return buffer.copy_(values, non_blocking=True)


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
        self._values: dict[MetadataIndex, Tensor] = {}
        for name, shard in divide(sharded).items():
            for rows in shard.own():
                index = MetadataIndex(name, rows.offsets)
                self._values[index] = rows.values if buffers is None else buffers.copy(index, rows.values)
                facts = TensorWriteData(
                    rows.chunk, TensorProperties.create_from_tensor(rows.values), shard.unsharded_size
                )
                self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=facts))
        if buffers is not None:
            self.state_dict = {name: _copied(value) for name, value in self.state_dict.items()}
            for device in {shard.device for shard in sharded.values() if has_streams(shard.device)}:
                current_stream(device).synchronize()

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
