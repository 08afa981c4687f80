"""Process groups and their collectives: private names of torch, and what differs between its versions."""

from __future__ import annotations

import atexit
import inspect
import re
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.tensor.debug
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

KEEPS_ORDER = "sort_ranks" in inspect.signature(dist.new_group).parameters  # since 2.13

all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in 2.13
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def new_group(
    ranks: tuple[int, ...],
    *,
    name: str,
    timeout: timedelta | None,
    max_ctas: int | None = None,
    key: str | None = None,
    backend: str | None = None,
) -> dist.ProcessGroup:
    """Make the process group of ``ranks`` in the given order; only its members need to call.

    Args:
        ranks: Members, in the order of the group.
        name: Name of the group in torch's messages.
        timeout: Longest time of its collectives; None is the backend's default.
        max_ctas: Largest number of blocks of threads of a collective, on NCCL; None is NCCL's default.
        key: Key of the group in the job's store, the same on its members and on no other group of the job; None takes
            torch's, from the ranks and the number of groups, which a group has again that is made after this one is
            destroyed: it would read of the store what this one has left there.
        backend: Backends by device type, from :func:`backends_with_host`; None is the default process group's.
    """
    options = None if max_ctas is None else _nccl_options(max_ctas, timeout)
    description, in_order = f"mics {name}", list(ranks) == sorted(ranks)
    if key is not None or (not in_order and not KEEPS_ORDER):
        return _new_unsorted_group(
            list(ranks), description=description, timeout=timeout, options=options, key=key, backend=backend
        )
    order: dict[str, Any] = {} if in_order else {"sort_ranks": False}
    group = dist.new_group(
        list(ranks),
        timeout=timeout,
        backend=backend,
        pg_options=options,
        use_local_synchronization=True,
        group_desc=description,
        **order,
    )
    assert isinstance(group, dist.ProcessGroup)  # the caller is a member
    return group


def _nccl_options(max_ctas: int, timeout: timedelta | None) -> Any:
    options: Any = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = max_ctas
    if timeout is not None:
        options._timeout = timeout  # torch takes the one that it is given beside them, and warns if they differ
    return options


def _new_unsorted_group(
    ranks: list[int],
    *,
    description: str,
    timeout: timedelta | None,
    options: Any,
    key: str | None,
    backend: str | None = None,
) -> dist.ProcessGroup:
    """What ``new_group(ranks, sort_ranks=False)`` of torch 2.13 does; 2.11 and 2.12 always sort; none takes keys."""
    c10d: Any = dist.distributed_c10d
    default = c10d._get_default_group()
    of_default, store = c10d._world.pg_map[default]
    backend = backend or of_default
    group, _ = c10d._new_process_group_helper(
        len(ranks),
        ranks.index(default.rank()),
        ranks,
        c10d.Backend(backend),
        store,
        key or c10d._process_group_name(ranks, use_hashed_name=True),
        backend_options=options,
        timeout=timeout or c10d._get_default_timeout(c10d.Backend(backend)),
        device_id=default.bound_device_id,
        group_desc=description,
    )
    c10d._world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    assert isinstance(group, dist.ProcessGroup)
    return group


def reduce_over_all_axes_at_once(mesh: DeviceMesh) -> None:
    """Let DTensors on ``mesh`` be reduced over all its axes by one collective, in one order; every rank calls it.

    Args:
        mesh: Mesh of a sharded model.
    """
    if mesh.ndim > 1:
        with unset_fake_temporarily():  # a mesh has values in rehearsals, too
            mesh._flatten()


def groups_made() -> int:
    """Number of process groups that this rank has made: torch derives their names from it, on each member by itself."""
    return len(dist.distributed_c10d._world.pg_names)


def backends_of_devices() -> dict[str, str]:
    """Name of the default process group's backend for each device type, as in ``{"cpu": "gloo", "cuda": "nccl"}``."""
    entries = str(dist.get_backend_config()).split(",")  # as in "cpu:gloo,cuda:nccl"
    return dict(entry.split(":") for entry in entries)


def backends_with_host() -> str | None:
    """The default process group's backends with gloo for tensors in host memory; None if they serve it already."""
    known = backends_of_devices()
    return None if "cpu" in known else ",".join(f"{kind}:{name}" for kind, name in {"cpu": "gloo", **known}.items())


def premultiplied_sum_factor(op: dist.ReduceOp | dist.ReduceOp.RedOpType) -> float | None:
    """The factor of a pre-multiplied sum, or None for any other reduction."""
    if op != dist.ReduceOp.PREMUL_SUM:
        return None
    state: Any = op.__getstate__()  # (kind, factor); the factor has no public getter
    return float(state[1])


def was_left_waiting(error: RuntimeError) -> bool:
    """Whether a collective has failed because another rank did not take part; gloo says so in words only."""
    return isinstance(error, dist.DistError) or bool(
        re.search("Timed out waiting|[Cc]onnection (closed|reset) by peer", str(error))
    )


def let_gloo_finish(device: torch.device) -> None:
    """Have the interpreter wait a moment at its exit, on CPUs.

    Gloo's threads let go of the tensors of the last collective a moment after it. Where the interpreter is gone by
    then the process aborts (https://github.com/pytorch/pytorch/pull/179291), and a job that is done looks failed.

    Args:
        device: The device of this rank.
    """
    if device.type == "cpu":
        atexit.unregister(_wait)
        atexit.register(_wait)


def _wait() -> None:
    time.sleep(0.2)
