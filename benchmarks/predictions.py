"""Step times that the planner's model predicts beside those that the emulated cluster measures.

    python -m benchmarks.predictions --rate 200mbit --out benchmarks/results/predictions

Two nodes of four ranks, real TCP between them. One launch measures, in this order: a collective in its smallest and its
largest size inside a node and between nodes; arithmetic without any communication; optimizer steps under each schedule.
The first two calibrate the model, the last are what it is held against. It needs root and iproute2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
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
from lightning_mics.partition_groups import PartitionGroups, create_groups
from lightning_mics.planning.hardware import Hardware
from lightning_mics.planning.rehearsal import rehearse
from lightning_mics.planning.step_time import step_seconds
from lightning_mics.planning.step_traffic import Repeated
from lightning_mics.sharding import shard_model
from lightning_mics.topology import Topology

NODES, RANKS_PER_NODE, MICRO_STEPS = 2, 4, 4
WORKLOAD = Workload(layers=8, width=256)
ONCE = {"cross_node_gather": "once_per_step", "cross_node_reduce": "once_per_step"}
SCHEDULES: dict[str, tuple[int, bool | str, dict[str, Any]]] = {  # partition size, hierarchical, options
    "full sharding, flat": (8, False, {}),
    "hierarchical": (8, "auto", {}),
    "hierarchical, parameters once per step": (8, "auto", {"cross_node_gather": "once_per_step"}),
    "hierarchical, once per step": (8, "auto", ONCE),
    "partition = node, every micro-step": (4, "auto", {"two_hop": False}),
    "partition = node, two hops": (4, "auto", {}),
    "everything once per step": (
        8,
        "auto",
        {**ONCE, "in_node_gather": "once_per_step", "in_node_reduce": "once_per_step"},
    ),
}
SIZES = (2**12, 2**20)  # elements of what is gathered, float32
IN_A_ROW = 6  # as in training; a link that was idle begins slowly
STEPS, WARMUP = 3, 1


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
    """Seconds of an all-gather by the size of its output, inside a node and along rails, on all ranks at once."""
    seconds: dict[str, dict[int, float]] = {}
    for name, group in (("node", groups.node), ("rail", groups.rail)):
        assert group is not None
        for size in SIZES:
            whole, part = torch.empty(size), torch.empty(size // group.size())

            def gathers(whole: Tensor = whole, part: Tensor = part, group: Any = group) -> None:
                for _ in range(IN_A_ROW):
                    dist.all_gather_single(whole, part, group=group)

            gathers()
            seconds.setdefault(name, {})[size] = timed(gathers, times=5) / IN_A_ROW
    return seconds


def measure_arithmetic() -> float:
    """Seconds of a micro-step of all ranks at once, without communication."""
    model = build_model(WORKLOAD)
    batch = micro_batch(WORKLOAD, step=0, micro_step=0, rank=dist.get_rank())

    def train() -> None:
        model(batch).backward()
        model.zero_grad()

    train()
    return timed(train, times=9)


def measure_schedule(name: str) -> float:
    """Seconds of an optimizer step."""
    partition_size, hierarchical, options = SCHEDULES[name]
    groups = create_groups(topology(partition_size), device_type="cpu", hierarchical=hierarchical)
    model = build_model(WORKLOAD)
    schedule = shard_model(model, groups, **options)
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
    groups = create_groups(topology(8), device_type="cpu")
    measured: dict[str, Any] = {"collectives": measure_collectives(groups), "micro_step": measure_arithmetic()}
    measured["steps"] = {}
    for name in SCHEDULES:
        measured["steps"][name] = measure_schedule(name)
        if dist.get_rank() == 0:
            print(name, measured["steps"][name], flush=True)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(measured))
    dist.barrier()
    time.sleep(0.2)


def calibrated(collectives: dict[str, dict[str, float]]) -> Hardware:
    """The emulated machine, from a collective's smallest and largest sizes; arithmetic is measured, not predicted."""
    small, large = (str(size) for size in SIZES)
    sent_bytes = {"node": (RANKS_PER_NODE - 1) / RANKS_PER_NODE, "rail": (NODES - 1) / NODES}
    rates, latencies = {}, {}
    for name, share in sent_bytes.items():
        growth = collectives[name][large] - collectives[name][small]
        rates[name] = 4 * (SIZES[1] - SIZES[0]) * share / growth
        hops = RANKS_PER_NODE - 1 if name == "node" else NODES - 1
        latencies[name] = max(0.1, 1e6 * (collectives[name][small] - 4 * SIZES[0] * share / rates[name]) / hops)
    network_gbits = 8e-9 * RANKS_PER_NODE * rates["rail"]
    return Hardware(
        gpu="CPU process",
        gpus_per_node=RANKS_PER_NODE,
        memory_gib=2,
        peak_tflops=1.0,
        kernel_share=1.0,
        in_node_rate_gbytes_per_s=rates["node"] / 1e9,
        in_node_latency_us=latencies["node"],
        network_rate_gbits_per_s=network_gbits,
        network_achieved=1.0,
        network_latency_us=latencies["rail"],
    )


