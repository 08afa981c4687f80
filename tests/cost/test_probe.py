"""The probe measures the links of running ranks, and leaves no groups behind."""

from __future__ import annotations

import math
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist

from lightning_mics._torch.process_groups import groups_made
from lightning_mics.collectives.control_plane import control_plane
from lightning_mics.cost import probe
from lightning_mics.cost.probe import measure_links
from lightning_mics.techniques.partition_groups import create_partition_groups
from lightning_mics.topology import Topology

CPU = torch.device("cpu")


def _measured() -> dict[str, Any]:
    control = control_plane()
    before = groups_made()
    links = {k: measure_links(control, ranks_per_node=k, device=CPU) for k in (1, 2)}
    after = groups_made()
    measure_links.cache_clear()  # the same groups once more
    again = measure_links(control, ranks_per_node=2, device=CPU)
    groups = create_partition_groups(
        Topology(world_size=4, ranks_per_node=1, partition_size=4), device_type="cpu"
    )  # of the same ranks as a rail of the probe
    total = torch.ones(1)
    dist.all_reduce(total, group=groups.partition)
    return {"links": links, "groups": (before, after), "again": again, "total": total.item()}


def test_ranks_measure_the_same_links_and_can_make_groups_afterwards(run_shared: Any) -> None:
    found = run_shared(4, _measured)
    assert all(each["links"] == found[0]["links"] for each in found)
    for k, links in found[0]["links"].items():
        assert links.gpus_per_node == k and links.network_achieved == 1
        assert all(math.isfinite(value) and value > 0 for value in astuple(links))
        assert links.network_rate_gbits_per_s > 0.1  # inside one machine
    for each in found:
        assert each["groups"][0] == each["groups"][1] and each["total"] == 4
        assert each["again"] == found[0]["again"]


def test_rates_and_latencies_follow_from_small_and_large_messages(monkeypatch: Any) -> None:
    """Of 4 nodes with 2 ranks: a rail sends 3/4 of what it gathers, over 3 hops."""
    seconds = {size: 30e-6 + 0.75 * size / 5e9 for size in probe.SIZES}
    monkeypatch.setattr(probe, "_seconds", lambda group, size, **_: seconds[size])
    monkeypatch.setattr(probe, "new_group", lambda ranks, **_: ranks)
    destroyed: list[Any] = []
    monkeypatch.setattr(dist, "destroy_process_group", destroyed.append)
    ring = probe._measure((0, 2, 4, 6), key="", control=None, device=CPU, timeout=None)  # type: ignore[arg-type]
    assert math.isclose(ring.bytes_per_s, 5e9, rel_tol=1e-6) and math.isclose(ring.latency_us, 10, rel_tol=1e-3)
    assert destroyed == [(0, 2, 4, 6)]
