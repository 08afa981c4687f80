"""Every collective that a piece of code runs, real or rehearsed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_mics._torch.fake import group_of, tree_leaves
from lightning_mics.collectives.traffic import Kind, sent_by
from lightning_mics.cost.collective import KINDS, Collective
from lightning_mics.topology import Topology


class Collectives:
    """Calls ``seen`` with each collective before it runs; to be told of operations by
    :class:`~lightning_mics.planning.rehearsal.observed.Observed`.

    Args:
        topology: Where every rank is.
        gloo: Whether gloo runs them.
        seen: What to do with each, and with the tensors that it takes.
    """

    def __init__(self, topology: Topology, *, gloo: bool, seen: Callable[[Collective, list[Tensor]], None]) -> None:
        self._topology = topology
        self._gloo = gloo
        self._seen = seen

    def before(self, operation: Any, args: tuple[Any, ...]) -> None:
        """Note ``operation`` if it is a collective."""
        if operation.namespace not in ("c10d", "_c10d_functional"):
            return
        kind = KINDS.get(operation._schema.name.partition("::")[2])
        group = group_of(operation, args) if kind else None
        if kind is not None and group is not None and group.size() > 1:
            tensors = [tensor for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
            self._seen(self._collective(kind, group, tensors), tensors)

    def after(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """All is noted already."""

    def _collective(self, kind: Kind, group: dist.ProcessGroup, tensors: list[Tensor]) -> Collective:
        ranks = dist.get_process_group_ranks(group)
        nodes = [self._topology.node_of(rank) for rank in ranks]
        elements = sum(tensor.numel() for tensor in tensors) if kind == "all_reduce" else _whole(tensors)
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


def _whole(tensors: list[Tensor]) -> int:
    """Of input and output the larger one."""
    return max(tensor.numel() for tensor in tensors)