def predict(name: str, hardware: Hardware, micro_step_seconds: float) -> float:
    """The planner's expected seconds of an optimizer step: its rehearsed collectives, priced, beside its arithmetic."""
    partition_size, hierarchical, options = SCHEDULES[name]
    rehearsal = rehearse(
        lambda: build_model(WORKLOAD),
        micro_batch(WORKLOAD, step=0, micro_step=0, rank=0),
        loss=_call,
        topology=topology(partition_size),
        micro_steps=MICRO_STEPS,
        backend="gloo",
        hierarchical=hierarchical,
        **options,
    )
    total = 0.0
    for micro_step, times in {ran.micro_step: ran.times for ran in rehearsal.ran}.items():
        traffic = [Repeated(ran.collective, 1, "every") for ran in rehearsal.ran if ran.micro_step == micro_step]
        flops = micro_step_seconds * 1e12  # at the rate that `calibrated` gives
        total += times * step_seconds(traffic, hardware, micro_steps=1, micro_step_flops=flops).expected
    return total


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
    rows, predicted = [], {}
    for name, seconds in measured["steps"].items():
        predicted[name] = predict(name, hardware, measured["micro_step"])
        error = predicted[name] / seconds - 1
        rows.append(f"| {name} | {seconds:.3f} | {predicted[name]:.3f} | {error:+.0%} |")
    by_time = sorted(measured["steps"], key=measured["steps"].__getitem__)
    order = [predicted[name] for name in by_time]
    same = all(one <= other or math.isclose(one, other) for one, other in itertools.pairwise(order))
    remarks = out / "remarks.md"
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(
        json.dumps({"rate": rate, "measured": measured, "predicted": predicted}, indent=1)
    )
    (out / "README.md").write_text(
        PAGE.format(
            rate=rate,
            rows="\n".join(rows),
            ranking="the same" if same else f"not the same; as measured, {', '.join(by_time)}",
            network=hardware.network_rate_gbits_per_s * 1e3,
            network_latency=hardware.network_latency_us,
            in_node=hardware.in_node_rate_gbytes_per_s * 1e3,
            in_node_latency=hardware.in_node_latency_us,
            micro_step=measured["micro_step"],
            remarks=remarks.read_text() if remarks.exists() else "",
        )
    )


PAGE = """# Predicted and measured on the emulated cluster

Two nodes of four CPU ranks, links of {rate}, 4 micro-steps per optimizer step, the model of the comparison with 8
layers of width 256. Calibrated by an all-gather in two sizes, before the schedules ran: {network:.0f} Mbit/s and
{network_latency:.0f} us per hop between nodes, {in_node:.0f} MB/s per rank and {in_node_latency:.0f} us per hop
inside (six in a row); and by a micro-step without communication, {micro_step:.3f} s. *Measured, and predicted.*

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
