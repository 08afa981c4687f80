"""torch's FSDP2 as its users write it: ``fully_shard`` on each block and on the root, over all ranks or hybrid.

``full`` shards over all ranks. ``no-sync`` does too, but reduces gradients at the boundary only and holds whole,
unsharded gradients until then: another class of memory. ``no-reshard`` keeps parameters gathered from a forward to its
backward (``reshard_after_forward=False``), as FairScale's users do. ``hybrid`` shards inside a group of nodes and
all-reduces over the replicas in every micro-step; ``hybrid-deferred`` all-reduces at the boundary only. With
``-kept``, gradients wait whole for the boundary and parameters are gathered once until then: all of both on each rank.
With ``-ring``, gradients inside the group are reduced by ``RingReduceScatter``, which sends half of what gloo's own
sends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from benchmarks.comparison.bare_loop import train_in_bare_loop
from benchmarks.comparison.job import Job
from benchmarks.comparison.ring_reduce_scatter import RingReduceScatter
from benchmarks.comparison.systems import partition_nodes
from benchmarks.comparison.workload import build_model, make_optimizer

PACKAGES: tuple[str, ...] = ()


def train(setting: str | None, job: Job) -> None:
    """Train under FSDP2; see the module's docstring for the settings."""
    assert setting is not None  # every system of this module has one
    kind = setting.partition("@")[0]
    mesh = mesh_of(job, partition_nodes=partition_nodes(setting, nodes=job.nodes))
    model = shard(build_model(job.workload), mesh)
    if kind.endswith("-ring"):
        use_ring(model)
    optimizer = make_optimizer(job.workload, model.parameters(), name=job.plan.optimizer)
    job.notes.append(f"mesh {tuple(mesh.shape)} of {mesh.mesh_dim_names}; asynchronous all-gathers")
    if kind.endswith(("-kept", "-no-reshard")):
        model.set_reshard_after_forward(False)
    wait_for_boundary = {
        "no-sync": [model.set_requires_gradient_sync],
        "hybrid-deferred": [model.set_requires_all_reduce],
        "hybrid-deferred-ring": [model.set_requires_all_reduce],
        "full-kept": [model.set_requires_gradient_sync, model.set_reshard_after_backward],
        "hybrid-kept": [model.set_requires_gradient_sync, model.set_reshard_after_backward],
    }.get(kind, [])

    @contextmanager
    def micro_step(*, boundary: bool) -> Iterator[None]:
        for switch in wait_for_boundary:
            switch(boundary)
        yield

    train_in_bare_loop(job, model, optimizer, micro_step=micro_step)


def mesh_of(job: Job, *, partition_nodes: int) -> DeviceMesh:
    """FSDP2's mesh: one axis over all ranks, or replicas of partition groups; ranks in their own order."""
    partition_size = partition_nodes * job.ranks_per_node
    if partition_size == job.world_size:
        return init_device_mesh("cpu", (job.world_size,), mesh_dim_names=("shard",))
    shape = (job.world_size // partition_size, partition_size)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh) -> FSDPModule:
    """Shard each block, then what is left, as FSDP2's documentation says."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    root = fully_shard(model, mesh=mesh)
    gather_asynchronously(root)
    return root


def gather_asynchronously(root: FSDPModule) -> None:
    """Let the next unit's all-gather run beside computation.

    On CUDA, streams do that. On a CPU, FSDP2 waits for each all-gather where it starts unless it is told otherwise.
    """
    root._set_unshard_async_op(True)


def use_ring(root: FSDPModule) -> None:
    """Reduce gradients round a ring inside each partition group."""
    ring = RingReduceScatter()
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(ring)
