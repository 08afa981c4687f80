"""Step times that the planner's model predicts beside those that the emulated cluster measures.

    python -m benchmarks.predictions --rate 200mbit --out benchmarks/results/predictions

Two nodes of four ranks, real TCP between them. One launch measures, in turns: collectives in two sizes, inside a node
and between nodes, and a micro-step without any communication; optimizer steps under one schedule. The former calibrate
the model, in the median of all turns; the latter are what it is held against. It needs root and iproute2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.comparison.workload import Workload, build_model, micro_batch
from benchmarks.emulated_cluster import EmulatedCluster
from lightning_mics import CommunicationOptions
from lightning_mics.collectives.counted_group import CountedGroup
from lightning_mics.collectives.traffic import Traffic
from lightning_mics.cost.hardware import Hardware
from lightning_mics.cost.step_time import collective_seconds
from lightning_mics.planning.rehearsal.rehearse import rehearse
from lightning_mics.sharding.shard_model import shard_model
from lightning_mics.techniques.partition_groups import PartitionGroups, create_partition_groups
from lightning_mics.topology import Topology

NODES, RANKS_PER_NODE, MICRO_STEPS = 2, 4, 4
WORKLOAD = Workload(layers=8, width=256)
SCHEDULES = {  # partition size, and how collectives run
    "full sharding, flat": (8, CommunicationOptions(hierarchical=False)),
    "hierarchical": (8, CommunicationOptions.PAPER),
    "hierarchical, parameters once per step": (8, CommunicationOptions(cache_parameters="node")),
    "hierarchical, once per step": (8, CommunicationOptions.NODE),
    "partition = node, every micro-step": (4, CommunicationOptions(two_hop=False)),
    "partition = node, two hops": (4, CommunicationOptions.PAPER),
    "everything once per step": (8, CommunicationOptions.RANK),
}
SIZES = (2**12, 12 * WORKLOAD.width**2)  # elements of what is gathered, float32; the larger is a block
IN_A_ROW = 6  # as in training; a link that was idle begins slowly
STEPS, WARMUP = 3, 1
TIE = 0.01  # predictions that differ by less are equal


def timed(run: Callable[[], object], *, times: int) -> float:
    """The median of seconds that all ranks take."""
    seconds = []
    for _ in range(times):
        dist.barrier()
        begin = time.perf_counter()
        run()
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def measure_collectives(groups: PartitionGroups) -> dict[str, dict[int, float]]:
    """Seconds of an all-gather and a reduce-scatter, in the mean, by the size of what each rank holds in whole.

    As schedules run them, inside a node and along rails, on all ranks at once.
    """
    seconds: dict[str, dict[int, float]] = {"node": {}, "rail": {}}
    for name, group in (("node", groups.node), ("rail", groups.rail)):
        assert group is not None
        nodes = [0] * group.size() if name == "node" else range(group.size())
        counted = CountedGroup(group, nodes=nodes, traffic=Traffic(), backend=groups.backend)
        for size in SIZES:
            whole, part = torch.zeros(size), torch.zeros(size // group.size())

            def both(whole: Tensor = whole, part: Tensor = part, counted: CountedGroup = counted) -> None:
                for _ in range(IN_A_ROW):
                    counted.all_gather(whole, part, technique="calibration")
                    counted.reduce_scatter(part, whole, op=dist.ReduceOp.AVG, technique="calibration")

            both()
            seconds[name][size] = timed(both, times=3) / (2 * IN_A_ROW)
    return seconds


def measure_micro_step() -> float:
    """Seconds of a micro-step of all ranks at once, sharded as in training, but over one rank each: nothing travels."""
    model = build_model(WORKLOAD)
    schedule = shard_model(model, create_partition_groups(topology(1), device_type="cpu"))
    batch = micro_batch(WORKLOAD, step=0, micro_step=0, rank=dist.get_rank())

    def train() -> None:
        with schedule.micro_step(boundary=False):  # no replicas are synchronized
            model(batch).backward()

    train()
    return timed(train, times=5)


def measure_schedule(name: str) -> float:
    """Seconds of an optimizer step."""
    partition_size, communication = SCHEDULES[name]
    hierarchical = communication.hierarchical
    groups = create_partition_groups(topology(partition_size), device_type="cpu", hierarchical=hierarchical)
    model = build_model(WORKLOAD)
    schedule = shard_model(model, groups, communication=communication)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        for index in range(MICRO_STEPS):
            with schedule.micro_step(boundary=index == MICRO_STEPS - 1):
                model(micro_batch(WORKLOAD, step=0, micro_step=index, rank=dist.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARMUP):
        step()
    return timed(step, times=STEPS)


def topology(partition_size: int) -> Topology:
    return Topology(world_size=NODES * RANKS_PER_NODE, ranks_per_node=RANKS_PER_NODE, partition_size=partition_size)


def work(out: Path) -> None:
    """One rank; rank 0 writes what was measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups = create_partition_groups(topology(8), device_type="cpu")
    measured: dict[str, Any] = {"collectives": [], "micro_step": [], "steps": {}}
    for name in SCHEDULES:
        measured["collectives"].append(measure_collectives(groups))
        measured["micro_step"].append(measure_micro_step())
        measured["steps"][name] = measure_schedule(name)
        if dist.get_rank() == 0:
            print(name, measured["steps"][name], flush=True)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(measured))
    dist.barrier()
    time.sleep(0.2)


