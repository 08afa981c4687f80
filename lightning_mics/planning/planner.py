"""The planner: all partition sizes of a job, ranked, with memory, traffic and the time of a step.

The planner and the recipes choose by the same function (:func:`lightning_mics.policy.fastest.fastest`), so that they
never disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_mics.cost.hardware import Hardware
from lightning_mics.policy.baselines import full_sharding, full_sharding_tuned, unsharded_weights
from lightning_mics.policy.candidates import Candidate, Job
from lightning_mics.policy.fastest import fastest
from lightning_mics.policy.memory import LOW_BIT_BLOCKS, in_gib, usable_bytes
from lightning_mics.policy.workload import Workload
from lightning_mics.sharding.options import CommunicationOptions
from lightning_mics.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All ways to run a job, the best first.

    Attributes:
        candidates: Best candidate of each partition size, those that fit before those that do not, faster before
            slower.
        recommended: Fastest of all candidates that fit, with full sharding over all ranks among them.
        chosen: Best candidate with the partition size that was given; without one, ``recommended``.
        baseline: Full sharding over all ranks by FSDP2 with its defaults and the largest micro-batch that fits.
        baseline_tuned: Fastest of FSDP2's own options over all ranks.
        unsharded_weights: FSDP2 with ``reshard_after_forward=False``, and ZeRO-2.
        global_batch_size: Samples per optimizer step.
        capacity_bytes: Memory of a GPU, in bytes.
        low_bit_saved_bytes: Bytes that optimizer states in 8 bits and in 4 bits would save on a rank of the chosen
            candidate, by bits; nothing if not all parameters are in float32.
        warnings: Sentences on memory, time and traffic, without a full stop.
    """

    candidates: tuple[Candidate, ...]
    recommended: Candidate
    chosen: Candidate
    baseline: Candidate
    baseline_tuned: Candidate
    unsharded_weights: tuple[Candidate, ...]
    global_batch_size: int
    capacity_bytes: int
    low_bit_saved_bytes: dict[int, int]
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
    """Compare all ways to run a job: partition sizes, flat or in stages, micro-batches, caches and accumulation.

    Args:
        workload: Workload, from :func:`~lightning_mics.planning.rehearsal.workload.measure_workload`.
        hardware: Hardware of each node; see :func:`~lightning_mics.cost.hardware.find_instance`.
        nodes: Number of nodes.
        global_batch_size: Samples per optimizer step, over all ranks.
        ranks_per_node: Ranks on each node; None is one per GPU.
        micro_batch: Samples per rank and micro-step; None is chosen.
        accumulation: Micro-steps per optimizer step; None follows from the other two.
        partition_size: Ranks per partition group of the chosen candidate, or "auto"; all sizes are compared anyway.
        communication: Options of the collectives, where "auto" is chosen; ``hierarchical`` applies if a partition group
            spans nodes.

    Raises:
        ValueError: If ``nodes`` is not positive, the global batch cannot be split, a block does not fit a device, or
            the partition size or an option does not fit the job.
    """
    if nodes < 1:
        raise ValueError(f"nodes={nodes} must be at least 1")
    ranks_per_node = ranks_per_node or hardware.gpus_per_node
    _check_block_fits(workload, hardware)
    job = Job(
        workload=workload,
        hardware=hardware,
        world_size=nodes * ranks_per_node,
        ranks_per_node=ranks_per_node,
        global_batch_size=global_batch_size,
        micro_batch=micro_batch,
        accumulation=accumulation,
    )
    baseline, tuned = full_sharding(job), full_sharding_tuned(job)

    def best(candidates: Sequence[Candidate]) -> Candidate:
        return fastest(candidates, baseline, tuned, sample_tokens=workload.sample_tokens)

    of_sizes: dict[int, list[Candidate]] = {}
    for candidate in job.candidates("auto", communication):
        of_sizes.setdefault(candidate.topology.partition_size, []).append(candidate)
    by_size = {size: best(candidates) for size, candidates in of_sizes.items()}
    recommended = best([candidate for candidates in of_sizes.values() for candidate in candidates])
    by_size[recommended.topology.partition_size] = recommended
    chosen = recommended
    if partition_size != "auto":
        chosen = by_size[partition_size] = best(list(job.candidates(partition_size, communication)))
    saved = {
        bits: workload.saved_by_low_bits_bytes(chosen.topology.partition_size, bits=bits) for bits in LOW_BIT_BLOCKS
    }
    ranked = sorted(by_size.values(), key=lambda candidate: (not candidate.fits, candidate.seconds.expected))
    return Plan(
        candidates=tuple(ranked),
        recommended=recommended,
        chosen=chosen,
        baseline=baseline,
        baseline_tuned=tuned,
        unsharded_weights=unsharded_weights(job),
        global_batch_size=global_batch_size,
        capacity_bytes=hardware.memory_bytes,
        low_bit_saved_bytes={bits: count for bits, count in saved.items() if count is not None},
        warnings=(*_warnings(chosen, ranked, baseline, hardware), *_left_out(ranked, communication, job)),
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


def _left_out(ranked: Sequence[Candidate], communication: CommunicationOptions, job: Job) -> list[str]:
    """Why there are no large partition groups, if none that fits is left."""
    ranks = job.world_size
    if any(each.fits or each.topology.partition_size == ranks for each in ranked):
        return []
    try:
        communication.check(Topology(world_size=ranks, ranks_per_node=job.ranks_per_node, partition_size=ranks))
    except ValueError as error:
        return [f"larger partition groups are left out: {error}"]
    return []


def _warnings(chosen: Candidate, ranked: Sequence[Candidate], baseline: Candidate, hardware: Hardware) -> list[str]:
    warnings = []
    topology = chosen.topology
    if not chosen.fits:
        reserve = hardware.memory_bytes - usable_bytes(hardware.memory_bytes)
        needs = (
            f"{in_gib(chosen.memory_bytes)} of {in_gib(hardware.memory_bytes)} per GPU, of which {in_gib(reserve)} are "
            "for CUDA, NCCL and the allocator"
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
