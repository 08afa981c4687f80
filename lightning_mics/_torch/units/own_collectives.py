"""FSDP2's options of its own collectives, where other objects stand in their place: served, or rejected by name.

FSDP2 replaces its objects by others for symmetric memory and for memory of the process group, and hands over another
group for reductions that are to run beside gathers.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from lightning_mics._torch.fsdp import AllGather, ReduceScatter, _param_groups

# methods of a parameter group that choose FSDP2's objects, and the options of a module that call them
CHOOSES_OBJECTS = {
    "set_symm_mem": "set_symm_mem_for_comm",
    "set_allocate_memory_from_process_group": "set_allocate_memory_from_process_group_for_comm",
}


class _OwnMemory:
    own: Any

    def allocate(self, size: Any, *, dtype: Any, device: Any) -> Any:
        """Memory as FSDP2's own object takes it: [size].

        Args:
            size: Numbers of elements, one per dim.
            dtype: Dtype of the elements.
            device: The device of this rank.
        """
        return self.own.allocate(size, dtype=dtype, device=device)


class OwnAllGather(_OwnMemory, AllGather):
    """Base class of all-gathers around FSDP2's own."""

    def __init__(self) -> None:
        self.own = DefaultAllGather()


class OwnReduceScatter(_OwnMemory, ReduceScatter):
    """Base class of reduce-scatters around FSDP2's own."""

    def __init__(self) -> None:
        self.own = DefaultReduceScatter()


def serve_options(module: FSDPModule, gather: OwnAllGather, reduce: OwnReduceScatter) -> None:
    """Have FSDP2's options of ``module`` itself choose the objects inside ``gather`` and ``reduce``.

    Args:
        module: FSDP module.
        gather: All-gather of the module.
        reduce: Reduce-scatter of the module.
    """
    for group in _param_groups(module):
        for method in CHOOSES_OBJECTS.keys() & set(dir(group)):
            setattr(group, method, _inside(group, method, gather, reduce))


def _inside(group: FSDPParamGroup, method: str, gather: OwnAllGather, reduce: OwnReduceScatter) -> Any:
    def choose(*args: Any) -> None:
        around = group._all_gather_comm, group._reduce_scatter_comm
        group._all_gather_comm, group._reduce_scatter_comm = gather.own, reduce.own
        try:
            getattr(type(group), method)(group, *args)
            gather.own, reduce.own = group._all_gather_comm, group._reduce_scatter_comm
        finally:
            group._all_gather_comm, group._reduce_scatter_comm = around

    return choose


def reject_options(module: FSDPModule) -> None:
    """Have FSDP2's options of its own collectives raise for ``module`` itself, which has others."""
    options = {**CHOOSES_OBJECTS, "_set_separate_reduce_scatter_group": "set_separate_reduce_scatter_group"}
    for group in _param_groups(module):
        for method, option in options.items():
            setattr(group, method, _rejection(option))


def _rejection(option: str) -> Any:
    def reject(enable: Any = True, *_: Any) -> None:
        if not enable:  # as it is
            return
        raise RuntimeError(
            f"{option} is for FSDP2's own collectives, and those of this model run in two stages, along rails and "
            "inside nodes, or from caches on nodes; shard it with hierarchical=False and without caches on nodes, or "
            "with a partition_size that stays inside one node"
        )

    return reject
