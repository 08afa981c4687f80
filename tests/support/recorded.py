"""Records the collectives that a piece of code runs: which, over which ranks, how many bytes, in which dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "allreduce_": "all_reduce",
    "broadcast_": "broadcast",
    "barrier": "barrier",
    "all_gather_into_tensor": "all_gather",  # these and below: functional collectives, as DTensor uses them
    "all_reduce": "all_reduce",
    "reduce_scatter_tensor": "reduce_scatter",
}


@dataclass(frozen=True)
class Collective:
    """One collective as a rank saw it: ``nbytes`` is the larger of its buffers, that of the whole group."""

    kind: str
    ranks: tuple[int, ...]
    nbytes: int
    dtype: torch.dtype

    @property
    def received_bytes(self) -> int:
        """Bytes a rank receives when each is sent no more often than needed (a ring, for an all-reduce)."""
        others = self.nbytes * (len(self.ranks) - 1) // len(self.ranks)
        return 2 * others if self.kind == "all_reduce" else others


class RecordCollectives(TorchDispatchMode):
    """Within this context every collective is noted in ``seen``, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what is compiled is not recorded, and hiding each call from Dynamo costs as much as the call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # DTensor takes it apart first
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name in KINDS:
            self.seen.append(_described(name, args))
        return func(*args, **(kwargs or {}))

    def of(self, kind: str, ranks: tuple[int, ...] | None = None) -> list[Collective]:
        """The recorded collectives of one kind, over these ranks in this order if given."""
        return [c for c in self.seen if c.kind == kind and (ranks is None or c.ranks == ranks)]


def _described(name: str, args: Any) -> Collective:
    tensors = [t for arg in args for t in _tensors(arg)]
    group = next(g for g in (_group(arg) for arg in args) if g is not None)
    return Collective(
        kind=KINDS[name],
        ranks=tuple(dist.get_process_group_ranks(group)),
        nbytes=max((tensor.nbytes for tensor in tensors), default=0),
        dtype=tensors[0].dtype if tensors else torch.uint8,
    )


def _tensors(arg: Any) -> list[torch.Tensor]:
    if isinstance(arg, torch.Tensor):
        return [arg]
    return [t for entry in arg for t in _tensors(entry)] if isinstance(arg, list | tuple) else []


def _group(arg: Any) -> dist.ProcessGroup | None:
    if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
        return dist.ProcessGroup.unbox(arg)
    if isinstance(arg, str) and arg in _groups_by_name():
        return _groups_by_name()[arg]
    return None


def _groups_by_name() -> dict[str, dist.ProcessGroup]:
    return {group.group_name: group for group in dist.distributed_c10d._world.pg_map}
