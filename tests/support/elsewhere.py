"""One small training under several strategies, and without any: losses before and after a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from lightning.fabric import Fabric
from lightning.fabric.strategies import FSDPStrategy as FabricFSDP
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    fully_shard,
    fully_sharded_data_parallel,
)
from torch.distributed.fsdp._common_utils import _FSDPDeviceHandle
from torch.utils.data import DataLoader, DistributedSampler

from tests.support.models import Block, OneBlock, TinyLM, TinyModule, tokens
from tests.support.trainers import make_trainer

SAMPLES = 12  # of all ranks, in each step
BEFORE, AFTER = 2, 2  # steps before and after a checkpoint
DISTRIBUTED = "_save_distributed_checkpoint"  # of strategies: whether they save shards


class TrainerFSDP(FSDPStrategy):
    """FSDP on CPUs, which Lightning rejects for the class itself."""


class LoopFSDP(FabricFSDP):
    """The same for Fabric."""


@contextmanager
def fsdp_on_cpus() -> Iterator[None]:
    """Let torch's first FSDP run on CPUs: it has a handle for them and does not choose it, and tensors that it offloads
    from there are freed, or others are gathered into them.
    """

    def init(state: Any, *_: Any) -> Any:
        state._device_handle = _FSDPDeviceHandle.from_device(torch.device("cpu"))
        return state

    def config(*, offload_to_cpu: bool, rank0_only: bool) -> Any:
        return FullStateDictConfig(rank0_only=rank0_only)

    def optimizer_config(*, offload_to_cpu: bool, rank0_only: bool) -> Any:
        return FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only)

    with (
        patch.object(fully_sharded_data_parallel, "_init_device_handle", init),
        patch.object(torch.distributed.fsdp, "FullStateDictConfig", config),
        patch.object(torch.distributed.fsdp.api, "FullOptimStateDictConfig", optimizer_config),
    ):
        yield


def shard_blocks(network: nn.Module, mesh: Any) -> nn.Module:
    for module in network.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    return network


def make_network(seed: int = 1) -> TinyLM:
    torch.manual_seed(seed)
    return OneBlock()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Weights decay, and others do not; by name, since torch's first FSDP has flat parameters only."""
    decaying = [p for name, p in model.named_parameters() if name.endswith("weight") and "norm" not in name]
    others = [p for name, p in model.named_parameters() if name.endswith("bias") or "norm" in name]
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": others}]
    return torch.optim.AdamW(groups, lr=0.02, weight_decay=0.0, foreach=True)


def batch(step: int) -> Tensor:
    """This rank's part of the samples of a step."""
    return tokens(SAMPLES, seed=step)[dist.get_rank() :: dist.get_world_size()]


def mean(loss: Tensor) -> float:
    """The mean over ranks."""
    whole = loss.detach().clone()
    dist.all_reduce(whole)
    return whole.item() / dist.get_world_size()


# -- Trainer -----------------------------------------------------------------------------------------------------------


