"""Models whose blocks, classes or parameters are unusual are sharded, or named before the first step."""

from __future__ import annotations

import re
import warnings
from abc import ABC
from functools import partial
from typing import Any, Generic, TypeVar

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader

from lightning_mics.policy.policy import Policy
from lightning_mics.sharding.blocks import find_blocks
from lightning_mics.sharding.modules.checks import warn_of_values_beside_weights
from tests.support.beside_ddp import largest_gap, shard, train
from tests.support.trainers import make_trainer, mics

Kind = TypeVar("Kind")


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 4))


# -- lists of lists ----------------------------------------------------------------------------------------------------


class Listed(nn.Module):
    """Layers in lists of their own, with a norm and an entry that is None, as x-transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.ModuleList([nn.LayerNorm(4), None]), two_layers(), nn.Linear(4, 4)])  # type: ignore[list-item]
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:  # [samples, 4] -> same
        x = self.first(x)
        for norms, inner, outer in self.layers:
            x = x + outer(torch.tanh(inner(norms[0](x))))
        return x


class ByName(nn.Module):
    """Branches in dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({key: nn.ModuleDict({"net": two_layers()}) for key in "ab"})

    def forward(self, x: Tensor) -> Tensor:  # [samples, 4] -> same
        return sum(branch["net"](x) for branch in self.branches.values())  # type: ignore[no-any-return]


class WithForward(nn.ModuleList):
    """A list that has a forward is a block itself."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def test_members_of_lists_of_lists_are_blocks():
    assert sorted(find_blocks(Listed())) == sorted(f"layers.{i}.{j}" for i in range(3) for j in (1, 2))
    assert sorted(find_blocks(ByName())) == ["branches.a.net", "branches.b.net"]
    assert sorted(find_blocks(nn.Sequential(WithForward([two_layers()]), WithForward([two_layers()])))) == ["0", "1"]


def test_blocks_that_are_parametrized_count_as_their_class():
    model = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(3)))
    assert len(find_blocks(model)) == len(find_blocks(model, ["Linear"])) == 3


def test_a_list_that_is_named_as_a_block_is_rejected():
    message = "layers.2.0 is a ModuleList without a forward, which no forward unshards; choose block_classes of"
    with pytest.raises(ValueError, match=re.escape(message)):
        find_blocks(Listed(), [nn.ModuleList])


# -- classes -----------------------------------------------------------------------------------------------------------


class Slotted:
    __slots__ = ()


class GenericBlock(Generic[Kind], nn.Linear):
    pass


class AbstractBlock(ABC, nn.Linear):
    pass


class MixedBlock(Slotted, nn.Linear):
    pass


class Specialized(GenericBlock[int]):
    pass


class WithSlots(nn.Linear):
    __slots__ = ("extra",)


CLASSES = [GenericBlock, AbstractBlock, MixedBlock, Specialized, WithSlots]


def stack_of(kind: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"blocks": nn.Sequential(kind(4, 4), kind(4, 4))})["blocks"])


def test_classes_with_generic_and_slotted_bases_train_as_under_ddp_and_keep_their_names(run_shared):
    for facts in run_shared(2, _train_classes):
        assert [gap for gap, *_ in facts] == [pytest.approx(0, abs=1e-6)] * len(CLASSES)
        assert [names for _, *names in facts] == [[kind.__name__, True, True, "Linear"] for kind in CLASSES]


def _train_classes() -> list[tuple[Any, ...]]:
    facts = []
    for kind in CLASSES:
        make = partial(stack_of, kind)
        gap = largest_gap(train(make, "ddp", steps=2), train(make, "every", steps=2, block_classes=[kind]))
        model: Any = make()
        shard(model, block_classes=[kind])
        block = model[1][0]
        sliced = model[1][:1]  # a new Sequential, not sharded
        facts.append(
            (
                gap,
                type(block).__name__,
                isinstance(block, FSDPModule),
                type(sliced) is nn.Sequential,
                type(model[0]).__name__,
            )
        )
    return facts


# -- models without blocks, and without parameters ---------------------------------------------------------------------


class Toy(LightningModule):
    """The model of a first try: one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.layer(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Baseline(LightningModule):
    """A model without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(2.0))

    def test_step(self, batch: Tensor) -> None:
        self.log("error", (batch - self.mean).abs().mean(), sync_dist=True)

    def validation_step(self, batch: Tensor) -> None:
        self.test_step(batch)

    def predict_step(self, batch: Tensor) -> Tensor:
        return batch.sum()

    def training_step(self, batch: Tensor) -> Tensor:
        return batch.sum()

    def configure_optimizers(self) -> None:
        return None


def batches() -> DataLoader[Any]:
    return DataLoader(torch.arange(32.0).view(8, 4), batch_size=2)  # type: ignore[arg-type]


def test_a_toy_model_trains_by_the_strategys_name_alone_with_a_warning(on_shared_ranks, tmp_path):
    results = on_shared_ranks(_fit_toy, tmp_path, world_size=2)
    message = "found no blocks to shard in Toy: it has no `_no_split_modules` .* pass block_classes="
    assert re.search(message, results[0]["warned"])
    assert not results[1]["warned"]
    for result in results:
        assert result["gap"] < 1e-6


def _fit_toy(folder: Any) -> dict[str, Any]:
    weights = {}
    for strategy in ("ddp", "mics"):
        torch.manual_seed(0)
        module = Toy()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(folder, strategy=strategy, devices=2).fit(module, batches())
        weight: Any = module.layer.weight.detach()
        weights[strategy] = weight.full_tensor() if strategy == "mics" else weight.clone()
    about_blocks = [str(each.message) for each in caught if "found no blocks" in str(each.message)]
    return {"warned": "".join(about_blocks), "gap": float((weights["ddp"] - weights["mics"]).abs().max())}


def test_a_model_without_blocks_that_does_not_fit_is_rejected(run_shared):
    for message in run_shared(2, _shard_too_large):
        assert message == (
            "found no blocks to shard in Linear: it has no `_no_split_modules` and no list of modules of one class, "
            "and as one parameter group it does not fit; pass block_classes=[BlockClass]"
        )


def _shard_too_large() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_mics.policy.policy.device_memory_bytes", lambda *_, **__: 1000)
        with pytest.raises(TypeError) as caught:
            Policy().shard(nn.Linear(40, 40), precision="32-true", device=torch.device("cpu"), local_size=2)
    return str(caught.value)


def test_a_module_without_parameters_is_evaluated_and_not_fitted(on_shared_ranks, tmp_path):
    for result in on_shared_ranks(_evaluate_baseline, tmp_path, world_size=2):
        assert result == {
            "test": 13.6875,
            "validate": 13.6875,
            "predict": 2,
            "fit": "Baseline has no parameters, so there is nothing to shard",
        }


def _evaluate_baseline(folder: Any) -> dict[str, Any]:
    trainer = make_trainer(folder, strategy=mics(), devices=2)
    result: dict[str, Any] = {
        "test": trainer.test(Baseline(), batches(), verbose=False)[0]["error"],
        "validate": trainer.validate(Baseline(), batches(), verbose=False)[0]["error"],
        "predict": len(trainer.predict(Baseline(), batches())),
    }
    with pytest.raises(TypeError) as caught:
        make_trainer(folder, strategy=mics(), devices=2).fit(Baseline(), batches())
    return {**result, "fit": str(caught.value)}


# -- unusual parameters ------------------------------------------------------------------------------------------------


class Unusual(nn.Module):
    """Parameters without elements, transposed, complex, of integers, and an embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 8))
        self.transposed = nn.Parameter(torch.randn(5, 4).T)
        self.counts = nn.Parameter(torch.arange(4), requires_grad=False)
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64), requires_grad=False)
        self.embedding = nn.Embedding(7, 4, sparse=True)
        self.bag = nn.EmbeddingBag(7, 4, mode="sum", sparse=True)

    def forward(self, x: Tensor) -> Tensor:  # [samples, 4] -> [samples, 5]
        indices = x.abs().long() % 7
        hidden = x + self.embedding(indices).sum(dim=1) + self.bag(indices) + self.counts + self.phase.abs()
        return torch.tanh(hidden / 9) @ self.transposed + torch.cat([self.empty, self.empty]).sum()


