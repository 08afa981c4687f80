"""The load planner that DCP is given: what each rank reads."""

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
    """Loads what the state asks for and the checkpoint has; what it lacks keeps its value.

    Of sharded tensors each rank asks for its own rows only; :meth:`exchange` brings the rest.

    Args:
        weights_only: Whether values that are no tensors may be plain data only.
    """

    def __init__(self, *, weights_only: bool) -> None:
        super().__init__(allow_partial_load=True)
        self._weights_only = weights_only

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the state to load into."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None
        sharded = {name: value for name, value in self.state_dict.items() if isinstance(value, DTensor)}
        self.state_dict = {name: value for name, value in self.state_dict.items() if name not in sharded}
        self._shards = divide({name: sharded[name] for name in sharded.keys() & metadata.state_dict_metadata.keys()})
        self._rows = {
            MetadataIndex(name, rows.offsets): rows for name, shard in self._shards.items() for rows in shard.own()
        }

    def create_local_plan(self) -> LoadPlan:
        """This rank's rows of what is sharded, and all of what is not."""
        assert self.metadata is not None
        plan = create_default_local_load_plan(self.state_dict, self.metadata, strict=False)
        for name, shard in self._shards.items():
            chunks = [rows.chunk for rows in shard.own()]
            plan.items.extend(
                create_read_items_for_chunk_list(name, self.metadata.state_dict_metadata[name], chunks)  # type: ignore[arg-type]
            )
        return plan

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Where to read to."""
        own = self._rows.get(index)
        return super().lookup_tensor(index) if own is None else own.values

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value that is no tensor into its place.

        Raises:
            UnsafeCheckpointError: If it is more than plain data and that was asked for.
        """
        if self._weights_only:
            load_value(value, name=read_item.dest_index.fqn, weights_only=True)
            value.seek(0)
        super().load_bytes(read_item, value)

    def exchange(self) -> None:
        """After reading: get from the other replicas what they have read; every rank calls it."""
        for shard in self._shards.values():
            shard.exchange()
