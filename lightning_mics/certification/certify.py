"""``certify``: the user's own module under the options of a job on a few forked ranks, beside one process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lightning_mics.certification.bench import Bench
from lightning_mics.certification.modules import Preparation
from lightning_mics.certification.report import CertifyReport
from lightning_mics.certification.scaling import scaled_jobs
from lightning_mics.integrations._precision import PRECISIONS
from lightning_mics.integrations.trainer.strategy import MiCSStrategy

BLOCKS = 2  # equal blocks that are kept: with the root's own parameters, all that schedules distinguish


def certify(
    module: Callable[[], nn.Module],
    batches: Sequence[Any] | Callable[[], Sequence[Any]],
    *,
    strategy: MiCSStrategy | None = None,
    shape: tuple[int, int] | None = None,
    job_shape: tuple[int, int] | None = None,
    accumulate: int = 2,
    resume_ranks: int | None = None,
    precision: str | None = None,
    clip_algorithm: str = "norm",
    shrink: bool = True,
    seconds: float = 300.0,
) -> CertifyReport:
    """Train a module under the options of a job on a few ranks of this machine, and compare it with one process.

    ::

        report = certify(MyModule, batches, strategy=MiCSStrategy(partition_size=16))
        print(report)
        report.raise_if_wrong()

    Ranks are forked, communicate over gloo, and count as nodes, so that every kind of group of the job exists; all
    options are the job's, sizes are scaled. They begin from different seeds, clip gradients, validate inside of
    accumulation windows, save in the middle, and resume: on as many ranks and on others, from a sharded checkpoint and
    from a full one. Everything is in float64, or float32 where the module has no kernel for it.

    Args:
        module: Class of the module, or a function that returns it: a LightningModule, or any module whose forward
            returns a loss.
        batches: Micro-batches of one rank, or a function that returns them.
        strategy: Strategy with the options of the job; None takes all defaults.
        shape: Nodes and ranks per node to run on; None takes as many as the job's kinds of groups need, two nodes of
            two or a little more.
        job_shape: Nodes and ranks per node of the job; None takes nodes of 8 ranks, and two replicas.
        accumulate: Micro-steps in an optimizer step.
        resume_ranks: Number of ranks that resume the checkpoint of the others; None takes half as many.
        precision: Precision of the job by Lightning's name, such as ``"bf16-mixed"``, in which it is compared as well,
            with one rank; None compares in float64 alone.
        clip_algorithm: How gradients are clipped: by ``"norm"`` or by ``"value"``.
        shrink: Whether the module is made small by itself; see :mod:`~lightning_mics.certification.shrinking`.
        seconds: Longest duration of each training.

    Raises:
        TypeError: If there are no batches.
        ValueError: If the options do not fit the job, or the number of ranks that resume.
        CannotCertifyError: If the module cannot be trained by one process, or not be made small enough.
    """
    began = time.monotonic()
    given = batches() if callable(batches) else batches
    if not isinstance(given, Sequence) or not given:
        raise TypeError(f"batches must be a list of micro-batches, or a function that returns one; got {given!r:.100}")
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate} must be at least 1: micro-steps in an optimizer step")
    if precision is not None and precision not in (*PRECISIONS, "64-true"):
        raise ValueError(f"precision={precision!r} is not one of {', '.join(map(repr, PRECISIONS))}")
    strategy = strategy or MiCSStrategy()
    jobs = scaled_jobs(strategy._policy.given, job_shape=job_shape, shape=shape)
    with tempfile.TemporaryDirectory(prefix="certify-") as folder:
        bench = Bench(
            jobs,
            Preparation(module, shrink=shrink, blocks=BLOCKS),
            given,
            Path(folder),
            make_strategy=partial(type(strategy), weights_only=strategy._weights_only),
            accumulate=accumulate,
            clip_algorithm=clip_algorithm,
            seconds=seconds,
        )
        report = bench.compare_all(resume_ranks, None if precision in ("32-true", "64-true") else precision)
    return replace(report, seconds=time.monotonic() - began)
