"""What the planner chooses for each cell of the emulated cluster, and what it predicts there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from benchmarks.comparison.workload import Workload as Model
from benchmarks.comparison.workload import build_model, micro_batch
from lightning_mics import CommunicationOptions
from lightning_mics.collectives.traffic import sent_by
from lightning_mics.cost.batches import Batches
from lightning_mics.cost.hardware import Hardware
from lightning_mics.cost.step_time import Arithmetic, Seconds, collective_seconds, micro_steps_by_kind
from lightning_mics.cost.step_traffic import ScheduledCollective, StepTraffic, UnitTraffic, step_traffic
from lightning_mics.planning import Workload, measure_workload
from lightning_mics.policy import candidates
from lightning_mics.policy.baselines import full_sharding, full_sharding_tuned
from lightning_mics.policy.candidates import Candidate, Job
from lightning_mics.policy.fastest import fastest
from lightning_mics.policy.memory import RESERVED_BYTES, RESERVED_SHARE
from lightning_mics.topology import Topology

MODEL = Model(layers=4, width=128, vocabulary=512)
SAMPLES = 16  # of each rank, per optimizer step
MICRO_BATCHES = (1, 4, 16)
RANKS = 8

AS_FAST, RANGE, OTHERS = 1.5, 4.0, 6  # what is timed beside the choice: near it, and others up to so many times slower


@dataclass(frozen=True, kw_only=True)
class GlooJob(Job):
    """A job on gloo, whose reduce-scatter over nodes is an all-reduce inside, with the micro-batches that are timed."""

    def all_batches(self) -> list[Batches]:
        """The divisions of the samples that are timed."""
        return [Batches(micro, SAMPLES // micro) for micro in MICRO_BATCHES]

    def priced(
        self,
        system: str,
        topology: Topology,
        options: CommunicationOptions,
        *,
        traffic_of: Callable[..., StepTraffic] = step_traffic,
        **others: Any,
    ) -> Iterator[Candidate]:
        """The same as for NCCL, with the bytes of gloo."""
        return super().priced(system, topology, options, traffic_of=partial(gloo_traffic, traffic_of), **others)


def gloo_traffic(traffic_of: Callable[..., StepTraffic], units: Any, topology: Topology, **options: Any) -> StepTraffic:
    """The collectives of a step as gloo runs them.

    Args:
        traffic_of: Function that computes them for NCCL.
        units: Parameter groups.
        topology: Topology of the job.
        options: Further arguments of ``traffic_of``.
    """
    nodes = sorted(topology.node_of(rank) for rank in topology.partition_group(0))  # the order of flat collectives

    def on_gloo(scheduled: ScheduledCollective) -> ScheduledCollective:
        collective = scheduled.collective
        over_nodes = collective.group == "partition" and 1 < collective.nodes < collective.ranks
        if collective.kind != "reduce_scatter" or not over_nodes:  # inside nodes and along rails, ranks exchange pairs
            return scheduled
        sent = sent_by("reduce_scatter", collective.total_bytes, nodes=nodes, position=0, gloo=True)
        return replace(scheduled, collective=replace(collective, kind="all_reduce", sent=sent))

    traffic = traffic_of(units, topology, **options)
    return StepTraffic(tuple(UnitTraffic(unit.unit, tuple(map(on_gloo, unit.collectives))) for unit in traffic.units))


@contextmanager
def one_after_the_other(micro_step_seconds: Mapping[int, float]) -> Iterator[None]:
    """Let plans predict seconds as on gloo, where nothing overlaps.

    Args:
        micro_step_seconds: Measured seconds of a micro-step without communication, by micro-batch.
    """

    def step_seconds(
        traffic: StepTraffic, hardware: Hardware, ways: Sequence[Arithmetic], **options: Any
    ) -> list[Seconds]:
        return [_serial(traffic, hardware, way, micro_step_seconds, options["ranks_per_node"]) for way in ways]

    with patch.object(candidates, "step_seconds", step_seconds):
        yield


def _serial(
    traffic: StepTraffic, hardware: Hardware, way: Arithmetic, compute: Mapping[int, float], ranks_per_node: int
) -> Seconds:
    tiers = {"inside": 0.0, "between": 0.0}
    for whens, times in micro_steps_by_kind(way.micro_steps).items():
        for each in traffic:
            if each.when in whens:
                seconds = collective_seconds(each.collective, hardware, ranks_per_node=ranks_per_node)
                tiers["inside" if each.collective.nodes == 1 else "between"] += times * len(each.phases) * seconds
    arithmetic = way.micro_steps * compute[round(way.micro_step_flops)]  # a sample counts as one FLOP
    total = arithmetic + sum(tiers.values())
    return Seconds(compute=arithmetic, least=total, expected=total, most=total, **tiers)


def workload() -> Workload:
    """The work of the model, a sample of which counts as one FLOP."""
    measured = measure_workload(
        lambda: build_model(MODEL), batch_of(2, rank=0, index=0), samples=2, loss=loss_of, precision="32-true"
    )
    return replace(measured, hardware_flops=1.0, model_flops=1.0)


def batch_of(samples: int, *, rank: int, index: int) -> Tensor:
    """A micro-batch of a rank, [samples, tokens]."""
    return micro_batch(replace(MODEL, micro_batch=samples), step=0, micro_step=index, rank=rank)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """The loss of a batch."""
    loss: Tensor = model(batch)
    return loss


def job_of(work: Workload, hardware: Hardware, capacity_bytes: int) -> GlooJob:
    """The job on ranks that pretend to have so much memory for tensors."""
    whole = (capacity_bytes + RESERVED_BYTES) / (1 - RESERVED_SHARE)
    return GlooJob(
        workload=work,
        hardware=replace(hardware, memory_gib=(whole + 1024) / 2**30),
        world_size=RANKS,
        ranks_per_node=hardware.gpus_per_node,
        global_batch_size=SAMPLES * RANKS,
    )


@dataclass(frozen=True)
class Way:
    """What is timed: how the model is divided, and its micro-batch."""

    partition_size: int
    hierarchical: bool
    cache_parameters: str | float
    accumulate_gradients: str | float
    micro_batch: int

    @classmethod
    def of(cls, candidate: Candidate) -> Way:
        """The way of a candidate."""
        options = candidate.communication
        return cls(
            candidate.topology.partition_size,
            candidate.in_stages,
            options.cache_parameters,
            options.accumulate_gradients,
            candidate.batches.micro,
        )

    @property
    def communication(self) -> CommunicationOptions:
        """The options of its collectives."""
        return CommunicationOptions(
            hierarchical=self.hierarchical,
            cache_parameters=self.cache_parameters,  # type: ignore[arg-type]
            accumulate_gradients=self.accumulate_gradients,  # type: ignore[arg-type]
        )


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What the planner makes of one pretended memory.

    Attributes:
        capacity_bytes: Memory of a rank for tensors.
        chosen: The way that it chooses.
        flat: Flat full sharding with the largest micro-batch that fits.
        timed: These two and others that fit, with predicted seconds.
        fitting: Number of ways that fit.
    """

    capacity_bytes: int
    chosen: Way
    flat: Way
    timed: dict[Way, float]
    fitting: int


