"""The loop of the systems that are strategies of Lightning: one ``Trainer.fit``, one epoch per phase, nothing extra."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.comparison.job import Job
from benchmarks.comparison.workload import build_model, make_optimizer


class PhaseData(Dataset[Tensor]):
    """This rank's micro-batches of one phase, in order."""

    def __init__(self, job: Job, phase_index: int) -> None:
        self._job = job
        self._first_step = job.plan.first_step(phase_index)
        self._phase = job.plan.phases[phase_index]

    def __len__(self) -> int:
        return self._phase.all_steps * self._phase.micro_steps

    def __getitem__(self, index: int) -> Tensor:
        step, micro_step = divmod(index, self._phase.micro_steps)
        return self._job.micro_batch(step=self._first_step + step, micro_step=micro_step)


class ComparedModule(pl.LightningModule):
    """The workload as an ordinary LightningModule."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model = build_model(job.workload)
        self.losses: list[Tensor] = []  # of the micro-steps since the last optimizer step
        self._job = job

    def training_step(self, tokens: Tensor, batch_index: int) -> Tensor:
        """The loss of one micro-step."""
        loss = self.model(tokens)
        self.losses.append(loss.detach())
        return loss

    def train_dataloader(self) -> DataLoader[Tensor]:
        """The data of the current epoch, which is a phase."""
        return DataLoader(PhaseData(self._job, self.trainer.current_epoch), batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The plan's optimizer."""
        return make_optimizer(self._job.workload, self.parameters(), name=self._job.plan.optimizer)


class Measurement(pl.Callback):
    """Tells the recorder where phases begin and steps end."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch is a phase."""
        self._job.recorder.begin_phase(trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """A batch is a micro-step."""
        assert isinstance(pl_module, ComparedModule)
        if (batch_idx + 1) % self._job.plan.phases[trainer.current_epoch].micro_steps == 0:
            self._job.recorder.finish_step(torch.stack(pl_module.losses).mean().item())
            pl_module.losses.clear()


def train_in_trainer(job: Job, module: ComparedModule, *, strategy: Strategy) -> None:
    """Fit ``module``; the process group and the ranks are there already."""
    accumulation = {index: phase.micro_steps for index, phase in enumerate(job.plan.phases)}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=job.ranks_per_node,
        num_nodes=job.nodes,
        strategy=strategy,
        plugins=[TorchElasticEnvironment()],
        callbacks=[GradientAccumulationScheduler(accumulation), Measurement(job)],
        max_epochs=len(job.plan.phases),
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
