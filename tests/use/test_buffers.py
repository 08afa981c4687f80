"""Buffers that a forward changes: once where it is recomputed, and rank 0's where ranks change them, as under DDP."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader

from tests.support.beside_ddp import OPTIONS, largest_gap, rank_inputs, shard, train
from tests.support.trainers import make_trainer, mics

CLOSE = pytest.approx(0, abs=1e-6)


class Normalized(nn.Module):
    """Running statistics, a power iteration and its own count of forwards."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:  # [samples, 4] -> same
        self.calls += 1
        return x + self.norm(self.linear(x)) / self.calls


class Queue(nn.Module):
    """A memory bank with its pointer, which each forward reads and extends."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("bank", torch.zeros(8, 4))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:  # [samples, 4] -> same
        out = self.linear(x) + torch.softmax(x @ self.bank.clone().T, dim=1) @ self.bank.clone()
        rows = (self.pointer + torch.arange(len(x))) % len(self.bank)
        self.bank.data[rows] = out.detach()
        self.pointer = (self.pointer + len(x)) % len(self.bank)
        return out


class Codebook(nn.Module):
    """A codebook that is a moving average, changed through ``.data``, and a scale that begins at the first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("codes", torch.arange(20.0).view(5, 4) / 20)
        self.register_buffer("scale", None)
        self.register_buffer("mask", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [samples, 4] -> same
        hidden = self.linear(x) * self.mask
        codes = self.codes.clone()
        nearest = torch.cdist(hidden, codes).argmin(dim=1)
        self.codes.data.lerp_(self.codes + hidden.detach().mean(dim=0), 0.1)
        if self.scale is None:
            self.scale = hidden.detach().abs().mean(dim=0)
        return hidden * self.scale + torch.tanh(hidden * codes[nearest])


def network(block: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"blocks": nn.Sequential(block(), block())})["blocks"])


BLOCKS: list[type[nn.Module]] = [Normalized, Queue, Codebook]


# -- recomputed --------------------------------------------------------------------------------------------------------


def test_a_recomputed_block_changes_its_buffers_once_and_has_the_gradients_of_its_forward(run_shared):
    for gaps in run_shared(2, _recomputed_gaps):
        assert gaps == dict.fromkeys(gaps, CLOSE)
        assert len(gaps) == 4


def _recomputed_gaps() -> dict[str, float]:
    gaps = {}
    for block in BLOCKS:
        options: dict[str, Any] = {"accumulate": 2, "steps": 2}
        by_ddp = train(partial(network, block), "ddp", **options)
        recomputed = train(
            partial(network, block), "rank", activation_checkpointing=True, block_classes=[block], **options
        )
        gaps[block.__name__] = largest_gap(by_ddp, recomputed)
    options = {"steps": 2, "block_classes": []}
    whole = train(partial(network, Queue), "every", activation_checkpointing=["Sequential"], **options)
    gaps["a list of modules"] = largest_gap(whole, train(partial(network, Queue), "every", **options))
    return gaps


def test_retained_graphs_and_shared_buffers_are_recomputed_from_the_same_values(run_shared):
    for first, second in run_shared(2, _backward_twice):
        assert torch.equal(first, second)


def _backward_twice() -> tuple[Tensor, Tensor]:
    model = network(Queue)
    blocks: Any = model[1]
    blocks[1].bank, blocks[1].pointer = blocks[0].bank, blocks[0].pointer
    shard(model, block_classes=[Queue], activation_checkpointing=True)
    loss = model(rank_inputs(0)).square().mean()
    gradients = []
    for _ in range(2):
        loss.backward(retain_graph=True)
        gradients.append(blocks[0].linear.weight.grad.full_tensor().clone())
        model.zero_grad()
    return gradients[0], gradients[1]


# -- changed by ranks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_goes_on_from_the_buffers_of_rank_0_as_under_ddp(run_shared, accumulate):
    for gaps in run_shared(4, _gaps_of_ranks, accumulate):
        assert gaps == dict.fromkeys(gaps, CLOSE)


def _gaps_of_ranks(accumulate: int) -> dict[str, float]:
    gaps = {}
    for block in (Queue, Codebook):
        options: dict[str, Any] = {"steps": 3, "accumulate": accumulate}
        by_ddp = train(partial(network, block), "ddp", **options)
        for mode in OPTIONS if block is Queue and accumulate == 2 else ["every"]:
            ours = train(partial(network, block), mode, block_classes=[block], **options)
            gaps[f"{block.__name__}, {mode}"] = largest_gap(by_ddp, ours)
    return gaps


