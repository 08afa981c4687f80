"""What each rank writes: its own rows of every sharded tensor, taken when the planner is made.

``torch.distributed.checkpoint`` asks a planner what to write and for the values. This one has an answer of its own for
sharded tensors, since torch's lets one replica write all of a shard, and can keep copies, so that training may go on
while they are written.
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

from lightning_mics.checkpoint.dcp.rows import divide


class HostBuffers:
    """Memory of the host for copies of tensors, used again from one checkpoint to the next."""

    def __init__(self) -> None:
        self._buffers: dict[MetadataIndex, Tensor] = {}

    def copy(self, index: MetadataIndex, values: Tensor) -> Tensor:
        """Begin to copy ``values``; on CUDA they are there after a synchronisation."""
        buffer = self._buffers.get(index)
        if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
            buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._buffers[index] = buffer
        return buffer.copy_(values, non_blocking=True)


class OwnRowsSavePlanner(DefaultSavePlanner):
    """Plans the writing of a state that it takes at once, and not of what it is given later.

    Args:
        state: Nested dicts of tensors and plain values, the same names on all ranks.
        buffers: Where to copy to; None writes the tensors themselves, which must not change meanwhile.
    """

    def __init__(self, state: dict[str, Any], *, buffers: HostBuffers | None) -> None:
        super().__init__()
        super().set_up_planner(state)
        sharded = {name: value for name, value in self.state_dict.items() if isinstance(value, DTensor)}
        self.state_dict = {name: value for name, value in self.state_dict.items() if name not in sharded}
        self._items: list[WriteItem] = []
        self._values: dict[MetadataIndex, Tensor] = {}
        for name, shard in divide(sharded).items():
            for rows in shard.own():
                index = MetadataIndex(name, rows.offsets)
                self._values[index] = rows.values if buffers is None else buffers.copy(index, rows.values)
                facts = TensorWriteData(rows.chunk, TensorProperties.create_from_tensor(rows.values), shard.whole_size)
                self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=facts))
        if buffers is not None:
            self.state_dict = {name: _copied(value) for name, value in self.state_dict.items()}
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """The state is there already; ``state_dict`` is not looked at."""
        self.is_coordinator = is_coordinator

    @property
    def own_bytes(self) -> int:
        """What this rank's rows weigh."""
        return sum(values.nbytes for values in self._values.values())

    def create_local_plan(self) -> SavePlan:
        """This rank's rows, and what is not sharded, which torch gives to one rank each."""
        plan = create_default_local_save_plan(self.state_dict, self.is_coordinator)
        self.plan = replace(plan, items=[*plan.items, *self._items], planner_data=self.mappings)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The value to write."""
        own = self._values.get(index)
        return super().lookup_object(index) if own is None else own


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
