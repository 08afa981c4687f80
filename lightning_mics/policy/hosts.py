"""The nodes that a job is cut into, compared with the hosts that its ranks run on.

A node is ``ranks_per_node`` consecutive ranks. Launchers may deal out ranks otherwise, as SLURM does with
``--distribution=cyclic``. Nothing would fail then: what is meant to stay inside a node would cross the network, several
times slower, and all counts of traffic would be wrong.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from lightning_mics.collectives.agreement import on_all_ranks
from lightning_mics.collectives.control_plane import ControlPlane

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # differs between machines that have one name


def check_hosts(ranks_per_node: int, control: ControlPlane) -> None:
    """Check that the ranks of each node share a host; every rank calls it.

    Args:
        ranks_per_node: Number of ranks that count as one node.
        control: Control plane of all ranks.

    Raises:
        ValueError: On all ranks, if they do not.
    """
    if control.group is None:  # a rehearsal
        return
    hosts = on_all_ranks(_this_host)  # [ranks]
    for first in range(0, len(hosts), ranks_per_node):
        of_node = hosts[first : first + ranks_per_node]
        if len(set(of_node)) > 1:
            places = ", ".join(f"rank {first + local} on {name}" for local, (name, _) in enumerate(of_node))
            raise ValueError(
                f"ranks {first} to {first + len(of_node) - 1} count as one node, because the launcher says that each "
                f"node has {ranks_per_node} ranks, but they run on several hosts ({places}). Start ranks node by node "
                "(with SLURM: --distribution=block), or pass ranks_per_node=, which is not compared with hosts"
            )


def _this_host() -> tuple[str, str]:
    """Name of this rank's host, and what tells it from others of that name; hosts are the same to NCCL if these are."""
    name, boot_id = os.environ.get("NCCL_HOSTID"), ""
    if name is None:
        with suppress(OSError):
            boot_id = BOOT_ID.read_text().strip()
    return name or socket.gethostname(), boot_id
