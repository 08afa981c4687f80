"""What the strategy makes of a LightningModule: where it is built, when it is sharded, what its optimizers hold."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from tests.support.forked import RankError, Run
from tests.support.models import Block, TinyLM, TinyModule, tokens
from tests.support.trainers import loader, make_trainer, mics, on_ranks

RANKS = 2


SAMPLES = tokens(16, seed=2)


class Configured(TinyModule):
    """Builds its model in ``configure_model``, which Lightning calls before every stage."""

    where = "cpu"

    def __init__(self) -> None:
        super().__init__()
        self.net = None
        self.built_on: str | None = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        torch.manual_seed(self.global_rank)
        with torch.device(self.where):
            self.net = TinyLM()
        self.built_on = self.net.embed.weight.device.type


class ConfiguredOnMeta(Configured):
    where = "meta"


class Idle(TinyModule):
    def configure_model(self) -> None:
        """Nothing to do."""


class Observing(TinyModule):
    """Notes what the hooks see."""

    def __init__(self) -> None:
        super().__init__()
        self.facts: dict[str, Any] = {}
        self.mean = MeanMetric()
        self.moved = Moved()

    def setup(self, stage: str) -> None:
        self.facts["groups in setup"] = dist.is_initialized() and self.trainer.strategy.broadcast(41 + self.global_rank)
        self.facts["moved in setup"] = list(self.moved.to)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        for parameter in self.parameters():  # an optimizer may create its state in the constructor
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def on_train_start(self) -> None:
        (optimizer,) = self.trainer.optimizers
        held = optimizer.param_groups[0]["params"]
        self.facts["held by the optimizer"] = [(type(p), p.device.type, p.device_mesh.mesh_dim_names) for p in held]
        self.facts["same objects"] = all(a is b for a, b in zip(held, self.parameters(), strict=True))
        self.facts["mesh"] = (self.device_mesh.mesh_dim_names, tuple(self.device_mesh.shape))
        self.facts["summary"] = ModelSummary(self).total_parameters
        self.facts["moved at start"] = list(self.moved.to)
        self.facts["device"] = self.device.type

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self(batch)
        self.mean(loss)
        return loss

    def on_train_end(self) -> None:
        self.facts["states"] = {
            type(buffer) for state in self.trainer.optimizers[0].state.values() for buffer in state.values()
        }


class Moved(nn.Module):
    """Has no parameter but a state of its own, as metrics do."""

    def __init__(self) -> None:
        super().__init__()
        self.to: list[str] = []

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.to.append(fn(torch.zeros(1)).device.type)
        return super()._apply(fn, recurse)


def full(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: p.full_tensor() for name, p in module.net.named_parameters()}


def fit(module: TinyModule, folder: str, *, strategy: dict[str, Any] | None = None, **options: Any) -> TinyModule:
    options = {"devices": RANKS, "use_distributed_sampler": False, **options}
    trainer = make_trainer(folder, strategy=mics(**{"partition_size": 1, **(strategy or {})}), **options)
    trainer.fit(module, DataLoader(SAMPLES[dist.get_rank() :: RANKS], batch_size=2), loader(4))
    return module


def build_in_all_ways(folder: str) -> dict[str, Any]:
    """Fit a model built in each way; two replicas of one rank each."""
    facts: dict[str, Any] = {}
    for kind in (TinyModule, Idle, Configured, ConfiguredOnMeta):
        torch.manual_seed(dist.get_rank())
        module = fit(kind(), folder)
        trainer = module.trainer
        tested = trainer.test(module, loader(4), verbose=False)[0]["test_loss"]
        facts[kind.__name__] = {
            "weights": full(module),
            "scale": module.net.blocks[0].scale,
            "tested": tested,
            "built on": getattr(module, "built_on", None),
            "meta": [name for name, t in module.state_dict().items() if t.is_meta],
        }
    return facts


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, on_shared_ranks: Run) -> list[dict[str, Any]]:
    return on_shared_ranks(build_in_all_ways, str(tmp_path_factory.mktemp("built")), world_size=RANKS)


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def job(folder: str) -> dict[str, Any]:
        return fit(Observing(), folder).facts

    return on_ranks(job, str(tmp_path_factory.mktemp("observed")), world_size=RANKS)[1]


def trained_alone(model: TinyLM) -> dict[str, Tensor]:
    for start in range(0, len(SAMPLES), 2 * RANKS):
        model.zero_grad()
        model(SAMPLES[start : start + 2 * RANKS]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    return dict(model.named_parameters())


@pytest.mark.parametrize("kind", ["TinyModule", "Idle", "Configured"])
def test_configure_model_is_optional(built: list[dict[str, Any]], kind: str) -> None:
    torch.manual_seed(0)
    for name, weight in trained_alone(TinyLM()).items():
        torch.testing.assert_close(built[0][kind]["weights"][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["TinyModule", "Configured", "ConfiguredOnMeta"])
def test_all_ranks_train_one_model_whatever_their_seeds(built: list[dict[str, Any]], kind: str) -> None:
    mine, others = built[0][kind]["weights"], built[1][kind]["weights"]
    assert all(torch.equal(mine[name], others[name]) for name in mine)


def test_configure_model_builds_on_the_device_it_names(built: list[dict[str, Any]]) -> None:
    assert built[0]["Configured"]["built on"] == "cpu"
    assert built[0]["ConfiguredOnMeta"]["built on"] == "meta"


def test_meta_parameters_and_buffers_are_initialized(built: list[dict[str, Any]]) -> None:
    facts = built[0]["ConfiguredOnMeta"]
    assert facts["meta"] == []
    assert torch.equal(facts["scale"], torch.full((7,), 0.9))
    weights = facts["weights"]
    assert all(weight.isfinite().all() and (weight.ndim == 1 or weight.std() > 0.05) for weight in weights.values())
    assert not torch.equal(weights["blocks.0.up.weight"], weights["blocks.1.up.weight"])


@pytest.mark.parametrize("kind", ["TinyModule", "Configured", "ConfiguredOnMeta"])
def test_the_trained_model_can_be_tested(built: list[dict[str, Any]], kind: str) -> None:
    assert 0 < built[0][kind]["tested"] < 4


def test_the_groups_exist_when_the_setup_hook_runs(observed: dict[str, Any]) -> None:
    assert observed["groups in setup"] == 41  # rank 0's, broadcast


def test_the_optimizer_holds_the_sharded_parameters(observed: dict[str, Any]) -> None:
    assert set(observed["held by the optimizer"]) == {(DTensor, "cpu", ("replicate", "shard"))}
    assert observed["same objects"]


def test_an_optimizer_may_make_its_state_in_its_constructor(observed: dict[str, Any]) -> None:
    assert observed["states"] == {DTensor}


def test_the_module_knows_the_mesh_once_it_is_sharded(observed: dict[str, Any]) -> None:
    assert observed["mesh"] == (("replicate", "shard"), (2, 1))


def test_the_model_summary_counts_unsharded_parameters(observed: dict[str, Any]) -> None:
    assert observed["summary"] == sum(p.numel() for p in TinyLM().parameters())


def test_modules_without_parameters_move_to_the_device(observed: dict[str, Any]) -> None:
    assert observed["moved in setup"] == []
    assert observed["moved at start"] == ["cpu"]


class FrozenByOthers(TinyModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([nn.Parameter(torch.zeros(2)), *self.parameters()], lr=0.1)


def test_an_optimizer_of_foreign_parameters_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        on_ranks(lambda folder: fit(FrozenByOthers(), folder), str(tmp_path), world_size=RANKS)
    for kind, message in caught.value.failures.values():
        assert kind == "ValueError"
        assert message.startswith("optimizer 0 (SGD) holds 1 tensors that are not parameters of the sharded model")


class Late(TinyModule):
    def configure_model(self) -> None:
        self.net.norm = nn.LayerNorm(7)  # anew for each stage


def test_a_configure_model_that_builds_twice_is_rejected(tmp_path: Path) -> None:
    def job(folder: str) -> None:
        module = fit(Late(), folder)
        module.trainer.validate(module, loader(4), verbose=False)

    with pytest.raises(RankError) as caught:
        on_ranks(job, str(tmp_path), world_size=RANKS)
    kind, message = caught.value.failures[0]
    assert kind == "RuntimeError"
    assert message.startswith("parameter 'net.norm.weight' appeared after the model was sharded")


def init_module(folder: str) -> list[Any]:
    facts: list[Any] = []
    for empty_init in (False, True):
        trainer = make_trainer(folder, strategy=mics(partition_size=1), devices=RANKS, precision="bf16-true")
        with trainer.init_module(empty_init=empty_init):
            module = Logging()
        before = (module.net.embed.weight.device.type, module.net.embed.weight.dtype)
        trainer.fit(module, loader(4))
        weight = module.net.embed.weight
        facts.append((before, (weight.device.type, weight.dtype), module.device.type, module.seen))
    return facts


class Logging(TinyModule):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("number", 1.5)
        self.seen = torch.zeros(1, device=self.device).device.type
        return self(batch)


def test_init_module_keeps_weights_off_the_device_until_setup(tmp_path: Path, on_shared_ranks: Run) -> None:
    on_cpu, on_meta = on_shared_ranks(init_module, str(tmp_path), world_size=RANKS)[0]
    assert on_cpu[0] == ("cpu", torch.bfloat16)
    assert on_meta[0] == ("meta", torch.bfloat16)
    for _, after, device, seen in (on_cpu, on_meta):
        assert after == ("cpu", torch.bfloat16)
        assert (device, seen) == ("cpu", "cpu")  # the module's own device, too


# -- options --


class CountingBlock(Block):
    forwards = 0

    def forward(self, hidden: Tensor) -> Tensor:
        CountingBlock.forwards += 1
        return super().forward(hidden)


class CountingNorm(nn.LayerNorm):
    forwards = 0

    def forward(self, hidden: Tensor) -> Tensor:
        CountingNorm.forwards += 1
        return super().forward(hidden)


class Counting(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.net.blocks = nn.ModuleList(CountingBlock(7) for _ in range(3))
        self.net.norm = CountingNorm(7)


def count_forwards(folder: str) -> dict[str, tuple[int, int, dict[str, Tensor]]]:
    results = {}
    for name, option in {"off": False, "blocks": True, "norm": [CountingNorm], "by name": ["CountingBlock"]}.items():
        torch.manual_seed(0)
        CountingBlock.forwards = CountingNorm.forwards = 0
        module = fit(
            Counting(),
            folder,
            strategy={"activation_checkpointing": option},
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        results[name] = (CountingBlock.forwards, CountingNorm.forwards, full(module))
    return results


def test_activation_checkpointing_covers_the_named_classes_only(tmp_path: Path, on_shared_ranks: Run) -> None:
    results = on_shared_ranks(count_forwards, str(tmp_path), world_size=RANKS)[0]
    steps = len(SAMPLES) // 2 // RANKS
    forwards = {name: counts[:2] for name, counts in results.items()}
    once, twice = steps, 2 * steps
    assert forwards == {
        "off": (3 * once, once),
        "blocks": (3 * twice, once),
        "norm": (3 * once, twice),
        "by name": (3 * twice, once),
    }
    for *_, weights in results.values():
        assert all(torch.equal(weights[name], results["off"][2][name]) for name in weights)


class WithBatchNorm(TinyModule):
    """Its batch norm is not run: the synchronized one rejects CPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(6)
        self.kinds: dict[str, str] = {}

    def on_validation_start(self) -> None:
        self.kinds["validate"] = type(self.batch_norm).__name__

    def on_train_start(self) -> None:
        self.kinds["fit"] = type(self.batch_norm).__name__


