"""One collective: its kind, its group, its bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_mics.collectives.traffic import Kind, Sent

KINDS: dict[str, Kind] = {  # by the name of torch's operation
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "alltoall_base_": "all_to_all",
}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective, as one of its ranks sees it.

    Attributes:
        kind: What it does.
        group: Which of this rank's groups: "partition", "replication", "rail", "node", or another's description.
        ranks: In the group.
        nodes: That the group spans.
        dtype: On the wire.
        elements: Of what is gathered, reduced or exchanged, all ranks together.
        sent: By this rank.
    """

    kind: Kind
    group: str
    ranks: int
    nodes: int
    dtype: torch.dtype
    elements: int
    sent: Sent

    @property
    def whole_bytes(self) -> int:
        """Bytes of what is gathered, reduced or exchanged."""
        return self.elements * self.dtype.itemsize
