"""The ranking on the emulated cluster: its bytes, what it times, and how it judges."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from benchmarks.comparison.workload import build_model
from benchmarks.ranking.bytes import predicted_link_bytes, rehearsed_peak_bytes
from benchmarks.ranking.cells import MICRO_BATCHES, MODEL, RANKS, SAMPLES, Way, batch_of, cells_of, loss_of, workload
from benchmarks.ranking.page import judged, kendall_tau, write_page
from lightning_mics.cost.hardware import Hardware
from lightning_mics.planning.rehearsal.rehearse import rehearse
from lightning_mics.topology import Topology

HARDWARE = Hardware(
    gpu="CPU process",
    gpus_per_node=4,
    memory_gib=2,
    peak_tflops=1,
    kernel_share=1,
    in_node_rate_gbytes_per_s=0.3,
    in_node_latency_us=900,
    network_rate_gbits_per_s=0.1,
    network_achieved=1,
    network_latency_us=900,
    host_memory_gib=2,
    host_rate_gbytes_per_s=1,
)
COMPUTE = {1: 0.06, 4: 0.08, 16: 0.16}
WAYS = [
    Way(8, False, "never", "shard", 4),
    Way(8, True, 0.25, 0.5, 4),
    Way(8, True, "node", "node", 16),
    Way(4, False, "rank", "shard", 4),
    Way(2, False, "never", "rank", 4),
]


@pytest.mark.parametrize("ranks_per_node", [4, 2])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_bytes_of_a_link_are_those_of_a_rehearsal_on_gloo(way: Way, ranks_per_node: int) -> None:
    topology = Topology(world_size=RANKS, ranks_per_node=ranks_per_node, partition_size=way.partition_size)
    sent = 0.0
    for rank in range(ranks_per_node):  # of the first node
        rehearsed = rehearse(
            lambda: build_model(MODEL),
            batch_of(way.micro_batch, rank=0, index=0),
            loss=loss_of,
            topology=topology,
            rank=rank,
            micro_steps=SAMPLES // way.micro_batch,
            backend="gloo",
            communication=way.communication,
        )
        sent += sum(ran.collective.sent.between_bytes * ran.times for ran in rehearsed.ran)
    assert predicted_link_bytes(way, ranks_per_node=ranks_per_node) == sent > 0


def test_less_memory_forces_another_choice() -> None:
    tight, middle, ample = cells_of(workload(), HARDWARE, COMPUTE, [0.05, 0.5, 0.95])
    assert [cell.chosen.micro_batch for cell in (tight, middle, ample)] == list(MICRO_BATCHES)
    assert any(isinstance(way.cache_parameters, float) for way in tight.timed)  # of some blocks
    for cell in (tight, middle, ample):
        assert cell.timed[cell.chosen] < cell.timed[cell.flat]
        assert cell.timed[cell.chosen] <= 1.01 * min(cell.timed.values())
    assert tight.fitting < middle.fitting < ample.fitting


def test_order_counts_where_predictions_are_apart() -> None:
    assert kendall_tau([(1, 10), (2, 20), (3, 30)]) == 1
    assert kendall_tau([(1, 30), (2, 20), (3, 10)]) == -1
    assert kendall_tau([(1, 20), (1.05, 10), (2, 30)]) == 1  # the first two are equal
    assert kendall_tau([(1, 20), (2, 10), (4, 30)]) == pytest.approx(1 / 3)


def cell(**changes) -> dict:
    ways = {"chosen": asdict(WAYS[2]), "flat": asdict(WAYS[0])}
    timed = [
        {"way": ways["chosen"], "predicted": 1.0, "seconds": [1.0, 1.1, 1.2]},
        {"way": ways["flat"], "predicted": 3.0, "seconds": [3.0, 3.3, 3.6]},
        {"way": asdict(WAYS[1]), "predicted": 1.5, "seconds": [0.9, 1.0, 5.0]},
    ]
    pairs = [[1.0, 3.0], [1.0, 2.0]] * 10
    return {"capacity_bytes": 10**7, "fitting": 9, **ways, "timed": timed, "pairs": pairs, **changes}


def test_a_choice_is_judged_by_the_least_median_and_by_pairs() -> None:
    found = judged({"shape": "2x4", "rate": "1gbit"}, cell())
    assert found["regret"] == pytest.approx(0.1) and found["best"] == asdict(WAYS[1])
    mean, low, high = found["over_flat"]
    assert mean == pytest.approx(6**-0.5) and low < mean < high < 0.5
    assert found["tau"] == pytest.approx(1 / 3)
    same = judged({"shape": "2x4", "rate": "1gbit"}, cell(flat=asdict(WAYS[2]), pairs=[]))
    assert same["over_flat"] == [1.0, 1.0, 1.0]


def test_ways_that_run_the_same_program_are_one() -> None:
    again = asdict(replace(WAYS[2], accumulate_gradients="shard"))  # sums of one micro-step are nowhere
    timed = [*cell()["timed"], {"way": again, "predicted": 1.0, "seconds": [0.2, 0.8, 0.9]}]
    found = judged({"shape": "2x4", "rate": "1gbit"}, cell(timed=timed))
    assert found["timed"] == 3 and found["seconds"] == pytest.approx(0.95)  # the median of six
    assert found["regret"] == 0
    several = [{**each, "way": each["way"] | {"micro_batch": 4}} for each in timed]  # their sums are somewhere
    chosen = asdict(replace(WAYS[2], micro_batch=4))
    found = judged({"shape": "2x4", "rate": "1gbit"}, cell(timed=several, chosen=chosen))
    assert found["timed"] == 4 and found["seconds"] == 1.1


def test_the_page_has_all_cells_and_the_bytes_of_shares(tmp_path) -> None:
    link = [
        {"shape": "2x4", "way": asdict(way), "bytes": 1.01 * predicted_link_bytes(way, ranks_per_node=4)}
        for way in WAYS
    ]
    write_page(tmp_path, [{"shape": "2x4", "rate": "1gbit", "cells": [cell()]}], link, "the command")
    page = (tmp_path / "README.md").read_text()
    peak_bytes = rehearsed_peak_bytes(WAYS[2], ranks_per_node=4)
    assert peak_bytes > 10**7 and "takes no more than the pretended memory, as rehearsed, in\n0." in page
    assert (
        f"| 2x4 | 1gbit | 10.0 | {peak_bytes / 1e6:.1f} | 9 | 8 in stages, 16 samples, node, node | 1.00 | 1.10 | 10% |"
        in page
    )
    assert "8 in stages, 4 samples, 25%, 50%" in page and "+1.00%" in page and "8 flat, 4 samples" not in page