def fit_and_validate_batch_norms(folder: str) -> list[dict[str, str]]:
    fitted = fit(WithBatchNorm(), folder, sync_batchnorm=True)
    validated = WithBatchNorm()
    make_trainer(folder, devices=RANKS, sync_batchnorm=True).validate(validated, loader(4), verbose=False)
    return [fitted.kinds, validated.kinds]


def test_batch_norms_are_synchronised_when_fitting_only(tmp_path: Path, on_shared_ranks: Run) -> None:
    fitted, validated = on_shared_ranks(fit_and_validate_batch_norms, str(tmp_path), world_size=RANKS)[0]
    assert fitted == {"fit": "SyncBatchNorm", "validate": "SyncBatchNorm"}
    assert validated == {"validate": "BatchNorm1d"}


def test_the_start_report_is_logged_once_and_stays_available(tmp_path: Path) -> None:
    def job(folder: str) -> tuple[list[str], str]:
        seen: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(handler)
        module = fit(TinyModule(), folder)
        module.trainer.validate(module, loader(4), verbose=False)
        return [message for message in seen if message.startswith("MiCS")], module.trainer.strategy.start_report

    (first, kept), (second, _) = on_ranks(job, str(tmp_path), world_size=RANKS)
    assert first == [kept]
    assert "partition groups" in kept
    assert second == []
