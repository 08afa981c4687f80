"""DeepSpeed ZeRO-2 over all ranks: each holds all parameters, and its shard of gradients and optimizer states.

Gradients cross nodes in every micro-step, parameters once per optimizer step, after it.
"""

from __future__ import annotations

from benchmarks.comparison.deepspeed_loop import train_in_engine
from benchmarks.comparison.job import Job

PACKAGES: tuple[str, ...] = ("deepspeed",)


def train(setting: str | None, job: Job) -> None:
    """Train under ZeRO-2."""
    del setting  # there is only one
    train_in_engine(job, {"stage": 2, "reduce_scatter": True})
