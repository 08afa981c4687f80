"""What a control plane needs of torch: the job's store, an exchange on gloo, and a way out of a blocked collective.

See [Note: Agreement without waiting].
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


def is_rehearsed() -> bool:
    """Whether the job has one process that stands for all ranks."""
    return str(dist.get_backend()) == "fake"


def job_store(group: dist.ProcessGroup) -> Any:
    """A connection of its own to the store of the default process group, with keys that no other job has used.

    The store may be older than the job: restarted ranks of ``torchrun`` find all that was written in earlier attempts.

    Args:
        group: Gloo group of all ranks, all of which call.
    """
    c10d: Any = dist.distributed_c10d
    prefix = f"lightning_mics/{exchange(group, secrets.token_bytes(16))[0].hex()}"
    store = c10d._get_default_store()
    with suppress(RuntimeError, NotImplementedError):  # a store without copies is shared: none of our calls blocks
        store = store.clone()
    return c10d.PrefixStore(prefix, store)


def gloo_group(ranks: Sequence[int], *, timeout: timedelta | None) -> dist.ProcessGroup:
    """A gloo group of ``ranks``, in ascending order, which only its members need to make.

    Args:
        ranks: Members.
        timeout: Longest time of its collectives; None is the backend's default.
    """
    group = dist.new_group(
        sorted(ranks), backend="gloo", timeout=timeout, use_local_synchronization=True, group_desc="mics control plane"
    )
    assert isinstance(group, dist.ProcessGroup)  # the caller is a member
    return group


def group_of_all(*, timeout: timedelta | None) -> dist.ProcessGroup:
    """A gloo group of all ranks, which all of them make.

    It may be made at any time: unlike those of some ranks, its name does not depend on the groups of this rank.

    Args:
        timeout: Longest time of its collectives; None is the backend's default.
    """
    ranks = list(range(dist.get_world_size()))
    group = dist.new_group(ranks, backend="gloo", timeout=timeout, group_desc="mics control plane")
    assert isinstance(group, dist.ProcessGroup)
    return group


def exchange(group: dist.ProcessGroup, record: bytes) -> list[bytes]:
    """Every rank's record, in the order of the group; it blocks, and is no operation of torch.

    Args:
        group: Gloo group.
        record: Bytes of this rank, as many on every rank.
    """
    own = torch.frombuffer(bytearray(record), dtype=torch.uint8)  # [bytes]
    gathered = torch.empty(group.size(), len(record), dtype=torch.uint8)
    backend: Any = group._get_backend(CPU)
    backend._allgather_base(gathered.view(-1), own).wait()
    return [bytes(row.tolist()) for row in gathered]


def abort_groups() -> None:
    """Make every collective that this process waits in, of any process group, raise at once.

    NCCL has an abort. Gloo's does nothing, but a receive that times out closes all connections of its group, whatever
    waits in them: https://github.com/pytorch/gloo, ``UnboundBuffer::waitRecv``. Nothing else can use the groups then.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        if group.size() == 1:
            continue
        backend: Any = group._get_backend(CPU) if "cpu" in _device_types(group) else None
        if backend is not None and backend.name() == "gloo":
            with suppress(RuntimeError):
                other = (group.rank() + 1) % group.size()
                backend.recv([torch.empty(1)], other, 0x6D696373).wait(timedelta(milliseconds=1))
        if _device_types(group) - {"cpu"}:
            with suppress(RuntimeError):
                group.abort()


def _device_types(group: Any) -> set[str]:
    return {device.type for device in group._device_types}


def has_timed_out(error: BaseException) -> bool:
    """Whether a collective over gloo has failed because a rank did not come in time."""
    return "Timed out waiting" in str(error)


def was_cut_off(error: BaseException) -> bool:
    """Whether a collective has failed because other ranks closed its connections, or did not come."""
    words = str(error)
    return isinstance(error, dist.DistError) or any(
        part in words
        for part in (
            "Application timeout caused pair closure",
            "Connection closed by peer",
            "onnection reset by peer",
            "Timed out waiting",
            "Broken pipe",
            "communicator was aborted",
        )
    )
