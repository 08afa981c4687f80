"""The planner: what it recommends, what it refuses, and that it agrees with the strategy and with rehearsals."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import train
from lightning_mics import CommunicationOptions
from lightning_mics.collectives.traffic import Sent
from lightning_mics.cost.collective import Collective
from lightning_mics.cost.nccl_tests import read_runs
from lightning_mics.cost.step_time import Arithmetic, Seconds, collective_seconds, step_seconds
from lightning_mics.cost.step_traffic import ScheduledCollective, StepTraffic, Unit, UnitTraffic
from lightning_mics.planning import Plan, Workload, find_instance, measure_workload, plan, weak_scaling, with_measured
from lightning_mics.policy.activations import Activations, Line
from lightning_mics.policy.memory import measure_model, smallest_partition_size
from lightning_mics.sharding.blocks import find_blocks
from recipes.plan.dry_run import Training
from recipes.plan.tables import low_bit_line
from tests.support.campaign import campaign
from tests.support.configs import composed
from tests.support.jobs import JOBS, SEQUENCES, measured, rehearsed

P4D = find_instance("p4d.24xlarge")


class Tower(nn.Module):
    """Any module, not one of the recipes."""

    def __init__(self, *, blocks: int = 6, width: int = 1000) -> None:
        super().__init__()
        self.inside = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.inside:
            x = torch.relu(block(x))
        return self.head(x)


def tower_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch), torch.zeros(len(batch), dtype=torch.int64))


def work(**options: Any) -> Workload:
    batch = torch.zeros(7, options.get("width", 1000))
    return measure_workload(lambda: Tower(**options), batch, samples=7, loss=tower_loss)


def planned(**options: Any) -> Plan:
    return plan(work(), P4D, **{"nodes": 4, "global_batch_size": 1024, **options})


def test_a_workload_is_what_the_module_has_and_does() -> None:
    workload = work()
    assert workload.parameters == 6 * 1_001_000 + 10_010
    assert len(workload.units) == 7 and workload.units[0].is_root
    # two operations per multiply-add, three products per matrix but for the first, which has no gradient of its input
    assert workload.model_flops == 6 * (6 * 1000**2 + 1000 * 10) - 2 * 1000**2
    assert workload.hardware_flops == workload.model_flops
    assert max(workload.activations.peaks(1).values()) >= 6 * 1000 * 4


def test_all_partition_sizes_are_ranked_and_the_fastest_is_recommended() -> None:
    plan_ = planned()
    assert {row.topology.partition_size for row in plan_.candidates} == {1, 2, 4, 8, 16, 32}
    times = [row.seconds.expected for row in plan_.candidates]
    assert times == sorted(times) and all(row.fits for row in plan_.candidates)
    assert plan_.recommended is plan_.candidates[0]
    assert plan_.recommended.seconds.expected < plan_.baseline_tuned.seconds.expected < plan_.baseline.seconds.expected
    assert all(row.batches.micro * row.batches.accumulation * 32 == 1024 for row in plan_.candidates)


def test_once_per_step_partition_groups_of_whole_nodes_send_the_same_between_them() -> None:
    """2M(N-1)/N, in the dtypes of parameters and gradients: design.md, section 5.4."""
    workload = work(width=1024)  # which all sizes divide
    states = 4 * workload.parameters
    for row in plan(workload, P4D, nodes=4, global_batch_size=1024, micro_batch=8).candidates:
        if row.topology.partition_size >= 8:  # whole nodes
            assert row.node_sent.between_bytes == pytest.approx(2 * states * 3 / 4, rel=0.02)


@pytest.mark.parametrize(("model", "partition_size"), [("10b", 8), ("15b", 16), ("20b", 16), ("50b", 64)])
def test_partition_sizes_of_berts_are_those_of_the_paper(model: str, partition_size: int) -> None:
    """MiCS, table 1: on p3dn.24xlarge with 32 GB per GPU, in float16."""
    language = train.make_model(composed(f"model=bert-{model}", "cluster=p3dn_16"))
    with torch.device("meta"):
        network = Training(language)
    size = measure_model(
        network, find_blocks(network).values(), gathered_dtype=torch.float16, reduce_dtype=torch.float16
    )
    assert (
        smallest_partition_size(
            size, world_size=128, ranks_per_node=8, capacity_bytes=find_instance("p3dn.24xlarge").memory_bytes
        )
        == partition_size
    )


@pytest.mark.rehearsal
@pytest.mark.parametrize(
    ("job", "name"),
    [
        campaign("a node a group", "gpt"),
        campaign("hierarchical", "bert"),
        ("once per step", "gpt"),
        ("recomputed", "bert"),
        ("mixed precision", "gpt"),
    ],
)
def test_memory_of_a_plan_is_a_little_more_than_what_a_rehearsal_takes(job: str, name: str) -> None:
    facts = JOBS[job]
    plan_ = plan(
        measured(name, facts),
        replace(P4D, gpus_per_node=facts.topology.ranks_per_node),
        nodes=2,
        global_batch_size=4 * 3 * SEQUENCES,
        micro_batch=SEQUENCES,
        communication=facts.communication,
    )
    (row,) = (row for row in plan_.candidates if row.topology == facts.topology)
    real = rehearsed(name, facts, backend="nccl").peak_bytes
    assert real <= row.memory_bytes <= 1.03 * real


def test_a_given_partition_size_is_planned_beside_the_recommended() -> None:
    one_hop = replace(CommunicationOptions.AUTO, two_hop=False)
    plan_ = plan(work(), P4D, nodes=4, global_batch_size=256, partition_size=8, communication=one_hop)
    assert plan_.chosen.topology.partition_size == 8 and plan_.recommended.topology.partition_size == 16
    scaling = weak_scaling(work(), P4D, nodes=[2, 4], samples_per_rank=8, partition_size=8, communication=one_hop)
    assert scaling[-1].chosen.node_sent == plan_.chosen.node_sent
    with pytest.raises(ValueError, match="partition_size=12 does not divide"):
        plan(work(), P4D, nodes=4, global_batch_size=256, partition_size=12)


def test_weak_scaling_keeps_the_work_of_a_rank() -> None:
    plans = weak_scaling(work(), P4D, nodes=[1, 2, 4], samples_per_rank=32)
    assert [plan_.global_batch_size for plan_ in plans] == [256, 512, 1024]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nodes": 0}, "nodes=0 must be at least 1"),
        (
            {"global_batch_size": 33},
            "global_batch_size=33 sequences cannot be split over 32 ranks; the nearest that can",
        ),
        ({"micro_batch": 0}, "data.batch_size=0 must be a whole number of at least 1"),
    ],
)
def test_nonsense_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(**wrong)


def test_an_instance_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"'p4d\.24xl' is not known; did you mean 'p4d\.24xlarge'"):
        find_instance("p4d.24xl")


def test_a_model_without_blocks_is_one_parameter_group() -> None:
    measured = [
        measure_workload(lambda: nn.Linear(3, 3), torch.zeros(2, 3), samples=2, loss=tower_loss, **options)
        for options in ({}, {"block_classes": []})
    ]
    assert measured[0].size == measured[1].size
    assert measured[0].size.root_bytes == 12 * 4


def test_a_block_that_no_device_holds_is_refused_with_what_is_missing() -> None:
    workload = replace(work(), size=replace(work().size, block_bytes=20 * 2**30))
    with pytest.raises(ValueError, match=r"the largest block \(20 GiB\) does not fit one A100 40 GB.*20 GiB too much"):
        plan(workload, P4D, nodes=2, global_batch_size=64)


def test_what_does_not_fit_is_said_by_how_much() -> None:
    large = replace(work(), activations=Activations({"head": (Line(0, 50 * 2**30),)}))
    plan_ = plan(large, P4D, nodes=2, global_batch_size=64)
    assert not any(row.fits for row in plan_.candidates)
    assert any("no partition size fits: the best needs 50" in warning for warning in plan_.warnings)
    assert not any("left out" in warning for warning in plan_.warnings)
    flat_sums = CommunicationOptions(hierarchical=False, accumulate_gradients="node")
    left_out = plan(large, P4D, nodes=2, global_batch_size=64, communication=flat_sums).warnings[-1]
    assert left_out.startswith("larger partition groups are left out: accumulate_gradients='node' needs a separate")


def test_it_says_what_low_bit_optimizer_states_would_save_on_a_rank() -> None:
    options = {"nodes": 2, "global_batch_size": 64, "partition_size": 8}
    plan_, shard = plan(work(width=1024), P4D, **options), 1024 * 1024 // 8
    eight, four = (6 * 2 * (4 * shard - shard * bits // 8 - 4 * shard // block) for bits, block in ((8, 256), (4, 128)))
    assert plan_.low_bit_saved_bytes == {8: eight, 4: four}  # biases and the head stay in float32
    assert low_bit_line(plan_).endswith("would save on each rank: 8 bits 0.00437 GiB, 4 bits 0.00508 GiB")
    odd = plan(work(), P4D, **options)  # 125,000 values in a shard are no whole blocks
    assert odd.low_bit_saved_bytes == {8: 0, 4: 0} and low_bit_line(odd) == ""


def test_savings_of_low_bit_states_are_not_said_where_parameters_are_not_in_float32() -> None:
    def build() -> nn.Module:
        return Tower(width=1024).bfloat16()

    batch = torch.zeros(7, 1024, dtype=torch.bfloat16)
    workload = measure_workload(build, batch, samples=7, loss=tower_loss)
    plan_ = plan(workload, P4D, nodes=2, global_batch_size=64)
    assert plan_.low_bit_saved_bytes == {} and low_bit_line(plan_) == ""


def test_a_micro_batch_that_only_larger_partition_groups_hold_is_said_to_be_one() -> None:
    size, taken = replace(work().size, states_bytes=200 * 2**30), Activations({"blocks": (Line(0, 20 * 2**30),)})
    workload = replace(work(), size=size, activations=taken)
    plan_ = plan(workload, P4D, nodes=4, global_batch_size=32, micro_batch=1)
    assert plan_.recommended.topology.partition_size == 16 and plan_.recommended.fits and not plan_.warnings
    plan_ = plan(workload, P4D, nodes=4, global_batch_size=32, micro_batch=1, partition_size=8)
    assert not plan_.chosen.fits
    assert any("partition_size=8 needs 45 GiB of 40 GiB" in w and "16, 32 would fit" in w for w in plan_.warnings)


def gather(**options: Any) -> Collective:
    facts = {"kind": "all_gather", "group": "rail", "ranks": 4, "nodes": 4, "dtype": torch.float32, "elements": 1000}
    return Collective(**{**facts, "sent": Sent(0.0, 3e9), **options})


def test_a_collective_takes_its_bytes_at_the_rate_of_the_network_and_a_latency_per_hop() -> None:
    network = 8 * 3e9 / (400e9 / 8 * 0.85)  # eight ranks share it
    assert collective_seconds(gather(), P4D) == pytest.approx(network + 3 * 75e-6)
    in_node = gather(group="node", ranks=8, nodes=1, sent=Sent(3e9, 0.0))
    assert collective_seconds(in_node, P4D) == pytest.approx(3e9 / 230e9 + 7 * 3.4e-6)


def test_what_travels_once_per_step_hides_behind_one_micro_step_only() -> None:
    second = collective_seconds(gather(), P4D)
    flops = 2 * second * P4D.peak_tflops * 1e12 * P4D.kernel_share  # twice as long
    root, block = (Unit(((1000, 1),), is_root) for is_root in (True, False))

    def found(repeated: ScheduledCollective) -> Seconds:
        traffic = StepTraffic((UnitTraffic(root, ()), *[UnitTraffic(block, (repeated,))] * 4))
        return step_seconds(traffic, P4D, [Arithmetic(micro_steps=4, micro_step_flops=flops)])[0]

    every = found(ScheduledCollective(gather(), ("backward",), "every"))
    assert every.between == pytest.approx(16 * second)
    assert every.most == pytest.approx(4 * (2 + 4) * second)
    assert every.expected == pytest.approx((every.least + every.most) / 2)
    boundary = found(ScheduledCollective(gather(), ("backward",), "boundary"))
    assert boundary.between == pytest.approx(4 * second)
    assert boundary.least == pytest.approx(3 * 2 * second + every.least / 4)
    assert boundary.most == pytest.approx((3 * 2 + 6) * second)


NCCL_TESTS = """# nThread 1 nGpus 8 minBytes 1048576 maxBytes 1073741824 step: 2(factor) warmup iters: 5 iters: 20
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
     1048576         32768     float    none      -1    60.00   17.48   15.29      0    61.00   17.19   15.04      0
  1073741824      33554432     float    none      -1   4500.0  238.61  208.78      0   4510.0  238.08  208.32      0
# Out of bounds values : 0 OK
"""


def test_nccl_tests_of_ones_own_go_before_the_table(tmp_path: Path) -> None:
    (tmp_path / "in_node.txt").write_text(NCCL_TESTS)
    assert [run.size_bytes for run in read_runs(tmp_path / "in_node.txt")] == [2**20, 2**30]
    measured = with_measured(P4D, in_node=tmp_path / "in_node.txt", between_nodes=tmp_path / "in_node.txt", nodes=2)
    assert measured.in_node_rate_gbytes_per_s == pytest.approx(208.78)
    assert measured.in_node_latency_us == pytest.approx((60 - 2**20 / 208.78e3) / 7)
    assert measured.network_achieved == 1.0
    (tmp_path / "wrong.txt").write_text("hello\n")
    with pytest.raises(ValueError, match=r"wrong\.txt has no results of nccl-tests"):
        read_runs(tmp_path / "wrong.txt")


def test_the_page_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    for name in ("one-node.txt", "two-nodes.txt"):
        (tmp_path / name).write_text(NCCL_TESTS)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, names)
    assert names["best"].fits and names["rehearsed"].ran
    assert names["measured"].in_node_rate_gbytes_per_s == pytest.approx(208.78)
