"""The planner: all partition sizes of a job, ranked, with memory, traffic and the time of a step.

The planner and the strategy replace "auto" by the same function (:mod:`lightning_mics.policy.choice`), so that they
never disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_mics.collectives.traffic import Sent
from lightning_mics.cost.batches import Batches, split_global_batch
from lightning_mics.cost.hardware import Hardware
from lightning_mics.cost.step_time import Seconds, step_seconds
from lightning_mics.cost.step_traffic import step_traffic, total_sent
from lightning_mics.planning.rehearsal.workload import Workload
from lightning_mics.policy.choice import Choice, choose
from lightning_mics.policy.memory import in_gib
from lightning_mics.sharding.options import CommunicationOptions
from lightning_mics.topology import Topology, partition_sizes

LEFT_FREE = 0.06  # share of a device for memory that is not counted: the CUDA context, NCCL, fragmentation


FULL_SHARDING = "FSDP, ZeRO-3"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run the job.

    Attributes:
        system: "MiCS", or the name of the baseline.
        topology: Topology of the job.
        batches: Division of the global batch.
        communication: Options of the collectives, without "auto".
        states_bytes: Model states of a rank, with the unsharded parameters and gradients of the peak, in bytes.
        cached_bytes: Cached parameters and accumulated gradients of a rank, in bytes.
        memory_bytes: Memory of a rank, with the activations of a micro-batch, in bytes.
        fits: Whether ``memory_bytes`` leaves enough of the device free.
        node_sent: Bytes that a node sends per optimizer step.
        seconds: Predicted seconds of an optimizer step.
        hfu_tflops: TFLOP/s of one GPU at the expected time, with recomputation.
        mfu_tflops: TFLOP/s of one GPU at the expected time, without recomputation.
    """

    system: str
    topology: Topology
    batches: Batches
    communication: CommunicationOptions
    states_bytes: int
    cached_bytes: int
    memory_bytes: int
    fits: bool
    node_sent: Sent
    seconds: Seconds
    hfu_tflops: float
    mfu_tflops: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All ways to run a job, the best first.

    Attributes:
        candidates: Candidates, those that fit before those that do not, faster before slower.
        recommended: Candidate that ``partition_size="auto"`` chooses.
        chosen: Candidate with the partition size that was given; without one, ``recommended``.
        baseline: Full sharding over all ranks, with flat collectives and without caches.
        global_batch_size: Samples per optimizer step.
        capacity_bytes: Memory of a GPU, in bytes.
        warnings: Sentences on memory, time and traffic, without a full stop.
    """

    candidates: tuple[Candidate, ...]
    recommended: Candidate
    chosen: Candidate
    baseline: Candidate
    global_batch_size: int
    capacity_bytes: int
    warnings: tuple[str, ...]


def plan(
    workload: Workload,
    hardware: Hardware,
    *,
    nodes: int,
    global_batch_size: int,
    ranks_per_node: int | None = None,
    micro_batch: int | None = None,
    accumulation: int | None = None,
    partition_size: int | Literal["auto"] = "auto",
    communication: CommunicationOptions = CommunicationOptions.AUTO,
) -> Plan:
    """Compare all partition sizes.

    Args:
        workload: Workload, from :func:`~lightning_mics.planning.rehearsal.workload.measure_workload`.
        hardware: Hardware of each node; see :func:`~lightning_mics.cost.hardware.find_instance`.
        nodes: Number of nodes.
        global_batch_size: Samples per optimizer step, over all ranks.
        ranks_per_node: Ranks on each node; None is one per GPU.
        micro_batch: Samples per rank and micro-step; None is as many as fit.
        accumulation: Micro-steps per optimizer step; None follows from the other two.
        partition_size: Ranks per partition group of the chosen candidate, or "auto"; all sizes are compared anyway.
        communication: Options of the collectives; ``hierarchical`` applies if a partition group spans nodes.

    Raises:
        ValueError: If ``nodes`` is not positive, the global batch cannot be split, a block does not fit a device, or
            the partition size does not fit the job.
    """
    if nodes < 1:
        raise ValueError(f"nodes={nodes} must be at least 1")
    ranks_per_node = ranks_per_node or hardware.gpus_per_node
    world_size = nodes * ranks_per_node
    _check_block_fits(workload, hardware)
    price = _Price(workload, hardware, global_batch_size, micro_batch, accumulation)

    def choice(size: int | Literal["auto"], *, spans_nodes: bool) -> Choice:
        return choose(
            workload.size,
            world_size=world_size,
            ranks_per_node=ranks_per_node,
            capacity_bytes=hardware.memory_bytes,
            partition_size=size,
            communication=communication if spans_nodes else replace(communication, hierarchical="auto"),
        )

    sizes = partition_sizes(world_size=world_size, ranks_per_node=ranks_per_node)
    choices = [choice(size, spans_nodes=size > ranks_per_node) for size in sizes]
    by_size = {each.topology.partition_size: price.candidate(each) for each in choices}
    ranked = sorted(by_size.values(), key=lambda candidate: (not candidate.fits, candidate.seconds.expected))
    recommended = by_size[choice("auto", spans_nodes=False).topology.partition_size]
    chosen = recommended if partition_size == "auto" else by_size.get(partition_size)
    if chosen is None:
        raise ValueError(
            f"partition_size={partition_size} does not fit the job; possible are {', '.join(map(str, by_size))}"
        )
    baseline = price.full_sharding(world_size=world_size, ranks_per_node=ranks_per_node)
    return Plan(
        candidates=tuple(ranked),
        recommended=recommended,
        chosen=chosen,
        baseline=baseline,
        global_batch_size=global_batch_size,
        capacity_bytes=hardware.memory_bytes,
        warnings=tuple(_warnings(chosen, ranked, baseline, hardware)),
    )


def weak_scaling(
    workload: Workload, hardware: Hardware, *, nodes: Sequence[int], samples_per_rank: int, **options: Any
) -> list[Plan]:
    """Plan the job on growing clusters, with the same work per rank.

    Args:
        workload: Workload, the same in all plans.
        hardware: Hardware of each node.
        nodes: Numbers of nodes, one plan for each.
        samples_per_rank: Samples per rank and optimizer step.
        options: Further arguments of :func:`plan`.
    """
    ranks_per_node = options.get("ranks_per_node") or hardware.gpus_per_node
    return [
        plan(workload, hardware, nodes=count, global_batch_size=samples_per_rank * count * ranks_per_node, **options)
        for count in nodes
    ]


@dataclass(frozen=True)
class _Price:
    workload: Workload
    hardware: Hardware
    global_batch_size: int
    micro_batch: int | None
    accumulation: int | None

    def full_sharding(self, *, world_size: int, ranks_per_node: int) -> Candidate:
        """The baseline: all ranks in one partition group, flat collectives, nothing cached."""
        topology = Topology(world_size=world_size, ranks_per_node=ranks_per_node, partition_size=world_size)
        return self._priced(FULL_SHARDING, topology, replace(CommunicationOptions.PAPER, hierarchical=False))

    def candidate(self, choice: Choice) -> Candidate:
        return self._priced("MiCS", choice.topology, choice.communication, cached_bytes=choice.cached_bytes)

    def _priced(
        self, system: str, topology: Topology, communication: CommunicationOptions, *, cached_bytes: int = 0
    ) -> Candidate:
        work, usable = self.workload, int((1 - LEFT_FREE) * self.hardware.memory_bytes)
        batches = split_global_batch(
            self.global_batch_size,
            ranks=topology.world_size,
            micro=self.micro_batch,
            accumulation=self.accumulation,
            largest_micro=max(
                1,
                work.size.largest_micro_batch(
                    topology.partition_size, work.sample, free_bytes=usable, cached_bytes=cached_bytes
                ),
            ),
        )
        memory = work.size.rank_bytes(topology.partition_size, work.sample * batches.micro, cached_bytes=cached_bytes)
        traffic = step_traffic(
            work.units,
            topology,
            communication=communication,
            gathered_dtype=work.gathered_dtype,
            reduce_dtype=work.reduce_dtype,
        )
        seconds = step_seconds(
            traffic,
            self.hardware,
            micro_steps=batches.accumulation,
            micro_step_flops=batches.micro * work.hardware_flops,
            ranks_per_node=topology.ranks_per_node,
        )
        of_rank = total_sent(traffic, micro_steps=batches.accumulation)
        samples = batches.micro * batches.accumulation
        return Candidate(
            system=system,
            topology=topology,
            batches=batches,
            communication=communication,
            states_bytes=work.size.per_rank_bytes(topology.partition_size),
            cached_bytes=cached_bytes,
            memory_bytes=memory,
            fits=memory <= usable,
            node_sent=Sent(
                of_rank.inside_bytes * topology.ranks_per_node, of_rank.between_bytes * topology.ranks_per_node
            ),
            seconds=seconds,
            hfu_tflops=samples * work.hardware_flops / seconds.expected / 1e12,
            mfu_tflops=samples * work.model_flops / seconds.expected / 1e12,
        )


def _check_block_fits(workload: Workload, hardware: Hardware) -> None:
    """Each rank unshards complete blocks, with their gradients, at any partition size."""
    size, capacity = workload.size, hardware.memory_bytes
    needed = size.per_rank_bytes(2**40)  # so many ranks that the shard of the model states is negligible
    if needed <= capacity:
        return
    root = size.root_bytes > size.block_bytes
    unit = (
        f"the root, outside of all blocks ({in_gib(size.root_bytes)})"
        if root
        else f"the largest block ({in_gib(size.block_bytes)})"
    )
    raise ValueError(
        f"{unit} does not fit one {hardware.gpu}: unsharded, with gradients and prefetched blocks, it takes "
        f"{in_gib(needed)} of {in_gib(capacity)}, {in_gib(needed - capacity)} too much; choose smaller blocks by "
        "block_classes, or GPUs with more memory"
    )


def _warnings(chosen: Candidate, ranked: Sequence[Candidate], baseline: Candidate, hardware: Hardware) -> list[str]:
    warnings = []
    topology = chosen.topology
    if not chosen.fits:
        needs = (
            f"{in_gib(chosen.memory_bytes)} of {in_gib(hardware.memory_bytes)} per GPU, of which "
            f"{LEFT_FREE:.0%} should stay free"
        )
        others = sorted(each.topology.partition_size for each in ranked if each.fits)
        if others:
            warnings.append(
                f"with micro-batches of {chosen.batches.micro}, partition_size={topology.partition_size} needs "
                f"{needs}; {', '.join(map(str, others))} would fit, or a smaller micro-batch"
            )
        else:
            warnings.append(f"no partition size fits: the best needs {needs}; use more nodes or GPUs with more memory")
    best = ranked[0]
    gain = 1 - best.seconds.expected / chosen.seconds.expected
    if best.fits and gain > 0.05:
        warnings.append(
            f"partition_size={best.topology.partition_size} is predicted to be {gain:.0%} faster than "
            f"{topology.partition_size}"
        )
    over_baseline = baseline.seconds.expected / chosen.seconds.expected
    if topology.nodes > 1 and over_baseline < 1.05:
        warnings.append(
            "MiCS gains little here: full sharding over all ranks is predicted to take "
            f"{over_baseline:.2f} times as long"
        )
    few = chosen.batches.accumulation == 1 and topology.replicas > 1
    if few and chosen.node_sent.between_bytes > baseline.node_sent.between_bytes:
        warnings.append(
            "with one micro-step per optimizer step, the second hop in float32 sends more between nodes than full "
            "sharding does: use a larger global batch, or inter_node_reduce_dtype=bfloat16"
        )
    if topology.nodes_per_partition_group > 8:
        warnings.append(
            f"a partition group spans {topology.nodes_per_partition_group} nodes: its collectives have the latency of "
            "as many hops; more memory per GPU would make it smaller"
        )
    return warnings
