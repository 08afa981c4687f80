"""The load planner for ``torch.distributed.checkpoint``: which bytes each rank reads."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from lightning_mics.checkpoint.dcp.rows import divide
from lightning_mics.checkpoint.dcp.unpickling import load_value


class SafePlanner(DefaultLoadPlanner):
    """Loads the entries of a state that the checkpoint has; the others keep their values.

    Each rank reads its own rows of sharded tensors only; :meth:`exchange` communicates them to the other replicas.

    Args:
        weights_only: Whether values other than tensors must be plain data.
    """

    def __init__(self, *, weights_only: bool) -> None:
        super().__init__(allow_partial_load=True)
        self._weights_only = weights_only

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Divide the sharded tensors of the state to load into.

        Args:
            state_dict: Nested dicts of tensors and other values, filled in place.
            metadata: Metadata of the checkpoint.
            is_coordinator: Whether this rank coordinates.
        """
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None
        sharded = {name: value for name, value in self.state_dict.items() if isinstance(value, DTensor)}
        self.state_dict = {name: value for name, value in self.state_dict.items() if name not in sharded}
        self._shards = divide({name: sharded[name] for name in sharded.keys() & metadata.state_dict_metadata.keys()})
        self._rows = {
            MetadataIndex(name, rows.offsets): rows for name, shard in self._shards.items() for rows in shard.own()
        }

    def create_local_plan(self) -> LoadPlan:
        """Plan to read this rank's rows of sharded tensors, and all values that are not sharded."""
        assert self.metadata is not None
        plan = create_default_local_load_plan(self.state_dict, self.metadata, strict=False)
        for name, shard in self._shards.items():
            chunks = [rows.chunk for rows in shard.own()]
            plan.items.extend(
                create_read_items_for_chunk_list(name, self.metadata.state_dict_metadata[name], chunks)  # type: ignore[arg-type]
            )
        return plan

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The tensor to read the entry ``index`` into: [rows, ...] of a shard, or an unsharded tensor of any shape."""
        own = self._rows.get(index)
        return super().lookup_tensor(index) if own is None else own.values

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load a value that is not a tensor into the state.

        Args:
            read_item: Entry of the state.
            value: Pickled value.

        Raises:
            UnsafeCheckpointError: If it is not plain data and ``weights_only``.
        """
        if self._weights_only:
            load_value(value, name=read_item.dest_index.fqn, weights_only=True)
            value.seek(0)
        super().load_bytes(read_item, value)

    def exchange(self) -> None:
        """After reading, communicate the rows between replicas; every rank calls it."""
        begun = [work for shard in self._shards.values() for work in shard.begin_exchange()]
        for work in begun:
            work.wait()
