"""The collectives that operations run, real or rehearsed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_mics._torch.fake import group_of, tree_leaves
from lightning_mics.collectives.traffic import Kind, sent_by
from lightning_mics.cost.collective import KINDS, Collective
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
        if operation.namespace not in ("c10d", "_c10d_functional"):
            return
        kind = KINDS.get(operation._schema.name.partition("::")[2])
        group = group_of(operation, args) if kind else None
        if kind is not None and group is not None and group.size() > 1:
            tensors = [tensor for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
            self._seen(self._collective(kind, group, tensors), tensors)

    @override
    def after(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Do nothing: the collective was recorded before it ran."""

    def _collective(self, kind: Kind, group: dist.ProcessGroup, tensors: list[Tensor]) -> Collective:
        ranks = dist.get_process_group_ranks(group)
        nodes = [self._topology.node_of(rank) for rank in ranks]
        elements = sum(tensor.numel() for tensor in tensors) if kind == "all_reduce" else _largest_elements(tensors)
        dtype = tensors[0].dtype
        return Collective(
            kind=kind,
            group=str(group.group_desc).removeprefix("mics "),
            ranks=len(ranks),
            nodes=len(set(nodes)),
            dtype=dtype,
            elements=elements,
            sent=sent_by(kind, elements * dtype.itemsize, nodes=nodes, position=group.rank(), gloo=self._gloo),
        )


def _largest_elements(tensors: list[Tensor]) -> int:
    """Number of elements of the larger one of input and output."""
    return max(tensor.numel() for tensor in tensors)
