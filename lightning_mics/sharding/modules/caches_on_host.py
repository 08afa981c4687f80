"""Host memory that caches and sums of nodes take where they wait there, and whether it is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_mics._torch.host_memory import USABLE_SHARE, HostMemoryError, host_memory_bytes
from lightning_mics.collectives.control_plane import ControlPlane
from lightning_mics.sharding.blocks import group_modules
from lightning_mics.sharding.options import CommunicationOptions
from lightning_mics.techniques.sharded_dim import padded_numel
from lightning_mics.topology import Topology


def bytes_on_host(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    topology: Topology,
    *,
    communication: CommunicationOptions,
    dtypes: MixedPrecisionPolicy,
) -> int:
    """Bytes of host memory of each rank for what ``cache_offload`` moves there; 0 without it.

    Args:
        model: The model, not sharded yet.
        blocks: Blocks of the model by fully qualified name, the last one first.
        topology: Topology of the job.
        communication: Options of communication, without "auto".
        dtypes: FSDP2's policy: dtypes of unsharded parameters and of gradient reductions.
    """
    if not communication.cache_offload:
        return 0
    units = [
        {p for each in group_modules(unit, set(blocks.values())) for p in each.parameters(recurse=False)}
        for unit in (model, *reversed(list(blocks.values())))
    ]
    sizes = [(sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)) for own in units]
    found = 0
    for own, options in zip(units, communication.by_unit(sizes=sizes), strict=True):
        if options.cache_parameters == "node":
            found += _bytes(own, topology, dtypes.param_dtype)
        if options.accumulate_gradients == "node":
            found += _bytes((p for p in own if p.requires_grad), topology, dtypes.reduce_dtype)
    return found


def _bytes(parameters: Iterable[nn.Parameter], topology: Topology, dtype: torch.dtype | None) -> int:
    """Bytes of the slice that a rank holds of parameters in a dtype; None is their own."""
    ranks, local = topology.partition_size, topology.local_ranks_per_partition_group
    return sum(padded_numel(p.shape, ranks) * (dtype or p.dtype).itemsize // local for p in parameters)


def smallest_host_bytes(control: ControlPlane) -> int | None:
    """Memory of the smallest host in bytes, the same on all ranks; None in a rehearsal. Every rank calls it.

    Args:
        control: Control plane of all ranks.
    """
    if control.group is None:
        return None
    return -int(control.largest(torch.tensor(-host_memory_bytes()), "compares the memory of hosts"))


def check_caches_fit(rank_bytes: int, *, states_bytes: int = 0, host_bytes: int, processes: int) -> None:
    """Check that caches and sums of the ranks of a host fit its memory, beside the model states there.

    Args:
        rank_bytes: Caches and sums of one rank in host memory, in bytes.
        states_bytes: Model states of one rank in host memory, in bytes.
        host_bytes: Memory of the smallest host, in bytes.
        processes: Number of ranks on each host.

    Raises:
        HostMemoryError: If they do not.
    """
    needed, usable = processes * (rank_bytes + states_bytes), int(USABLE_SHARE * host_bytes)
    if rank_bytes and needed > usable:
        beside = f" and model states {_gib(processes * states_bytes)}" if states_bytes else ""
        raise HostMemoryError(
            f"cache_offload=True: caches and sums of {processes} ranks take {_gib(processes * rank_bytes)} of host "
            f"memory{beside}, more than {_gib(usable)}, {USABLE_SHARE:.0%} of what the smallest host has; set "
            'cache_parameters and accumulate_gradients to a share of the blocks, such as 0.5, or to "never" and '
            '"shard", or leave cache_offload out'
        )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.3g} GiB"
