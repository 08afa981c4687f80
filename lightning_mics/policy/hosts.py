"""The nodes that a job is cut into, compared with the hosts that its ranks run on.

A node is ``ranks_per_node`` consecutive ranks. Launchers may deal out ranks otherwise, as SLURM does with
``--distribution=cyclic``. Nothing would fail then: what is meant to stay inside a node would cross the network, several
times slower, and all counts of traffic would be wrong.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lightning_mics.collectives.agreement import on_all_ranks
from lightning_mics.collectives.control_plane import ControlPlane

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # differs between machines that have one name


Host = tuple[str, str]  # its name, and what tells it from others of that name


def hosts_of_ranks(control: ControlPlane) -> list[Host]:
    """The host of each rank, [ranks]; none in a rehearsal. Every rank calls it.

    Args:
        control: Control plane of all ranks.
    """
    return [] if control.group is None else on_all_ranks(_this_host)


def check_hosts(hosts: Sequence[Host], ranks_per_node: int) -> None:
    """Check that the ranks of each node share a host.

    Args:
        hosts: Host of each rank, from :func:`hosts_of_ranks`.
        ranks_per_node: Number of ranks that count as one node.

    Raises:
        ValueError: On all ranks, if they do not.
    """
    for first in range(0, len(hosts), ranks_per_node):
        of_node = hosts[first : first + ranks_per_node]
        if len(set(of_node)) > 1:
            places = ", ".join(f"rank {first + local} on {name}" for local, (name, _) in enumerate(of_node))
            raise ValueError(
                f"ranks {first} to {first + len(of_node) - 1} count as one node, because the launcher says that each "
                f"node has {ranks_per_node} ranks, but they run on several hosts ({places}). Start ranks node by node "
                "(with SLURM: --distribution=block), or pass ranks_per_node=, which is not compared with hosts"
            )


def _this_host() -> Host:
    """This rank's host; hosts are the same to NCCL if these values are."""
    name, boot_id = os.environ.get("NCCL_HOSTID"), ""
    if name is None:
        with suppress(OSError):
            boot_id = BOOT_ID.read_text().strip()
    return name or socket.gethostname(), boot_id