def test_an_evaluation_uses_the_buffers_of_rank_0(run_shared):
    results = run_shared(2, _evaluate)
    assert all(torch.equal(outputs["equal"], results[0]["equal"]) for outputs in results)
    assert not torch.equal(results[1]["own"], results[0]["own"])


def _evaluate() -> dict[str, Tensor]:
    outputs = {}
    for name, broadcast in (("equal", True), ("own", False)):
        torch.manual_seed(0)
        model = network(Normalized)
        shard(model, block_classes=[Normalized], broadcast_buffers=broadcast)
        model(rank_inputs(0)).sum().backward()
        model.eval()
        with torch.no_grad():
            outputs[name] = model(torch.ones(1, 4))
    return outputs


def test_only_buffers_that_differ_are_sent_and_counted(run_shared):
    for sent in run_shared(2, _sent_bytes):
        assert sent["none"] == sent["constant"] == sent["equal on all ranks"] == 0
        of_a_window = 4 * 4 * 1 / 2  # features, float32, (ranks - 1) / ranks
        assert sent["statistics"] == 6 * 2 * of_a_window  # after window 1
        assert sent["statistics from window 2"] == 2 * of_a_window  # compared after window 3, known after window 5


def _sent_bytes() -> dict[str, float]:
    class Constant(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("mask", torch.ones(4, 4))

    class Late(nn.Linear):
        windows = 0

        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.windows += 1
            if self.windows > 1:
                self.mean.copy_(x.mean(dim=0))
            return super().forward(x)

    networks: dict[str, nn.Module] = {
        "none": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        "constant": nn.Sequential(Constant(), Constant()),
        "equal on all ranks": nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4)),
        "statistics": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        "statistics from window 2": nn.Sequential(Late(), nn.Linear(4, 4)),
    }
    sent = {}
    for name, model in networks.items():
        schedule = shard(model, block_classes=[])
        for step in range(7):
            model(rank_inputs(step)).sum().backward()
        of_buffers = schedule.traffic.by_technique().get("broadcast of buffers")
        sent[name] = of_buffers.inside_bytes + of_buffers.between_bytes if of_buffers else 0.0
    return sent


# -- saved -------------------------------------------------------------------------------------------------------------


class Module(LightningModule):
    """A network with running statistics and a queue in a Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Queue(), nn.BatchNorm1d(4))
        self.losses: list[float] = []

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.network(batch).square().mean()
        self.losses.append(float(loss))
        return loss

    def validation_step(self, batch: Tensor) -> None:
        self.log("loss", self.network(batch).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def samples() -> DataLoader[Any]:
    return DataLoader(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), batch_size=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_what_was_validated_is_what_is_saved_and_training_resumes_bit_for_bit(on_shared_ranks, tmp_path, kind):
    results = on_shared_ranks(_fit_and_resume, tmp_path, kind, world_size=2)
    assert {result["validated"] for result in results} == {results[0]["validated"]}
    for result in results:
        assert result["of rank 0"]
        assert result["loaded"] == result["validated"]
        assert result["resumed"] == result["undisturbed"][2:]


def _fit_and_resume(folder: Any, kind: str) -> dict[str, Any]:
    def trainer(epochs: int) -> Any:
        strategy = mics(partition_size=1, state_dict_type=kind, block_classes=[])
        return make_trainer(folder, strategy=strategy, devices=2, max_epochs=epochs, num_sanity_val_steps=0)

    torch.manual_seed(0)
    undisturbed, saved, resumed = Module(), Module(), Module()
    resumed.load_state_dict(undisturbed.state_dict())
    saved.load_state_dict(undisturbed.state_dict())
    trainer(2).fit(undisturbed, samples())
    first = trainer(1)
    first.fit(saved, samples())
    mine = {name: buffer.clone() for name, buffer in saved.named_buffers()}
    first.save_checkpoint(folder / "saved.ckpt")
    dist.broadcast_object_list(of_rank_0 := [mine], src=0)
    validated = first.validate(saved, samples(), verbose=False)[0]["loss"]
    second = trainer(2)
    loaded = second.validate(resumed, samples(), ckpt_path=folder / "saved.ckpt", verbose=False)[0]["loss"]
    buffers = {name: buffer.clone() for name, buffer in resumed.named_buffers()}
    trainer(2).fit(resumed, samples(), ckpt_path=folder / "saved.ckpt")
    return {
        "validated": validated,
        "loaded": loaded,
        "of rank 0": all(torch.equal(buffers[name], of_rank_0[0][name]) for name in buffers if "running" in name),
        "undisturbed": undisturbed.losses,
        "resumed": resumed.losses,
    }
