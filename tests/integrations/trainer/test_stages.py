"""Fit, validate, test and predict: in any order, on one model, with data of its own for every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loops import utilities as loop_utilities
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from tests.support.models import TinyLM, TinyModule, tokens
from tests.support.recorded import RecordCollectives
from tests.support.trainers import loader, make_trainer, on_ranks

RANKS = 4


SAMPLES = tokens(24, seed=3)


STAGES = ("train", "val", "test", "predict")


class Watched(TinyModule):
    """Records the samples of each stage, and whether parameters are unsharded or sharded between stages."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[Tensor]] = {stage: [] for stage in STAGES}
        self.inference: set[bool] = set()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.seen["train"].append(batch)

    def on_validation_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.seen["val"].append(batch)
        self.inference.add(torch.is_inference_mode_enabled())

    def on_test_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.seen["test"].append(batch)
        self.inference.add(torch.is_inference_mode_enabled())

    def on_predict_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.seen["predict"].append(batch)
        self.inference.add(torch.is_inference_mode_enabled())


def data() -> DataLoader[Any]:
    return DataLoader(SAMPLES, batch_size=3)


def full(module: TinyModule) -> dict[str, Tensor]:
    return {name: p.full_tensor().clone() for name, p in module.net.named_parameters()}


def is_sharded(module: TinyModule) -> bool:
    return all(isinstance(p, DTensor) for p in module.parameters())


def run_all_stages(folder: str) -> dict[str, Any]:
    """Fit, test, save, fit again, and evaluation inside an outer inference mode, on one model and one Trainer."""
    torch.manual_seed(0)
    module, facts = Watched(), {}
    trainer = make_trainer(folder)
    trainer.fit(module, data(), data())
    facts["seen"] = {stage: list(module.seen[stage]) for stage in ("train", "val")}
    fitted = full(module)
    trainer.validate(module, data(), verbose=False)
    (tested,) = trainer.test(module, data(), verbose=False)
    predicted = trainer.predict(module, data())
    facts["seen"] |= {stage: list(module.seen[stage]) for stage in ("test", "predict")}
    facts["sharded after evaluation"] = is_sharded(module)
    facts["kept"] = same(full(module), fitted)
    facts["losses"] = (tested["test_loss"], float(sum(predicted) / len(predicted)))
    facts["weights"] = fitted

    path = str(Path(folder, "after-test"))
    trainer.save_checkpoint(path)
    trainer.save_checkpoint(path, weights_only=True)
    with torch.inference_mode():
        inside = [trainer.test(module, data(), ckpt_path=ckpt, verbose=False)[0]["test_loss"] for ckpt in (None, path)]
        inside += [float(sum(trainer.predict(module, data(), ckpt_path=ckpt)) / 2) for ckpt in (None, path)]
    facts["losses in an outer inference mode"] = inside

    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data(), data())
    facts["trained on"] = not same(full(module), fitted)
    again = full(module)
    make_trainer(folder).fit(module, data(), data())
    facts["trained by a second Trainer"] = not same(full(module), again)
    facts["sharded at the end"] = is_sharded(module)
    facts["sharded once"] = sum(isinstance(m, FSDPModule) for m in module.modules())
    return facts


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(run_all_stages, str(tmp_path_factory.mktemp("stages")))


def test_one_trainer_runs_all_stages_in_turn(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["trained on"] for rank in ranks)
    loss = ranks[0]["losses"][0]
    assert ranks[0]["losses in an outer inference mode"][:2] == pytest.approx([loss, loss])
    predicted = ranks[0]["losses"][1]
    assert ranks[0]["losses in an outer inference mode"][2:] == pytest.approx([predicted, predicted])


