"""The run of a configuration, rehearsed: what one of its ranks would do, on this machine and without its GPUs."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mics.planning.rehearsal import Rehearsal, rehearse
from lightning_mics.topology import Topology
from recipes.language_model import LanguageModel

SHARDING = (
    "hierarchical",
    "shard_modules",
    "cross_node_gather",
    "cross_node_reduce",
    "in_node_gather",
    "in_node_reduce",
    "two_hop",
    "activation_checkpointing",
)
DTYPES = ("cross_node_dtype", "reduce_dtype")


class Training(nn.Module):
    """The network as a LightningModule holds it, whose forward is the training loss of a batch.

    Args:
        model: Whose network and loss.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.network = model.build_network()
        self._loss_of = model.loss_of

    def forward(self, batch: Any) -> Tensor:
        return self._loss_of(self.network, batch)


def rehearse_run(config: DictConfig, model: LanguageModel, *, rank: int = 0) -> Rehearsal:
    """Rehearse one optimizer step of the run.

    Args:
        config: Without "auto"; see :func:`~recipes.auto.choose_automatically`.
        model: Of the run.
        rank: Which rank to be.

    Raises:
        ValueError: If there is no such rank, or an option does not fit.
    """
    cluster, strategy = config.cluster, OmegaConf.to_container(config.strategy, resolve=True)
    topology = Topology(
        world_size=cluster.num_nodes * cluster.devices,
        ranks_per_node=cluster.ranks_per_node or cluster.devices,
        partition_size=config.strategy.partition_size,
    )
    options = {name: strategy[name] for name in SHARDING}
    options |= {name: strategy[name] and getattr(torch, strategy[name]) for name in DTYPES}
    return rehearse(
        lambda: Training(model),
        model.example_batch(config.data.batch_size, config.data.sequence_length),
        loss=lambda training, batch: training(batch),
        topology=topology,
        rank=rank,
        micro_steps=config.trainer.accumulate_grad_batches,
        make_optimizer=lambda training: _optimizer(model, training),
        gradient_clip_val=config.trainer.gradient_clip_val,
        precision=cluster.precision,
        backend="nccl" if cluster.accelerator == "gpu" else "gloo",
        **options,
    )


def _optimizer(model: LanguageModel, training: nn.Module) -> Optimizer:
    made = model.make_optimizer(training)
    return made["optimizer"] if isinstance(made, dict) else made