def cells_of(work: Workload, hardware: Hardware, compute: Mapping[int, float], places: Sequence[float]) -> list[Cell]:
    """The cells of a shape and a rate.

    Args:
        work: Work of the model.
        hardware: Calibrated hardware.
        compute: Measured seconds of a micro-step without communication, by micro-batch.
        places: Where each pretended memory lies between what the least way takes (0) and what the most does (1),
            on a logarithmic scale.
    """
    with one_after_the_other(compute):
        free = job_of(work, hardware, 2**40)
        sizes = [candidate.memory_bytes for candidate in free.candidates("auto", CommunicationOptions.AUTO)]
        memories = [int(min(sizes) * (max(sizes) / min(sizes)) ** place) + 1 for place in places]
        return [_cell(job_of(work, hardware, capacity), capacity) for capacity in memories]


def _cell(job: GlooJob, capacity_bytes: int) -> Cell:
    listed = list(job.candidates("auto", CommunicationOptions.AUTO))
    flat = full_sharding(job)
    chosen = fastest(listed, flat, full_sharding_tuned(job))
    fitting = sorted((each for each in listed if each.fits), key=lambda each: each.seconds.expected)
    best = fitting[0].seconds.expected
    near = [each for each in fitting if each.seconds.expected <= AS_FAST * best]
    far = [each for each in fitting if AS_FAST * best < each.seconds.expected <= RANGE * best]
    others = far[:: max(1, len(far) // OTHERS)][:OTHERS]
    timed = [chosen, flat, *near[:: max(1, len(near) // (2 * OTHERS))], *others]
    return Cell(
        capacity_bytes=capacity_bytes,
        chosen=Way.of(chosen),
        flat=Way.of(flat),
        timed={Way.of(each): each.seconds.expected for each in timed},
        fitting=len(fitting),
    )
