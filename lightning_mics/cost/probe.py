"""The rates and latencies of links, measured on the job's own ranks in about a second, before its model is sharded.

All rails gather at once, as in training, where the ranks of a node share its network; then all nodes gather inside.
Small messages show the latency, large ones the rate: messages grow until one takes long enough to tell. What is slowest
counts: the largest time over all ranks, so that all ranks get the same numbers, in the best of a few runs.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial

import torch
import torch.distributed as dist

from lightning_mics._torch.process_groups import all_gather_single, new_group
from lightning_mics.collectives.agreement import on_rank_0
from lightning_mics.collectives.control_plane import ControlPlane
from lightning_mics.collectives.traffic import sent_by
from lightning_mics.cost.hardware import Links
from lightning_mics.techniques.partition_groups import check_same_count_of_groups
from lightning_mics.topology import Topology

SIZES = tuple(4**power for power in range(8, 15))  # bytes that are gathered, 64 KiB to 256 MiB, until one takes
LONG_ENOUGH = 0.03  # seconds
RUNS = 3  # of each size
LEAST_LATENCY_US = 0.1


@lru_cache(maxsize=1)  # links stay what they are
def measure_links(
    control: ControlPlane,
    *,
    ranks_per_node: int,
    device: torch.device,
    timeout: timedelta | None = None,
    rail_max_ctas: int | None = None,
) -> Links:
    """Measure the links of the running job, once; every rank calls it.

    Args:
        control: Control plane of all ranks.
        ranks_per_node: Ranks on each node.
        device: Device of this rank.
        timeout: Longest time of a collective; None is the backend's default.
        rail_max_ctas: Largest number of blocks of threads of a collective along rails, on NCCL; None is NCCL's default.

    Raises:
        RuntimeError: If ranks are members of different numbers of process groups.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    topology = Topology(world_size=world_size, ranks_per_node=ranks_per_node, partition_size=world_size)
    check_same_count_of_groups(control)
    measure = partial(_measure, control=control, device=device, timeout=timeout)
    with control.together("measures the links between nodes"):
        key = on_rank_0(lambda: secrets.token_hex(8), group=control.group)
        rails = measure(topology.rail(rank), key=f"{key} of rails", max_ctas=rail_max_ctas)
        nodes = rails if ranks_per_node == 1 else measure(topology.node_group(rank), key=f"{key} of nodes")
    network_bytes_per_s = ranks_per_node * rails.bytes_per_s
    return Links(
        gpus_per_node=ranks_per_node,
        in_node_rate_gbytes_per_s=nodes.bytes_per_s / 1e9,
        network_rate_gbits_per_s=network_bytes_per_s * 8e-9,
        network_achieved=1.0,  # that is what collectives reach
        network_latency_us=rails.latency_us,
        in_node_latency_us=nodes.latency_us,
    )


@dataclass(frozen=True)
class _Ring:
    bytes_per_s: float  # that leave a rank
    latency_us: float  # of a hop


def _measure(
    ranks: Sequence[int],
    *,
    key: str,
    control: ControlPlane,
    device: torch.device,
    timeout: timedelta | None,
    max_ctas: int | None = None,
) -> _Ring:
    """Gather in groups of ``ranks``, all groups of the job at once, and destroy them again."""
    group = new_group(
        tuple(ranks), name="probe", timeout=timeout, max_ctas=max_ctas, key=f"mics probe {key} from rank {min(ranks)}"
    )
    seconds: dict[int, float] = {}
    for size in SIZES:
        seconds[size] = _seconds(group, size, control=control, device=device, warm_up=not seconds)
        if len(seconds) > 1 and seconds[size] > LONG_ENOUGH:
            break
    dist.destroy_process_group(group)  # all ranks have compared the last times
    sent = {size: sent_by("all_gather", size, nodes=range(len(ranks)), position=0).between_bytes for size in seconds}
    small, large = min(seconds), max(seconds)
    bytes_per_s = (sent[large] - sent[small]) / max(1e-9, seconds[large] - seconds[small])
    latency_us = 1e6 * (seconds[small] - sent[small] / bytes_per_s) / (len(ranks) - 1)
    return _Ring(bytes_per_s, max(LEAST_LATENCY_US, latency_us))


def _seconds(
    group: dist.ProcessGroup, size: int, *, control: ControlPlane, device: torch.device, warm_up: bool
) -> float:
    """Seconds of gathering ``size`` bytes: the slowest rank's, in its best run."""
    own = torch.zeros(-(-size // group.size()), dtype=torch.uint8, device=device)  # [bytes]
    gathered = torch.empty(own.numel() * group.size(), dtype=torch.uint8, device=device)  # [bytes]
    if warm_up:  # ranks connect
        all_gather_single(gathered, own, group=group)
    _wait_for(device)
    control.largest(torch.zeros(1), "waits for all ranks to measure links")
    taken = []
    for _ in range(RUNS):
        start = time.perf_counter()
        all_gather_single(gathered, own, group=group)
        _wait_for(device)
        taken.append(time.perf_counter() - start)
    return float(control.largest(torch.tensor(taken, dtype=torch.float64), "compares its times").min())


def _wait_for(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