class Trained(TinyModule):
    """Trained with AdamW in two groups, and a schedule of learning rates per step."""

    def __init__(self) -> None:
        super().__init__(kind=OneBlock)

    def configure_optimizers(self) -> Any:
        optimizer = adamw(self)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TrainedSharded(Trained):
    """For Lightning's ModelParallelStrategy, which leaves sharding to the module."""

    def configure_model(self) -> None:
        shard_blocks(self.net, self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


@contextmanager
def full_files(strategy: Any) -> Iterator[None]:
    """Let a strategy save one file instead of shards."""
    name, value = ("_state_dict_type", "full") if hasattr(strategy, "_state_dict_type") else (DISTRIBUTED, False)
    with patch.object(strategy, name, value):
        yield


class Saving(Callback):
    """Records losses, counts steps across runs, and saves once after an epoch, in shards and in one file."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.losses, self.counted = path, [], 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(mean(outputs["loss"]))
        self.counted += 1

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.path is not None and trainer.global_step == BEFORE:
            trainer.save_checkpoint(self.path)
            with full_files(trainer.strategy):
                trainer.save_checkpoint(full(self.path))

    def state_dict(self) -> dict[str, Any]:
        return {"counted": self.counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counted = state["counted"]


def full(path: Path) -> Path:
    """The full file beside a sharded checkpoint."""
    return path.with_name(f"{path.name} full")


def one_epoch() -> DataLoader[Any]:
    data = torch.cat([tokens(SAMPLES, seed=step) for step in range(BEFORE)])
    sampler: DistributedSampler[Any] = DistributedSampler(data, shuffle=False)
    return DataLoader(data, batch_size=SAMPLES // dist.get_world_size(), sampler=sampler)


def trainer_losses(
    strategy: Any,
    *,
    save: Path | None = None,
    resume: Path | None = None,
    make: Callable[[], pl.LightningModule] = Trained,
) -> list[float]:
    """A fit of two epochs, which saves twice after the first, in shards and in one file, or resumes from there.

    Returns:
        Losses of the second epoch, the steps that a callback has counted, and the last learning rate.
    """
    torch.manual_seed(0 if resume is None else 1)
    saving = Saving(save)
    trainer = make_trainer(
        Path("."),
        devices=dist.get_world_size(),
        strategy=strategy,
        max_epochs=(BEFORE + AFTER) // BEFORE,
        limit_val_batches=0,
        callbacks=[saving],
        use_distributed_sampler=False,
    )
    trainer.fit(make(), one_epoch(), ckpt_path=resume)
    assert trainer.global_step == BEFORE + AFTER
    return [*saving.losses[-AFTER:], saving.counted, trainer.optimizers[0].param_groups[0]["lr"]]


# -- loops -------------------------------------------------------------------------------------------------------------


@dataclass
class Loop:
    """A model and its optimizer in a loop of one's own.

    Attributes:
        model: The model, set up.
        optimizer: Optimizer of the model.
        backward: Function that runs the backward of a loss.
        host: Fabric or Accelerator.
    """

    model: Any
    optimizer: Any
    backward: Callable[[Tensor], Any]
    host: Any = None

    def before(self) -> None:
        """Train until the checkpoint."""
        self._train(range(BEFORE))

    def after(self) -> list[float]:
        """Train on after the checkpoint; returns the losses."""
        return self._train(range(BEFORE, BEFORE + AFTER))

    def _train(self, steps: Iterable[int]) -> list[float]:
        losses = []
        for step in steps:
            loss = self.model(batch(step))
            self.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(mean(loss))
        return losses


def fabric_loop(strategy: Any, *, seed: int = 1) -> Loop:
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy)
    fabric.launch()
    model = fabric.setup_module(make_network(seed))
    return Loop(model, fabric.setup_optimizers(adamw(model)), fabric.backward, fabric)


def fabric_save(loop: Loop, path: Path, keys: tuple[str, str] = ("model", "optimizer")) -> None:
    """Save in shards and in one file."""
    state = {keys[0]: loop.model, keys[1]: loop.optimizer, "step": BEFORE}
    loop.host.save(path, state)
    with full_files(loop.host.strategy):
        loop.host.save(full(path), state)


def fabric_load(
    loop: Loop, path: Path, keys: tuple[str, str] = ("model", "optimizer"), *, entry: bool = True
) -> list[float]:
    """Load, with one more entry of the state if there is one, and train on."""
    state = {keys[0]: loop.model, keys[1]: loop.optimizer, **({"step": 0} if entry else {})}
    loop.host.load(path, state)
    assert not entry or state["step"] == BEFORE
    return loop.after()


def for_fabric(network: nn.Module, mesh: Any) -> nn.Module:
    """What Fabric's ModelParallelStrategy is given."""
    return fully_shard(shard_blocks(network, mesh["data_parallel"]), mesh=mesh["data_parallel"])


def fsdp2() -> Accelerator:
    """Accelerate's own FSDP2, which it drops on CPUs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type="SHARDED_STATE_DICT",
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    state = accelerator.state
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = plugin
    return accelerator


def accelerate_ddp() -> Accelerator:
    """Accelerate with DistributedDataParallel."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def accelerate_loop(accelerator: Accelerator, *, seed: int = 1) -> Loop:
    network = make_network(seed)
    model, optimizer = accelerator.prepare(network, adamw(network))
    return Loop(model, optimizer, accelerator.backward, accelerator)


def accelerate_save(loop: Loop, path: Path) -> None:
    """Save in shards and in one file."""
    for kind, target in (("SHARDED", path), ("FULL", full(path))):
        use_kind(loop, kind)
        loop.host.save_state(str(target))


def use_kind(loop: Loop, kind: str) -> None:
    """Let a plugin save and load files of a kind, "SHARDED" or "FULL"."""
    plugin = loop.host.state.fsdp_plugin
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type(f"{kind}_STATE_DICT")


def accelerate_load(loop: Loop, path: Path) -> list[float]:
    use_kind(loop, "FULL" if path.name.endswith("full") else "SHARDED")
    loop.host.load_state(str(path))
    return loop.after()


def plain_loop(*, seed: int = 1) -> Loop:
    """A loop of torch's own, sharded by ``fully_shard``."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(shard_blocks(make_network(seed), mesh), mesh=mesh)
    return Loop(model, adamw(model), Tensor.backward)
