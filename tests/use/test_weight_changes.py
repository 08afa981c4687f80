"""Weights that users change, in any hook and by any means, are those of one process that does the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightning_mics import MiCSStrategy
from tests.support.trainers import make_trainer
from tests.use.teachers import (
    DIM,
    Block,
    Net,
    Teachers,
    assign_data,
    batches,
    change_data,
    lerp,
    unsharded,
    weights,
)

CACHES = {
    "gathered at every use": {"partition_size": 2, "cache_parameters": "never", "accumulate_gradients": "shard"},
    "cached by ranks": {"partition_size": 2, "cache_parameters": "rank", "accumulate_gradients": "rank"},
    "cached by nodes": {"partition_size": 4, "cache_parameters": "node", "accumulate_gradients": "node"},
}


def fit(module: pl.LightningModule, folder: str, options: dict[str, Any] | None, **trainer: Any) -> pl.LightningModule:
    """Fit for two optimizer steps in one process without ``options``, else on all ranks."""
    if options is None:
        return _run(module, make_trainer(folder, strategy="auto", devices=1, **trainer))
    strategy = MiCSStrategy(ranks_per_node=2, block_classes=[Block], **options)
    own = {"devices": dist.get_world_size(), "use_distributed_sampler": False, **trainer}
    return _run(module, make_trainer(folder, strategy=strategy, **own))


def _run(module: pl.LightningModule, trainer: pl.Trainer) -> pl.LightningModule:
    trainer.fit(module, batches(2 * trainer.accumulate_grad_batches))
    return module


def _follow(folder: str, options: dict[str, Any] | None, accumulate: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return weights(fit(Teachers(), folder, options, accumulate_grad_batches=accumulate))


@pytest.mark.parametrize(
    ("cache", "accumulate", "ranks"),
    [("gathered at every use", 1, 2), ("cached by ranks", 2, 4), ("cached by nodes", 2, 4)],
)
def test_moving_averages_of_teachers_hold_in_every_hook_by_every_means(
    cache: str, accumulate: int, ranks: int, tmp_path: Path, on_shared_ranks: Callable[..., list[Any]]
) -> None:
    expected = _follow(str(tmp_path), None, accumulate)
    start = weights(_seeded(Teachers))
    for of_rank in on_shared_ranks(_follow, str(tmp_path), CACHES[cache], accumulate, world_size=ranks):
        for name, value in expected.items():
            assert not torch.equal(value, start[name])  # it was changed
            torch.testing.assert_close(of_rank[name], value, msg=lambda text, n=name: f"{n}: {text}")


def _seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    return make()


class _ClippedBlock(Block):
    """A block that clips its weights in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.inner.weight.clamp_(-0.2, 0.2)
        self.inner.bias.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class _Clipping(pl.LightningModule):
    """Clips weights in the forward of a block, and normalizes those of the root in the step, before and after use."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.net.block = _ClippedBlock()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            weight = self.net.last.weight
            weight.div_(weight.norm(dim=1, keepdim=True))
        loss = F.mse_loss(self(batch[0]), batch[1])
        self.net.first.weight.data.clamp_(-0.3, 0.3)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.net.last.bias.data = self.net.last.bias.data * 0.5

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _clip(folder: str, options: dict[str, Any] | None, accumulate: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return weights(fit(_Clipping(), folder, options, accumulate_grad_batches=accumulate))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_clipped_in_a_forward_stay_clipped(
    accumulate: int, tmp_path: Path, on_shared_ranks: Callable[..., list[Any]]
) -> None:
    expected = _clip(str(tmp_path), None, accumulate)
    for of_rank in on_shared_ranks(_clip, str(tmp_path), CACHES["cached by ranks"], accumulate, world_size=2):
        for name, value in expected.items():
            torch.testing.assert_close(of_rank[name], value, msg=lambda text, n=name: f"{n}: {text}")


class _CompiledTeacher(pl.LightningModule):
    """A compiled student and teacher, changed by three means in the step; one rank alone looks at weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.teacher = Net(), Net().requires_grad_(False)
        for module in (self.net, self.teacher):
            module.compile(backend="aot_eager")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_rank == 0:
            assert self.net.last.weight.data.norm() > 0  # reading is no change, for any rank
        pairs = list(zip(self.teacher.parameters(), self.net.parameters(), strict=True))
        for way in (lerp, assign_data, change_data):
            way(pairs)
        with torch.no_grad():
            target = self.teacher(batch[0])
        return F.mse_loss(self.net(batch[0]), batch[1] + 0.1 * target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def _follow_compiled(folder: str, options: dict[str, Any] | None) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return weights(fit(_CompiledTeacher(), folder, options, accumulate_grad_batches=2))


@pytest.mark.campaign
def test_weights_of_compiled_modules_change_too(tmp_path: Path, on_shared_ranks: Callable[..., list[Any]]) -> None:
    expected = _follow_compiled(str(tmp_path), None)
    for of_rank in on_shared_ranks(_follow_compiled, str(tmp_path), CACHES["cached by nodes"]):
        for name, value in expected.items():
            torch.testing.assert_close(of_rank[name], value, msg=lambda text, n=name: f"{n}: {text}")


class _AssigningOptimizer(torch.optim.Optimizer):
    """Assigns ``.data``, as some optimizers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.data = parameter.data - 0.1 * parameter.grad.data


class _Training(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Assigning(_Training):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return _AssigningOptimizer(self.net.parameters())


def _assign(folder: str, options: dict[str, Any] | None) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return weights(fit(_Assigning(), folder, options).net)


def test_an_optimizer_that_assigns_data_trains(tmp_path: Path, on_shared_ranks: Callable[..., list[Any]]) -> None:
    expected = _assign(str(tmp_path), None)
    for of_rank in on_shared_ranks(_assign, str(tmp_path), CACHES["gathered at every use"], world_size=2):
        for name, value in expected.items():
            torch.testing.assert_close(of_rank[name], value, msg=lambda text, n=name: f"{n}: {text}")


class _Misassigning(_Training):
    """Assigns tensors that cannot be a parameter's, and others that can."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self._try(self.net.last.weight)  # unsharded
        self._try(self.net.block.inner.weight)
        return loss

    def _try(self, weight: Tensor) -> None:
        before = weight.data
        for value in (torch.ones(DIM), torch.ones(DIM, DIM, dtype=torch.float64)):
            with pytest.raises(ValueError, match="keeps its") as caught:
                weight.data = value
            self.messages.append(str(caught.value))
        weight.data = torch.full((DIM, DIM), 3.0)
        assert torch.equal(unsharded(weight), torch.full((DIM, DIM), 3.0))
        weight.data = before


def _misassign(folder: str) -> list[str]:
    module = fit(_Misassigning(), folder, CACHES["gathered at every use"], limit_train_batches=1)
    return module.messages  # type: ignore[return-value]


def test_data_of_another_shape_or_dtype_is_an_error_that_names_both(
    tmp_path: Path, on_shared_ranks: Callable[..., list[Any]]
) -> None:
    first, *others = on_shared_ranks(_misassign, str(tmp_path), world_size=2)
    assert all(other == first for other in others)
    assert "net.last.weight is sharded and keeps its shape (5, 5)" in first[0]
    assert "keeps its dtype torch.float32" in first[1] and "torch.float64" in first[1]
    assert "keeps its shape torch.Size([5, 5])" in first[2]


class _ChangingInStep(_Training):
    """Changes a root parameter in the step, by one of several means."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        weight = self.net.last.weight
        loss = super().training_step(batch, batch_idx)
        if self.change == "in place":
            with torch.no_grad():
                weight.mul_(0.99)
        elif self.change == "through data":
            weight.data.mul_(0.99)
        elif self.change == "to data":
            weight.data = weight.data * 0.99
        else:
            assert weight.data.norm() > 0  # reading it is no change
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            self.net.last.weight.mul_(0.99)
        self.net.last.bias.data = self.net.last.bias.data * 0.99


def _change_when_rounded(folder: str) -> dict[str, str]:
    messages = {}
    for change in ("in place", "through data", "to data"):
        torch.manual_seed(1)
        with pytest.raises(RuntimeError) as caught:
            fit(_ChangingInStep(change), folder, CACHES["gathered at every use"], precision="bf16-mixed")
        messages[change] = str(caught.value)
    module = fit(_ChangingInStep("none"), folder, CACHES["gathered at every use"], precision="bf16-mixed")
    assert module.net.last.weight.dtype == torch.float32
    return messages


def test_a_change_that_would_be_rounded_is_an_error_that_names_the_hooks(
    tmp_path: Path, on_shared_ranks: Callable[..., list[Any]]
) -> None:
    first, *others = on_shared_ranks(_change_when_rounded, str(tmp_path), world_size=2)
    assert all(other == first for other in others)
    for message in first.values():
        assert message.startswith("parameter net.last.weight was changed while it was unsharded in torch.bfloat16")
        assert "on_train_batch_end or on_before_optimizer_step" in message
