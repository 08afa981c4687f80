"""Makes the checkpoints of a release, one of each format, with the losses that followed.

python -m tests.checkpoint.released.make 0.1.0

Run once per release, with the released package, and commit the folder. Its archives are never made again: a test loads
all of them with later versions of the package.
"""

from __future__ import annotations

import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_mics import MiCSFabricStrategy, MiCSStrategy
from lightning_mics.integrations.accelerate import MiCSPlugin
from tests.support.trainers import make_trainer, on_ranks

FOLDER = Path(__file__).parent
RANKS = 2  # that save
WIDTH = 5  # rows, which no number of ranks from 2 to 4 divides
SAMPLES = 12  # of all ranks, in each step
STEPS = 2  # before a checkpoint, and after it

KINDS = ("sharded", "full")
FORMATS = [f"{integration}-{kind}" for integration in ("trainer", "fabric", "accelerate") for kind in KINDS]


class Layer(nn.Module):
    """A block with one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:  # [samples, width] -> same
        return x + torch.tanh(x @ self.weight)


class Network(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor) -> Tensor:  # [samples, width] -> []
        for layer in self.layers:
            x = layer(x)
        return (x - 1).square().mean()


class Module(pl.LightningModule):
    """The same network for the Trainer, with noise from the ranks' random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Network()
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        noise = 0.1 * torch.randn(()) if self.trainer.world_size == RANKS else 0.0
        loss = self.net(batch + noise)
        self.losses.append(_mean(loss))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def options(kind: str) -> dict[str, Any]:
    ranks = dist.get_world_size()
    return {"ranks_per_node": ranks, "partition_size": ranks, "state_dict_type": kind}


def losses(name: str, path: Path, *, save: bool) -> list[float]:
    """Losses of the steps after a checkpoint, which is saved or loaded; every rank calls it.

    Args:
        name: One of :data:`FORMATS`.
        path: Path of the checkpoint.
        save: Whether to train and save first.
    """
    integration, kind = name.split("-")
    torch.manual_seed(0 if save else 1)
    return {"trainer": _of_trainer, "fabric": _of_fabric, "accelerate": _of_accelerate}[integration](path, kind, save)


def samples() -> Tensor:
    return torch.linspace(-1, 1, STEPS * SAMPLES * WIDTH).view(-1, WIDTH)


def _mean(loss: Tensor) -> float:
    whole = loss.detach().clone()
    dist.all_reduce(whole)
    return whole.item() / dist.get_world_size()


def _of_trainer(path: Path, kind: str, save: bool) -> list[float]:
    module = Module()
    sampler: DistributedSampler[Any] = DistributedSampler(samples(), shuffle=False)
    data = DataLoader(samples(), batch_size=SAMPLES // dist.get_world_size(), sampler=sampler)

    trainer = make_trainer(
        path.parent,
        devices=dist.get_world_size(),
        strategy=MiCSStrategy(**options(kind)),
        max_epochs=2,
        callbacks=[_SavesOnce(path)] if save else [],
        use_distributed_sampler=False,
    )
    trainer.fit(module, data, ckpt_path=None if save else path)
    return module.losses[-STEPS:]


class _SavesOnce(pl.Callback):
    """Saves after the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def _of_fabric(path: Path, kind: str, save: bool) -> list[float]:
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=MiCSFabricStrategy(**options(kind)))
    fabric.launch()
    model = fabric.setup_module(Network())
    optimizer = fabric.setup_optimizers(adamw(model))
    state = {"model": model, "optimizer": optimizer, "steps": STEPS}
    if save:
        _loop(model, optimizer, fabric.backward)
        fabric.save(path, state)
    else:
        fabric.load(path, {**state, "steps": 0})
    return _loop(model, optimizer, fabric.backward)


def _of_accelerate(path: Path, kind: str, save: bool) -> list[float]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, fsdp_plugin=MiCSPlugin(**options(kind)))
    network = Network()
    model, optimizer = accelerator.prepare(network, adamw(network))
    if save:
        _loop(model, optimizer, accelerator.backward)
        accelerator.save_state(str(path))
    else:
        accelerator.load_state(str(path))
    return _loop(model, optimizer, accelerator.backward)


def _loop(model: Any, optimizer: Any, backward: Any) -> list[float]:
    found = []
    for batch in samples().split(SAMPLES):
        loss = model(batch[dist.get_rank() :: dist.get_world_size()])
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(_mean(loss))
    return found


def make(folder: Path) -> None:
    """Make all checkpoints of a release in ``folder``."""
    folder.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        recorded = on_ranks(_make_all, Path(scratch), world_size=RANKS)[0]
        for name in FORMATS:
            with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as archive:
                archive.add(Path(scratch, name), name, filter=_without_owner)
    (folder / "losses.json").write_text(json.dumps(recorded, indent=1) + "\n")


def _make_all(scratch: Path) -> dict[str, list[float]]:
    return {name: losses(name, scratch / name, save=True) for name in FORMATS}


def _without_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    make(FOLDER / sys.argv[1])