def calibrated(
    collectives: list[dict[str, dict[str, float]]], *, nodes: int = NODES, ranks_per_node: int = RANKS_PER_NODE
) -> Hardware:
    """The emulated machine, from collectives of two sizes; what it computes is measured, not predicted.

    Args:
        collectives: Results of :func:`measure_collectives`, one for each turn.
        nodes: Number of nodes.
        ranks_per_node: Number of ranks on each node.
    """
    sent_bytes = {"node": (ranks_per_node - 1) / ranks_per_node, "rail": (nodes - 1) / nodes}
    rates, latencies = {}, {}
    for name, share in sent_bytes.items():
        small, large = (median(turn[name][str(size)] for turn in collectives) for size in SIZES)
        rates[name] = 4 * (SIZES[1] - SIZES[0]) * share / (large - small)
        hops = ranks_per_node - 1 if name == "node" else nodes - 1
        latencies[name] = max(0.1, 1e6 * (small - 4 * SIZES[0] * share / rates[name]) / hops)
    network_gbits = 8e-9 * ranks_per_node * rates["rail"]
    return Hardware(
        gpu="CPU process",
        gpus_per_node=ranks_per_node,
        memory_gib=2,
        peak_tflops=1.0,
        kernel_share=1.0,
        in_node_rate_gbytes_per_s=rates["node"] / 1e9,
        in_node_latency_us=latencies["node"],
        network_rate_gbits_per_s=network_gbits,
        network_achieved=1.0,
        network_latency_us=latencies["rail"],
        host_memory_gib=2,
        host_rate_gbytes_per_s=1,
    )


def predict(name: str, hardware: Hardware, micro_step_seconds: float) -> float:
    """The planner's seconds of an optimizer step: its rehearsed collectives, priced, and then its arithmetic.

    Nothing overlaps, as gloo's collectives are the work of the ranks' own cores.
    """
    partition_size, communication = SCHEDULES[name]
    rehearsal = rehearse(
        lambda: build_model(WORKLOAD),
        micro_batch(WORKLOAD, step=0, micro_step=0, rank=0),
        loss=_call,
        topology=topology(partition_size),
        micro_steps=MICRO_STEPS,
        backend="gloo",
        communication=communication,
    )
    communication_seconds = sum(collective_seconds(ran.collective, hardware) * ran.times for ran in rehearsal.ran)
    return MICRO_STEPS * micro_step_seconds + communication_seconds


def _call(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch)
    return loss


def measure(rate: str, scratch: Path) -> dict[str, Any]:
    """Launch the ranks on an emulated cluster."""
    scratch.mkdir(parents=True, exist_ok=True)
    script = (
        f"OMP_NUM_THREADS=1 {sys.executable} -m torch.distributed.run --nnodes $NNODES --node-rank $NODE_RANK "
        f"--nproc-per-node {RANKS_PER_NODE} --master-addr $MASTER_ADDR --master-port $MASTER_PORT "
        f"-m benchmarks.predictions --work {scratch / 'measured.json'}"
    )
    with EmulatedCluster(NODES, rate=rate) as cluster:
        outcomes = cluster.start(["sh", "-c", script]).wait(timeout=900)
    print(outcomes)
    return json.loads((scratch / "measured.json").read_text())


def write_page(measured: dict[str, Any], *, rate: str, out: Path) -> None:
    hardware = calibrated(measured["collectives"])
    micro_step = median(measured["micro_step"])
    rows, predicted = [], {}
    for name, seconds in measured["steps"].items():
        predicted[name] = predict(name, hardware, micro_step)
        error = predicted[name] / seconds - 1
        rows.append(f"| {name} | {seconds:.3f} | {predicted[name]:.3f} | {error:+.0%} |")
    by_time = sorted(measured["steps"], key=measured["steps"].__getitem__)
    order = [predicted[name] for name in by_time]
    same = all(one <= other * (1 + TIE) for one, other in itertools.pairwise(order))
    remarks = out / "remarks.md"
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(
        json.dumps({"rate": rate, "measured": measured, "predicted": predicted}, indent=1)
    )
    (out / "README.md").write_text(
        PAGE.format(
            rate=rate,
            rows="\n".join(rows),
            ranking=f"{'the same' if same else 'not the same'} (predictions within {TIE:.0%} of each other are equal)",
            network=hardware.network_rate_gbits_per_s * 1e3,
            network_latency=hardware.network_latency_us,
            in_node=hardware.in_node_rate_gbytes_per_s * 1e3,
            in_node_latency=hardware.in_node_latency_us,
            micro_step=micro_step,
            remarks=remarks.read_text() if remarks.exists() else "",
        )
    )


PAGE = """# Predicted and measured on the emulated cluster

Two nodes of four CPU ranks, links of {rate}, 4 micro-steps per optimizer step, the model of the comparison with 8
layers of width 256. Calibrated, in turns with the schedules, by an all-gather and a reduce-scatter in two sizes:
{network:.0f} Mbit/s and {network_latency:.0f} us per hop between nodes, {in_node:.0f} MB/s per rank and
{in_node_latency:.0f} us per hop inside; and by a micro-step of the same program with partitions of one rank, where
nothing travels: {micro_step:.3f} s. *Measured, and predicted.*

| schedule | measured, s per step | predicted | error |
|---|---|---|---|
{rows}

Ranking: {ranking}.

{remarks}
To get it again: `python -m benchmarks.predictions --rate {rate} --out benchmarks/results/predictions`
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", default="200mbit", help="of the links between nodes")
    parser.add_argument("--out", type=Path, help="folder of the result page")
    parser.add_argument("--work", type=Path, help="be one rank, and write what was measured here")
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work)
    else:
        write_page(measure(arguments.rate, arguments.out / "scratch"), rate=arguments.rate, out=arguments.out)


if __name__ == "__main__":
    main()
