"""The choice of an earlier run, which a run that resumes from its checkpoint keeps.

Another choice adds up gradients in another order, so losses would not continue bit for bit; and measured rates may
differ from day to day.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_mics.checkpoint.origin import saved_choice, saved_topology
from lightning_mics.policy.choice import Choice, ShardingJob, choose

KEPT = '"auto": as in the checkpoint'


def choice_of_checkpoint(meta: Mapping[str, Any], job: ShardingJob) -> tuple[Choice | None, str]:
    """The choice that a checkpoint has recorded, if it is one for this job too.

    Args:
        meta: Entries of the checkpoint; empty if there is none.
        job: Model and job that resume.

    Returns:
        The choice, or None, and what became of it in words: empty if the checkpoint has recorded none.
    """
    saved, topology = saved_choice(meta), saved_topology(meta)
    if not saved:
        return None, ""
    if topology is None or (topology.world_size, topology.ranks_per_node) != (job.world_size, job.ranks_per_node):
        before = f"{topology.world_size} ranks, {topology.ranks_per_node} per node" if topology else "another job"
        return None, f"chosen anew: the checkpoint is of {before}"
    frozen = saved.pop("frozen_on_ranks", 0.0)  # where it is not "auto" now it is given; it changes no sums
    asked = {name for name, value in job.given.items() if value == "auto"}
    if saved.keys() != asked - {"frozen_on_ranks"}:
        return None, 'chosen anew: other options are "auto" than in the run that saved the checkpoint'
    if "frozen_on_ranks" in asked:
        saved["frozen_on_ranks"] = frozen
    options = dict(saved)
    try:
        partition_size = options.pop("partition_size", job.partition_size)
        communication = replace(job.communication, **options)
        choice = choose(replace(job, partition_size=partition_size, communication=communication))
        communication.check(choice.topology)
    except (TypeError, ValueError):
        return None, "chosen anew: the options in the checkpoint do not fit this job"
    if not choice.fits:
        return None, "chosen anew: the options in the checkpoint leave too little memory here"
    reasons = {name: KEPT if name in saved and name != "hierarchical" else why for name, why in choice.reasons.items()}
    return replace(choice, reasons=reasons), "the choice of the checkpoint is kept"
