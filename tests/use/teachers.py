"""A student and its teachers, one per hook and way of changing weights, in one LightningModule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

DIM = 5  # rows that neither two nor four ranks share evenly
MOMENTUM = 0.75


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Net(nn.Module):
    """``first`` and ``last`` are in the root's parameter group, the block is one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(DIM, DIM), Block(), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.block(self.first(x)))
        return out


Pairs = list[tuple[nn.Parameter, nn.Parameter]]  # teacher, student


def lerp(pairs: Pairs) -> None:
    with torch.no_grad():
        for teacher, student in pairs:
            teacher.lerp_(student, 1 - MOMENTUM)


def assign_data(pairs: Pairs) -> None:
    for teacher, student in pairs:
        teacher.data = teacher.data * MOMENTUM + student.data * (1 - MOMENTUM)


def change_data(pairs: Pairs) -> None:
    for teacher, student in pairs:
        teacher.data.mul_(MOMENTUM).add_(student.data, alpha=1 - MOMENTUM)


def foreach(pairs: Pairs) -> None:
    with torch.no_grad():
        torch._foreach_lerp_([teacher for teacher, _ in pairs], [student for _, student in pairs], 1 - MOMENTUM)


def copy_sum(pairs: Pairs) -> None:
    with torch.no_grad():
        for teacher, student in pairs:
            teacher.copy_(MOMENTUM * teacher + student * (1 - MOMENTUM))


def swap(pairs: Pairs) -> None:
    """Average, by way of a swap and a backup that was not cloned."""
    for teacher, student in pairs:
        average = teacher.data * MOMENTUM + student.data * (1 - MOMENTUM)
        backup, student.data = student.data, average
        teacher.data, student.data = student.data.clone(), backup


WAYS = (lerp, assign_data, change_data, foreach, copy_sum, swap)
HOOKS = (
    "training_step",
    "on_before_zero_grad",
    "on_before_backward",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_optimizer_step",
    "on_train_epoch_end",
)


class Teachers(pl.LightningModule):
    """Trains a net; teachers follow it in each hook, by each way in turn, and by all in ``training_step``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        ways = {hook: [WAYS[i % len(WAYS)]] for i, hook in enumerate(HOOKS)}
        ways["training_step"] = list(WAYS)
        self.ways: dict[str, Callable[[Pairs], None]] = {
            f"{h}-{w.__name__}": w for h, many in ways.items() for w in many
        }
        self.teachers = nn.ModuleDict({name: copy.deepcopy(self.net) for name in self.ways}).requires_grad_(False)

    def follow(self, hook: str) -> None:
        for name, way in self.ways.items():
            if name.startswith(f"{hook}-"):
                teacher, student = self.teachers[name], self.net
                pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
                crossed = [  # parameters of the root and of a block
                    (teacher.first.weight, student.block.inner.weight),
                    (teacher.block.inner.weight, student.first.weight),
                ]
                way(pairs)
                way(crossed)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.follow("training_step")
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)


def _hook(name: str) -> Callable[..., None]:
    def run(module: Teachers, *_: Any) -> None:
        module.follow(name)

    return run


for _name in HOOKS[1:]:
    setattr(Teachers, _name, _hook(_name))


def batches(count: int = 4) -> DataLoader[Any]:
    """The same on all ranks, so that their mean gradient is that of one process."""
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(*(torch.randn(2 * count, DIM, generator=generator) for _ in range(2)))
    return DataLoader(data, batch_size=2)


def unsharded(tensor: Tensor) -> Tensor:
    """All values of a tensor, sharded or not, on each rank."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: unsharded(value) for name, value in module.state_dict().items()}