def test_a_second_trainer_takes_over_a_sharded_model(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["trained by a second Trainer"]
        assert rank["sharded at the end"]
        assert rank["sharded once"] == 3  # two blocks and the root, as after the first setup


def test_evaluation_leaves_the_weights_unchanged(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["kept"] for rank in ranks)


def test_the_root_is_sharded_again_after_evaluation(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["sharded after evaluation"] for rank in ranks)


def test_evaluation_gives_the_loss_of_one_process(ranks: list[dict[str, Any]]) -> None:
    model = TinyLM()
    model.load_state_dict(ranks[0]["weights"], strict=False)
    loss = float(model(SAMPLES).detach())
    assert ranks[0]["losses"][0] == pytest.approx(loss, rel=1e-5)
    assert sum(rank["losses"][1] for rank in ranks) / RANKS == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_gets_its_own_data(ranks: list[dict[str, Any]], stage: str) -> None:
    seen = [torch.cat(rank["seen"][stage]) for rank in ranks]
    passes = 2 if stage == "val" else 1  # the sanity check sees the same two batches
    assert [len(samples) for samples in seen] == [passes * len(SAMPLES) // RANKS] * RANKS
    rows = [tuple(row.tolist()) for samples in seen for row in samples]
    assert sorted(set(rows)) == sorted(tuple(row.tolist()) for row in SAMPLES)


@pytest.mark.parametrize("stage", ["val", "test", "predict"])
def test_evaluation_keeps_the_order_of_the_data(ranks: list[dict[str, Any]], stage: str) -> None:
    for rank, facts in enumerate(ranks):
        assert torch.equal(torch.cat(facts["seen"][stage][-2:]), SAMPLES[rank::RANKS])


# -- two ranks are enough below --


def validate_then_fit(folder: str, fixed: bool) -> tuple[set[bool], bool]:
    # Lightning's loops avoid inference mode under gloo; here they see another backend
    class NotGloo:
        get_backend = staticmethod(lambda: "nccl")

    loop_utilities.dist = NotGloo
    torch.manual_seed(0)
    module = Watched()
    trainer = make_trainer(folder, devices=2)
    if not fixed:
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            type(loop).inference_mode = property(lambda self: True, lambda self, value: None)
    trainer.validate(module, data(), verbose=False)
    trainer.test(module, data(), verbose=False)
    trainer.predict(module, data())
    before = full(module)
    trainer.fit(module, data())
    return module.inference, same(full(module), before)


def test_a_model_validated_first_can_be_trained(tmp_path: Path) -> None:
    for inference, unchanged in on_ranks(validate_then_fit, str(tmp_path), True, world_size=2):
        assert inference == {False}
        assert not unchanged


def test_lightning_alone_would_have_used_inference_mode(tmp_path: Path) -> None:
    for inference, _ in on_ranks(validate_then_fit, str(tmp_path), False, world_size=2):
        assert inference == {True}


def evaluate_in_inference_mode_then_fit(folder: str) -> bool:
    torch.manual_seed(0)
    module, trainer = Watched(), make_trainer(folder, devices=2)
    with torch.inference_mode():
        trainer.test(module, data(), verbose=False)
        trainer.predict(module, data())
        before = full(module)
    trainer.fit(module, data())
    return not same(full(module), before)


def test_a_model_tested_in_an_outer_inference_mode_can_be_trained(tmp_path: Path) -> None:
    assert on_ranks(evaluate_in_inference_mode_then_fit, str(tmp_path), world_size=2) == [True, True]


class LogsManyValues(TinyModule):
    values = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self(batch)
        for index in range(self.values):
            self.log(f"loss_{index}", loss, sync_dist=True)
        return loss


def count_barriers(folder: str) -> list[tuple[int, int]]:
    counts = []
    for values in (0, 5):
        module = LogsManyValues()
        module.values = values
        with RecordCollectives() as recorded:
            make_trainer(folder, devices=2).fit(module, loader(8))
        counts.append((len(recorded.of("barrier")), len(recorded.of("all_reduce"))))
    return counts


def test_a_logged_value_costs_one_all_reduce_and_no_barrier(tmp_path: Path) -> None:
    (barriers, all_reduces), (barriers_logging, all_reduces_logging) = on_ranks(
        count_barriers, str(tmp_path), world_size=2
    )[0]
    assert barriers_logging == barriers
    assert all_reduces_logging == all_reduces + 5 * 2  # two batches


class LogsRanks(TinyModule):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for how in ("mean", "sum", "max", "min"):
            self.log(how, float(self.global_rank + 1), sync_dist=True, reduce_fx=how)
        return self(batch)


def log_ranks(folder: str) -> dict[str, float]:
    trainer = make_trainer(folder, devices=2)
    trainer.fit(LogsRanks(), loader(4))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_logged_values_are_reduced_over_all_ranks(tmp_path: Path) -> None:
    assert on_ranks(log_ranks, str(tmp_path), world_size=2) == [{"mean": 1.5, "sum": 3.0, "max": 2.0, "min": 1.0}] * 2
