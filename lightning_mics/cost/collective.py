"""One collective: its kind, its group, its bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_mics.collectives.traffic import Kind, Sent


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective, as one of its ranks sees it.

    Attributes:
        kind: Kind of the collective.
        group: Name of this rank's group: "partition", "replication", "rail", "node", or the description of another one.
        ranks: Number of ranks in the group.
        nodes: Number of nodes that the group spans.
        dtype: Dtype of messages.
        elements: Number of elements that are gathered, reduced or exchanged, over all ranks.
        sent: Bytes that this rank sends.
    """

    kind: Kind
    group: str
    ranks: int
    nodes: int
    dtype: torch.dtype
    elements: int
    sent: Sent

    @property
    def total_bytes(self) -> int:
        """Bytes that are gathered, reduced or exchanged, over all ranks."""
        return self.elements * self.dtype.itemsize
