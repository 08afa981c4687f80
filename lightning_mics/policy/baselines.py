"""The systems that a plan holds MiCS against: FSDP2 over all ranks as its users run it, and DeepSpeed's ZeRO-2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Literal

from lightning_mics.cost.step_traffic import full_sharding_traffic
from lightning_mics.policy.candidates import Candidate, Job
from lightning_mics.policy.fastest import with_enough_tokens
from lightning_mics.sharding.options import CommunicationOptions
from lightning_mics.topology import Topology

FULL_SHARDING = "FSDP, ZeRO-3"
TUNED = "FSDP, tuned"
WITHOUT_RESHARDING = "FSDP, no reshard"
ZERO_2 = "ZeRO-2"


def full_sharding(job: Job) -> Candidate:
    """FSDP2 over all ranks with its defaults, and the largest micro-batch that fits.

    Args:
        job: Job to run.
    """
    return _largest(_sharded(_as_given(job), FULL_SHARDING, reshard_after_forward=True))


def full_sharding_tuned(job: Job) -> Candidate:
    """The fastest of FSDP2's own options over all ranks.

    They are what stays unsharded after a forward, when gradients are reduced, and where they are free, which share of
    the blocks is recomputed, and whether their inputs wait on the host.

    Args:
        job: Job to run.
    """
    places: tuple[Literal["shard", "rank"], ...] = ("shard", "rank")
    candidates = [
        candidate
        for reshard, accumulate in product((True, job.ranks_per_node, False), places)
        for candidate in _sharded(job, TUNED, reshard_after_forward=reshard, accumulate=accumulate)
    ]
    if job.workload.alternatives:  # the same guard as ours
        candidates = with_enough_tokens(candidates, job.workload.sample_tokens)
    return min(candidates, key=lambda candidate: (not candidate.fits, candidate.seconds.expected))


def unsharded_weights(job: Job) -> tuple[Candidate, Candidate]:
    """Two systems that hold all weights on each rank, both with the largest micro-batch that fits.

    The first is FSDP2 with ``reshard_after_forward=False``, which gathers weights once per micro-step and frees them
    after the backward. The second is ZeRO-2, which shards gradients and optimizer states only and gathers weights once
    per optimizer step; here this overlaps with arithmetic as other gathers do, which DeepSpeed's does not.

    Args:
        job: Job to run.
    """
    given = _as_given(job)
    options = replace(_FLAT, cache_parameters="rank")
    return (
        _largest(_sharded(given, WITHOUT_RESHARDING, reshard_after_forward=False)),
        _largest(given.priced(ZERO_2, _over_all_ranks(job), options)),
    )


_FLAT = replace(CommunicationOptions.PAPER, hierarchical=False)


def _as_given(job: Job) -> Job:
    """The job without the alternatives of recomputation and offload, which only a planner would choose from."""
    return replace(job, workload=replace(job.workload, alternatives=()))


def _sharded(
    job: Job, system: str, *, reshard_after_forward: bool | int, accumulate: Literal["shard", "rank"] = "shard"
) -> Iterator[Candidate]:
    return job.priced(
        system,
        _over_all_ranks(job),
        replace(_FLAT, accumulate_gradients=accumulate),
        traffic_of=partial(full_sharding_traffic, reshard_after_forward=reshard_after_forward),
        reshard_after_forward=reshard_after_forward,
    )


def _over_all_ranks(job: Job) -> Topology:
    return Topology(world_size=job.world_size, ranks_per_node=job.ranks_per_node, partition_size=job.world_size)


def _largest(candidates: Iterable[Candidate]) -> Candidate:
    """The candidate with the largest micro-batch that fits, or the smallest micro-batch."""
    listed = list(candidates)
    return next((candidate for candidate in reversed(listed) if candidate.fits), listed[0])
