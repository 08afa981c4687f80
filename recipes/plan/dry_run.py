"""Dry runs, without the machines of the job.

``dry_run=plan`` shows all ways to run the job in a table; ``dry_run=true`` rehearses the chosen one as well.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mics.planning import Hardware, Plan, Rehearsal, Workload, rehearse, weak_scaling
from lightning_mics.sharding.options import floating_dtype
from recipes.job.auto import ChosenJob, choose_automatically
from recipes.job.cluster_plan import asked, hardware_of
from recipes.models.language_model import LanguageModel
from recipes.plan.page import write_plan_page
from recipes.plan.tables import low_bit_line, plan_table, rehearsal_tables

WIDTH = 165  # of the tables, on narrow terminals too: whole numbers in broken lines, not broken numbers


class Training(nn.Module):
    """The network as a LightningModule holds it, whose forward is the training loss of a batch.

    Args:
        model: Model with the network and the loss.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.network = model.build_network()
        self._loss_of = model.loss_of

    def forward(self, batch: Any) -> Tensor:
        return self._loss_of(self.network, batch)


def dry_run(config: DictConfig, model: LanguageModel, *, command: Sequence[str]) -> None:
    """Print the plan of the run and its rehearsal, and write ``plan.html`` and ``plan.json`` to its folder.

    Args:
        config: Configuration, as composed by ``conf/train.yaml``.
        model: Model of the run, not built yet.
        command: What was typed, in words.

    Raises:
        ValueError: If the job is invalid: the batch cannot be split, the rank does not exist, or a block does not fit
            a device.
    """
    if config.dry_run not in (False, True, "plan"):
        raise ValueError(f"dry_run={config.dry_run!r} is not one of false, plan, true")
    console, begin = Console(width=max(WIDTH, Console().width)), time.perf_counter()
    job = choose_automatically(config, model)
    chosen = job.config
    console.print(job.choices, highlight=False, markup=False, soft_wrap=True)
    planned, hardware, scaling = job.planned, None, []
    if planned is not None:
        hardware = hardware_of(chosen.cluster)
        scaling = scaling_of(config, chosen, job.workload, hardware)
        console.print(plan_table(planned, config=chosen))
        for note in (*planned.warnings, low_bit_line(planned)):
            if note:
                console.print(f"Note: {note}.", highlight=False, soft_wrap=True)
    rehearsal = None if config.dry_run == "plan" else rehearse_run(job, model, rank=config.dry_run_rank)
    for table in rehearsal_tables(rehearsal, capacity_bytes=_capacity(chosen)) if rehearsal else ():
        console.print(table)
    folder = Path(config.run_dir)
    write_plan_page(
        folder / "plan.html",
        title=f"{config.name} on {chosen.cluster.instance or 'this machine'}",
        command=command,
        choices=job.choices,
        planned=planned,
        scaling=scaling,
        rehearsal=rehearsal,
        hardware=hardware,
        config=chosen,
    )
    (folder / "plan.json").write_text(json.dumps(as_json(planned, rehearsal), indent=1))
    seconds = time.perf_counter() - begin
    console.print(f"{folder}: plan.html, plan.json, after {seconds:.0f} s", soft_wrap=True)


def scaling_of(config: DictConfig, chosen: DictConfig, workload: Workload, hardware: Hardware) -> list[Plan]:
    """Plans for clusters of a partition group and more, with as much for each rank to do as in ``chosen``."""
    cluster = chosen.cluster
    per_node = cluster.ranks_per_node or cluster.devices
    fewest = max(1, chosen.strategy.partition_size // per_node)
    nodes = [fewest * factor for factor in (1, 2, 4, 8) if fewest * factor <= max(fewest, cluster.num_nodes)]
    return weak_scaling(
        workload,
        hardware,
        nodes=nodes,
        samples_per_rank=chosen.global_batch_size // (cluster.num_nodes * cluster.devices),
        ranks_per_node=per_node,
        micro_batch=chosen.data.batch_size,
        **asked(config),
    )


def rehearse_run(job: ChosenJob, model: LanguageModel, *, rank: int = 0) -> Rehearsal:
    """Rehearse one optimizer step of the run.

    Args:
        job: The run without "auto"; see :func:`~recipes.job.auto.choose_automatically`.
        model: Model of the run, not built yet.
        rank: Rank to rehearse.

    Raises:
        ValueError: If there is no such rank, or an option does not fit.
    """
    config, cluster = job.config, job.config.cluster
    strategy = OmegaConf.to_container(config.strategy, resolve=True)
    return rehearse(
        lambda: Training(model),
        model.example_batch(config.data.batch_size, config.data.sequence_length),
        loss=lambda training, batch: training(batch),
        topology=job.sharding.topology,
        rank=rank,
        micro_steps=config.trainer.accumulate_grad_batches,
        make_optimizer=lambda training: _optimizer(model, training),
        gradient_clip_val=config.trainer.gradient_clip_val,
        precision=cluster.precision,
        backend="nccl" if cluster.accelerator == "gpu" else "gloo",
        communication=job.sharding.communication,
        block_classes=strategy["block_classes"],
        activation_checkpointing=strategy["activation_checkpointing"],
        activation_offload=strategy["activation_offload"],
        offload=strategy["offload"],
        reduce_dtype=floating_dtype("reduce_dtype", strategy["reduce_dtype"]),
    )


def as_json(planned: Plan | None, rehearsal: Rehearsal | None) -> dict[str, Any]:
    """Both as plain data; None where there is none."""
    return {
        name: None if part is None else _plain(dataclasses.asdict(part))
        for name, part in {"plan": planned, "rehearsal": rehearsal}.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _capacity(config: DictConfig) -> int | None:
    return None if config.cluster.memory_gib is None else int(config.cluster.memory_gib * 2**30)


def _optimizer(model: LanguageModel, training: nn.Module) -> Optimizer:
    made = model.make_optimizer(training)
    return made["optimizer"] if isinstance(made, dict) else made
