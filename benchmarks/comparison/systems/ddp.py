"""torch's DistributedDataParallel: every rank holds everything, gradients are all-reduced once per optimizer step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.nn.parallel import DistributedDataParallel

from benchmarks.comparison.bare_loop import train_in_bare_loop
from benchmarks.comparison.job import Job
from benchmarks.comparison.workload import build_model, make_optimizer

PACKAGES: tuple[str, ...] = ()


def train(setting: str | None, job: Job) -> None:
    """Train under DDP; ``no_sync`` until the boundary (``static_graph`` is left out: it fails there in torch 2.13)."""
    model = DistributedDataParallel(build_model(job.workload), gradient_as_bucket_view=True)
    optimizer = make_optimizer(job.workload, model.parameters(), name=job.plan.optimizer)
    job.notes.append("no_sync before the boundary; gradient_as_bucket_view=True")

    def micro_step(*, boundary: bool) -> AbstractContextManager[None]:
        return nullcontext() if boundary else model.no_sync()

    train_in_bare_loop(job, model, optimizer, micro_step=micro_step)
