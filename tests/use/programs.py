"""Small programs, each with a way to use a model, trained on ranks and in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_mics import MiCSFabricStrategy, Topology, shard_model
from lightning_mics.sharding.options import CommunicationOptions
from lightning_mics.techniques.partition_groups import create_partition_groups
from tests.support.trainers import make_trainer, mics

DIM, BLOCKS, STEPS, BATCH = 6, 2, 4, 8

Use = Callable[["Program", Tensor, Tensor], Tensor]

NEVER = {"cache_parameters": "never", "accumulate_gradients": "shard"}
RANK = {"cache_parameters": "rank", "accumulate_gradients": "rank"}
NODE = {"cache_parameters": "node", "accumulate_gradients": "node"}


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, 2 * DIM + 1)
        self.down = nn.Linear(2 * DIM + 1, DIM)

    def encode(self, hidden: Tensor) -> Tensor:  # [batch, dim] -> [batch, 2 * dim + 1]
        return torch.tanh(self.up(hidden))

    def forward(self, hidden: Tensor) -> Tensor:  # [batch, dim] -> same
        return hidden + self.down(self.encode(hidden))


class Net(nn.Module):
    """Blocks between two layers of the root."""

    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.embed = nn.Linear(4, DIM)
        self.blocks = nn.ModuleList(block() for _ in range(BLOCKS))
        self.head = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:  # [batch, 4] -> [batch, 3]
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Program(pl.LightningModule):
    """A model, and the loss that ``use`` computes with it."""

    def __init__(self, use: Use, block: type[nn.Module] = Block, *, manual: bool = False) -> None:
        super().__init__()
        self.net, self.use, self.automatic_optimization = Net(block), use, not manual

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor | None:
        loss = self.use(self, *batch)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return None

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        with torch.enable_grad():
            self.use(self, *batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def mean_square(program: Program, x: Tensor, y: Tensor) -> Tensor:
    return functional.mse_loss(program.net(x), y)


def in_a_loop(program: Program, *, window: int = 1, steps: int = 0, **options: Any) -> dict[str, Tensor]:
    """Train in a loop that calls no forward of the root, only what the program uses; on all ranks or alone.

    Args:
        program: What is trained.
        window: Micro-steps of an optimizer step.
        steps: Micro-steps in all; by default those of two optimizer steps, the second of which shows what the first has
            left behind, momentum too.
        options: Partition size ``p``, and how ranks communicate.
    """
    if dist.is_initialized():
        topology = Topology(world_size=dist.get_world_size(), ranks_per_node=2, partition_size=options.pop("p", 2))
        communication = CommunicationOptions(**{**NEVER, **options})
        schedule = shard_model(
            program, create_partition_groups(topology, device_type="cpu"), communication=communication
        )
    else:
        schedule = None
    optimizer: Any = program.configure_optimizers()
    for index, batch in enumerate(batches()[: steps or 2 * window], start=1):
        if schedule is None:
            (program.use(program, *batch) / window).backward()
        else:
            with schedule.micro_step(boundary=index % window == 0):
                (program.use(program, *batch) / window).backward()
        if index % window == 0:
            optimizer.step()
            optimizer.zero_grad()
    return weights(program)


def in_trainer(
    program: Program, folder: Path, *, window: int = 1, validate: bool = False, **options: Any
) -> dict[str, Tensor]:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    trainer = make_trainer(
        folder,
        devices=ranks,
        strategy=mics(**{"partition_size": 2, **NEVER, **options}) if ranks > 1 else "auto",
        accumulate_grad_batches=window,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_train_batches=2 * window,
    )
    trainer.fit(program, loader(), loader() if validate else None)
    return weights(program)


def in_fabric(program: Program, *, window: int = 1, **options: Any) -> dict[str, Tensor]:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    strategy = MiCSFabricStrategy(**{"ranks_per_node": 2, "partition_size": 2, **NEVER, **options})
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy if ranks > 1 else "auto")
    fabric.launch()
    model, optimizer = fabric.setup(program, program.configure_optimizers())
    for index, batch in enumerate(batches()[: 2 * window], start=1):
        with fabric.no_backward_sync(model, enabled=index % window != 0):
            fabric.backward(model.training_step(batch, index) / window)
        if index % window == 0:
            optimizer.step()
            optimizer.zero_grad()
    return weights(program)


def batches() -> list[tuple[Tensor, Tensor]]:
    """This rank's part of each batch, [samples, 4] and [samples, 3]; one process has all of them."""
    generator = torch.Generator().manual_seed(0)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    return [
        (torch.randn(BATCH, 4, generator=generator)[own], torch.randn(BATCH, 3, generator=generator)[own])
        for _ in range(STEPS)
    ]


def loader() -> DataLoader[Any]:
    parts = batches()
    inputs, targets = (torch.cat([batch[i] for batch in parts]) for i in (0, 1))
    return DataLoader(TensorDataset(inputs, targets), batch_size=len(inputs) // STEPS)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole, on all ranks."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def seeded(*args: Any, **options: Any) -> Program:
    torch.manual_seed(0)
    return Program(*args, **options)


def outcome(action: Callable[[], Any]) -> Any:
    """What a call returns, or the type and message of its error."""
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