@pytest.mark.filterwarnings("ignore:the gradients of 'embedding', 'bag' are dense:UserWarning")
def test_unusual_parameters_train_as_under_ddp(run_shared):
    for gaps in run_shared(2, _train_unusual):
        assert gaps == [pytest.approx(0, abs=1e-6)] * 3


def _train_unusual() -> list[float]:
    def dense() -> nn.Module:
        model = Unusual()
        model.embedding.sparse = model.bag.sparse = False
        return model

    by_ddp = train(dense, "ddp")
    options: dict[str, Any] = {"block_classes": []}
    gaps = [largest_gap(by_ddp, train(Unusual, mode, **options)) for mode in ("every", "rank")]
    accumulated = train(dense, "ddp", accumulate=2)
    return [*gaps, largest_gap(accumulated, train(Unusual, "every", accumulate=2, **options))]


def test_lazy_modules_are_named():
    message = "parameter '0.weight' has no shape yet: run one forward of the lazy module before it is sharded"
    with pytest.raises(TypeError, match=re.escape(message)):
        find_blocks(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)))
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    model(torch.zeros(1, 4))
    assert len(find_blocks(model)) == 2


def test_parameters_of_another_mesh_are_named(run_shared):
    message = (
        "parameter 'weight' is already a DTensor; pass the original module, it is sharded here, and not together with "
    )
    for text in run_shared(2, _shard_a_dtensor):
        assert text.startswith(message)


def _shard_a_dtensor() -> str:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (2,))))
    with pytest.raises(TypeError) as caught:
        find_blocks(layer, [])
    return str(caught.value)


class Quantized(nn.Linear):
    """Saves a value under the name of its weight, as 4-bit layers do."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.absmax"] = torch.ones(1)


class SavesNothingElse(nn.Sequential):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "absmax" not in name}


def test_layers_that_save_values_beside_their_weights_are_told_of_before_training():
    with pytest.warns(UserWarning, match=r"1 \(Quantized\) saves values .* such as 'weight.absmax', .* will fail"):
        warn_of_values_beside_weights(nn.Sequential(nn.Linear(4, 4), Quantized(4, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_values_beside_weights(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        warn_of_values_beside_weights(SavesNothingElse(Quantized(4, 4)))
