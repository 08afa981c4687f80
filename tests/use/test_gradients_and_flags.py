"""Gradients and ``requires_grad`` that users set while parameters are unsharded, and what steps show of parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mics import Topology, create_partition_groups, shard_model
from lightning_mics._torch.fsdp import _param_groups
from tests.use.teachers import Block, Net, unsharded, weights
from tests.use.test_weight_changes import CACHES, fit


class _Manual(pl.LightningModule):
    """Clears gradients after its forward, and trains parts of the root in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.automatic_optimization = Net(), False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.net.first.requires_grad_(batch_idx % 2 == 0)
        self.net.last.bias.requires_grad = batch_idx % 2 == 1
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        if batch_idx % 2:
            self.zero_grad()
        else:
            for parameter in self.parameters():
                parameter.grad = None
        self.manual_backward(loss)
        self.optimizers().step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Changing(_Manual):
    """Scales and masks gradients after each backward, in windows of two."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True
        self.sums: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(0.5)
        self.net.block.inner.weight.grad[2].zero_()
        self.sums.append(float(unsharded(self.net.first.weight.grad).abs().sum()))


class _Returning(_Manual):
    """Returns parameters and views of them from its steps, and keeps others until the epoch ends."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True
        self.seen: list[Tensor] = []
        self.kept: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        loss = F.mse_loss(self(batch[0]), batch[1])
        return {"loss": loss, "bias": self.net.last.bias, "row": self.net.last.weight[1]}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        self.seen += [unsharded(outputs["bias"]), unsharded(outputs["row"])]

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.kept.append(self.net.last.bias.detach()[1:])
        self(batch[0])

    def on_validation_epoch_end(self) -> None:
        self.seen += [unsharded(kept) for kept in self.kept]
        self.kept.clear()

    def val_dataloader(self) -> Any:
        from tests.use.teachers import batches

        return batches(2)


class _ReturningBlock(Block):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.inner.weight


class _Tying(_Manual):
    """Uses the weight of a block, which its forward returns, after that forward; an output tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True
        self.net.block = _ReturningBlock()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden, weight = self.net.block(self.net.first(batch[0]))
        return F.mse_loss(self.net.last(hidden) @ weight.t(), batch[1])


def _train(
    kind: type[pl.LightningModule], folder: str, options: dict[str, Any] | None, accumulate: int
) -> dict[str, Tensor]:
    torch.manual_seed(1)
    trainer = {"accumulate_grad_batches": accumulate} if accumulate > 1 else {}
    module: Any = fit(kind(), folder, options, num_sanity_val_steps=0, **trainer)
    return {
        **weights(module),
        "sums": torch.tensor(getattr(module, "sums", [])),
        **{f"seen {i}": value for i, value in enumerate(getattr(module, "seen", []))},
    }


@pytest.mark.parametrize(("cache", "ranks"), [("gathered at every use", 2), ("cached by ranks", 4)])
@pytest.mark.parametrize(
    ("kind", "accumulate"),
    [(_Manual, 1), (_Changing, 2), (_Returning, 1), (_Returning, 2), (_Tying, 2)],
    ids=["cleared and frozen in a step", "changed after each backward", "returned", "returned, accumulated", "tied"],
)
def test_what_users_set_and_see_is_that_of_one_process(
    kind: type[pl.LightningModule],
    accumulate: int,
    cache: str,
    ranks: int,
    tmp_path: Path,
    on_shared_ranks: Callable[..., list[Any]],
) -> None:
    expected = _train(kind, str(tmp_path), None, accumulate)
    for of_rank in on_shared_ranks(_train, kind, str(tmp_path), CACHES[cache], accumulate, world_size=ranks):
        assert of_rank.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(of_rank[name], value, msg=lambda text, n=name: f"{n}: {text}")


class _Calling(_Manual):
    def __init__(self, through_forward: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.through_forward = True, through_forward

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]) if self.through_forward else self.net(batch[0]), batch[1])


def _bytes_sent(folder: str, through_forward: bool) -> int:
    module = fit(_Calling(through_forward), folder, CACHES["gathered at every use"])
    return sum(
        sent.inside_bytes + sent.between_bytes for sent in module.trainer.strategy.traffic.by_technique().values()
    )


def test_a_step_that_calls_its_own_forward_sends_as_much(tmp_path: Path, on_shared_ranks: Any) -> None:
    through_forward = on_shared_ranks(_bytes_sent, str(tmp_path), True, world_size=2)
    assert through_forward == on_shared_ranks(_bytes_sent, str(tmp_path), False, world_size=2)
    assert through_forward[0] > 0


class _Keeping(nn.Linear):
    """Keeps its weight, of the last forward, if asked to."""

    keeps, kept = False, None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = [self.weight] if self.keeps else None
        return super().forward(x)


def _unsharded_bytes() -> list[int]:
    """Bytes of unsharded blocks while a graph holds the blocks' weights, and while a user holds one of them too."""
    model = nn.Sequential(*(_Keeping(6, 6) for _ in range(3)))
    topology = Topology(world_size=2, ranks_per_node=2, partition_size=2)
    shard_model(model, create_partition_groups(topology, device_type="cpu"), block_classes=[_Keeping])
    groups = [group for block in model for group in _param_groups(block)]
    found = []
    for model[1].keeps in (False, True):
        loss = model(torch.ones(2, 6)).sum()
        memory = [out.untyped_storage() for g in groups for p in g.fsdp_params for out in p.all_gather_outputs]
        found.append(sum(storage.nbytes() for storage in memory))
        loss.backward()
    return found


def test_blocks_are_freed_after_their_forward_unless_a_user_holds_a_weight(on_shared_ranks: Any) -> None:
    for bytes_held, with_a_kept_weight in on_shared_ranks(_unsharded_bytes, world_size=2):
        assert bytes_held == 0
        assert with_a_kept_weight == 6 * 6 * 4
