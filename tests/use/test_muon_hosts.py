"""Muon under the Trainer, Fabric and Accelerate: the weights of one process, checkpoints for any layout, precisions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.optim._muon as torch_muon
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from benchmarks.optimizers import in_float32
from lightning_mics import CommunicationOptions, TrafficMonitor
from lightning_mics._torch.dtensors.owned_rows import OwnedRows
from tests.support.accelerators import start as start_accelerate
from tests.support.fits import fit, whole_weights
from tests.support.loops import network, start
from tests.support.models import OneBlock, TinyModule, tokens
from tests.support.trainers import cases_on_ranks, make_trainer, mics
from tests.use.test_muon import ITERATION

LR, STEPS = 0.02, 3
NODE = CommunicationOptions.NODE.keywords()


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of blocks, and the other parameters."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "blocks" in name]
    return matrices, [p for _, p in named if not any(p is matrix for matrix in matrices)]


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, others = split(model)
    return [torch.optim.Muon(matrices, lr=LR), torch.optim.AdamW(others, lr=LR, eps=1e-3)]


class ByHand(TinyModule):
    """Two optimizers and manual optimization, as Lightning has it for more than one."""

    def __init__(self) -> None:
        super().__init__(kind=OneBlock)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self(batch)
        both = self.optimizers()
        for optimizer in both:
            optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(both[0], gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        for optimizer in both:
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return optimizers(self)


class Alone(TinyModule):
    """Muon as the only optimizer, by automatic optimization, with a schedule; all else is frozen."""

    def __init__(self) -> None:
        super().__init__(kind=OneBlock)

    def configure_optimizers(self) -> Any:
        matrices, others = split(self)
        for parameter in others:
            parameter.requires_grad_(False)
        optimizer = torch.optim.Muon(matrices, lr=LR)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Norms(Callback):
    """What a callback before the step sees: the norm of each matrix's gradient; and where rows then are."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.held: list[bool] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        for parameter in split(pl_module)[0]:
            self.norms.append(float(parameter.grad.norm(2)))
            self.held.append(isinstance(parameter.grad, OwnedRows) and parameter.grad.held is not None)


MODULES = {"by hand": ByHand, "alone": Alone}


def begun(folder: Path, name: str, size: int, state_dict_type: str) -> Any:
    strategy = mics(partition_size=size, state_dict_type=state_dict_type, **NODE)
    norms = Norms()
    trainer, recorder = fit(folder, MODULES[name], strategy=strategy, epochs=1, callbacks=[norms, TrafficMonitor()])
    trainer.save_checkpoint(folder / "one.ckpt")
    trainer, whole = fit(folder, MODULES[name], strategy=mics(partition_size=size, **NODE), epochs=2)
    return recorder.after_epoch[-1], whole.after_epoch[-1], norms.norms, norms.held


WORLD = 4


def resumed(folder: Path, name: str, size: int) -> dict[str, Tensor]:
    strategy = mics(partition_size=size, ranks_per_node=min(2, size), **NODE)
    _, recorder = fit(folder, MODULES[name], ckpt_path=folder / "one.ckpt", strategy=strategy, epochs=2)
    return recorder.after_epoch[-1]


def in_one_process(folder: Path, name: str, ckpt_path: Path | None = None) -> tuple[dict[str, Tensor], list[float]]:
    torch.manual_seed(0 if ckpt_path is None else 1)
    module, norms = MODULES[name](), Norms()
    trainer = make_trainer(folder, max_epochs=2, strategy="auto", devices=1, limit_val_batches=0, callbacks=[norms])
    trainer.fit(module, torch.utils.data.DataLoader(tokens(16), batch_size=8), ckpt_path=ckpt_path)
    return whole_weights(module), norms.norms


def under_fabric(precision: str = "32-true") -> dict[str, Tensor]:
    fabric, model = start(precision=precision, partition_size=4), network()
    both = optimizers(model)
    model, *both = fabric.setup(model, *both)
    for step in range(STEPS):
        fabric.backward(model(tokens(2, seed=10 * step + fabric.global_rank)))
        fabric.clip_gradients(model, both[0], max_norm=0.05)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    return whole_weights(model._forward_module)


def under_accelerate() -> dict[str, Tensor]:
    accelerator, model = start_accelerate(plugin={"partition_size": 4}), network()
    model, *both = accelerator.prepare(model, *optimizers(model))
    for step in range(STEPS):
        accelerator.backward(model(tokens(2, seed=10 * step + accelerator.process_index)))
        accelerator.clip_grad_norm_(model.parameters(), 0.05)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    return whole_weights(model)


