"""The collectives that operations run, real or rehearsed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_mics._torch.collective_operations import CollectiveOperation, collective_of
from lightning_mics.collectives.traffic import sent_by
from lightning_mics.cost.collective import Collective
from lightning_mics.planning.rehearsal.observed import Observer
from lightning_mics.topology import Topology


class Collectives(Observer):
    """Calls ``seen`` with each collective before it runs.

    Args:
        topology: Topology of the job.
        gloo: Whether gloo runs the collectives.
        seen: Function to call with each collective and the tensors that it takes.
    """

    def __init__(self, topology: Topology, *, gloo: bool, seen: Callable[[Collective, list[Tensor]], None]) -> None:
        self._topology = topology
        self._gloo = gloo
        self._seen = seen

    @override
    def before(self, operation: Any, args: tuple[Any, ...]) -> None:
        """Record ``operation`` if it is a collective."""
        collective = collective_of(operation, args)
        if collective is not None:
            self._seen(self._collective(collective), collective.tensors)

    @override
    def after(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Do nothing: the collective was recorded before it ran."""

    def _collective(self, found: CollectiveOperation) -> Collective:
        ranks = dist.get_process_group_ranks(found.group)
        nodes = [self._topology.node_of(rank) for rank in ranks]
        return Collective(
            kind=found.kind,
            group=str(found.group.group_desc).removeprefix("mics "),
            ranks=len(ranks),
            nodes=len(set(nodes)),
            dtype=found.dtype,
            elements=found.elements,
            sent=sent_by(
                found.kind,
                found.elements * found.dtype.itemsize,
                nodes=nodes,
                position=found.group.rank(),
                gloo=self._gloo,
                sizes_bytes=[size * found.dtype.itemsize for size in found.sizes],
            ),
        )
