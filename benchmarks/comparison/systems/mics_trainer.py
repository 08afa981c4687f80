"""This package as Lightning users have it: ``Trainer(strategy=MiCSStrategy(...))``, all its choices left at "auto"."""

from __future__ import annotations

from benchmarks.comparison.job import Job
from benchmarks.comparison.lightning_loop import ComparedModule, train_in_trainer
from benchmarks.comparison.systems import mics, partition_nodes
from lightning_mics import MiCSStrategy

PACKAGES: tuple[str, ...] = ("lightning",)


def train(setting: str | None, job: Job) -> None:
    """Train under Lightning's Trainer with an ordinary LightningModule."""
    assert setting is not None  # every system of this module has one
    partition_size = partition_nodes(setting, nodes=job.nodes) * job.ranks_per_node
    job.notes.append(f"MiCSStrategy(partition_size={partition_size})")
    strategy = MiCSStrategy(partition_size=partition_size)
    job.recorder.account = lambda: mics.sent_by_node(strategy.traffic, job)
    train_in_trainer(job, ComparedModule(job), strategy=strategy)