def by_hand_alone(host: str) -> dict[str, Tensor]:
    """The loop in one process; Fabric clips the parameters of the optimizer that it is given."""
    model = network()
    clipped = split(model)[0] if host == "fabric" else list(model.parameters())
    both = optimizers(model)
    for step in range(STEPS):
        (sum(model(tokens(2, seed=10 * step + rank)) for rank in range(WORLD)) / WORLD).backward()
        nn.utils.clip_grad_norm_(clipped, 0.05)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    return whole_weights(model)


class Overflown(Alone):
    """The loss of one rank is infinite in the second step of an epoch. No norm: CPUs have none in two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.net.norm = nn.Identity()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if batch_idx == 1 and self.global_rank == 1 else loss


def in_16_bit(folder: Path, size: int) -> Any:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    trainer, recorder = fit(folder, Overflown, strategy=mics(partition_size=size, **NODE), epochs=2, plugins=[plugin])
    return recorder.after_epoch, trainer.strategy.skipped_steps


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("fits")
    torch_muon._zeropower_via_newtonschulz = in_float32
    try:
        fits = {
            (name, size, kind): partial(begun, folder / f"{name} {size} {kind}", name, size, kind)
            for name, size, kind in BEGUN
        }
        others = {
            ("resumed", *key, size): partial(resumed, folder / "{} {} {}".format(*key), key[0], size)
            for key in BEGUN
            for size in (1, 2, 4)
            if size != key[1]
        }
        hosts = {"fabric": under_fabric, "accelerate": under_accelerate}
        halves = {("16", size): partial(in_16_bit, folder / f"16 {size}", size) for size in (2, 4)}
        found = cases_on_ranks({**fits, **others, **hosts, **halves})
        fewer = {
            ("resumed", *key, "2 ranks"): partial(resumed, folder / "{} {} {}".format(*key), key[0], 2) for key in BEGUN
        }
        found |= cases_on_ranks(fewer, world_size=2)
    finally:
        torch_muon._zeropower_via_newtonschulz = ITERATION
    return found, folder


BEGUN = [("by hand", 4, "sharded"), ("alone", 2, "full")]


@pytest.fixture
def exact() -> Any:
    torch_muon._zeropower_via_newtonschulz = in_float32
    yield
    torch_muon._zeropower_via_newtonschulz = ITERATION


def close(ranks: list[dict[str, Tensor]], reference: dict[str, Tensor], tolerance: float = 5e-6) -> None:
    for of_rank in ranks:
        for name, value in reference.items():
            torch.testing.assert_close(of_rank[name], value, rtol=0, atol=tolerance)
            assert torch.equal(of_rank[name], ranks[0][name])


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("key", BEGUN)
def test_fits_are_those_of_one_process_and_callbacks_see_its_norms(key, results, tmp_path):
    found = results[0][key]
    reference, norms = in_one_process(tmp_path, key[0])
    close([whole for _, whole, *_ in found], reference)
    for *_, seen, held in found:
        assert seen == pytest.approx(norms[: len(seen)], rel=1e-4)
        assert all(held)


@pytest.mark.parametrize("key", BEGUN)
@pytest.mark.parametrize("layout", [1, 2, 4, "2 ranks"])
def test_checkpoints_resume_in_any_layout(key, layout, results):
    if layout == key[1]:
        pytest.skip("the layout that was saved")
    close(results[0][("resumed", *key, layout)], results[0][key][0][1])


@pytest.mark.usefixtures("exact")
def test_a_full_checkpoint_resumes_in_one_process(results, tmp_path):
    found, folder = results
    key = ("alone", 2, "full")
    weights, _ = in_one_process(tmp_path, "alone", folder / "alone 2 full" / "one.ckpt")
    close([weights], found[key][0][1])


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("host", ["fabric", "accelerate"])
def test_loops_of_hosts_train_to_the_weights_of_one_process(host, results):
    close(results[0][host], by_hand_alone(host))


@pytest.mark.parametrize("size", [2, 4])
def test_an_overflow_on_one_rank_skips_the_step_of_all(size, results):
    for after_epoch, skipped in results[0]["16", size]:
        assert skipped == 2  # one in each epoch
        for epoch, weights in enumerate(after_epoch):
            for name, value in weights.items():
                assert torch.equal(value, results[0]["16", size][0][0][epoch][name])
                assert bool(value.isfinite().all())
        assert not torch.equal(after_epoch[0]["net.blocks.0.up.weight"], after_epoch[1]["net.blocks.0.up.weight"])
