"""Checkpoints of weights alone, and the learning rate finder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner

from tests.support.fits import AdamModule, data, files, fit, refusal, same, whole_weights
from tests.support.models import TinyModule
from tests.support.trainers import make_trainer, mics, on_ranks


def _weights_only(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for kind in ("sharded", "full"):
        path = folder / kind
        saving = ModelCheckpoint(dirpath=path, filename="w", save_weights_only=True, every_n_epochs=1)
        trainer, recorder = fit(
            folder, epochs=1, callbacks=[saving], strategy=mics(state_dict_type=kind), validate=True
        )
        module = trainer.lightning_module
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        trainer.test(module, data(), ckpt_path="best")
        facts[kind, "same trainer"] = whole_weights(module)
        torch.manual_seed(5)
        fresh = AdamModule()
        facts[kind, "fresh before"] = fresh.state_dict()
        make_trainer(folder, devices=2, strategy=mics(state_dict_type=kind)).test(
            fresh, data(), ckpt_path=path / "w.ckpt"
        )
        facts[kind, "fresh"] = whole_weights(fresh)
        facts[kind, "saved"] = recorder.after_epoch[0]
        facts[kind, "resume"] = refusal(
            lambda path=path, kind=kind: fit(
                folder, ckpt_path=path / "w.ckpt", epochs=2, strategy=mics(state_dict_type=kind)
            )
        )
        facts[kind, "finder"] = _learning_rate_finder(folder, kind)
    return facts


def _learning_rate_finder(folder: Path, kind: str) -> dict[str, Any]:
    torch.manual_seed(0)
    module = TinyModule(lr=0.1)
    trainer = make_trainer(folder / "finder", devices=2, max_epochs=9, strategy=mics(state_dict_type=kind))
    first = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    finder = Tuner(trainer).lr_find(module, data(), num_training=5, min_lr=1e-3, max_lr=1.0, early_stop_threshold=None)
    return {
        "tried": finder.results["lr"],
        "losses": finder.results["loss"],
        "rate": (finder.suggestion(skip_begin=0, skip_end=1), trainer.optimizers[0].param_groups[0]["lr"]),
        "restored": same(whole_weights(module), first) if dist.get_rank() == 0 else whole_weights(module) is not None,
        "files": files(folder / "finder"),
    }


@pytest.fixture(scope="module")
def weights_only(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(_weights_only, tmp_path_factory.mktemp("weights_only"), world_size=2)


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_weights_only_checkpoints_load_in_the_same_and_in_a_fresh_trainer(weights_only: Any, kind: str) -> None:
    facts = weights_only[0]
    assert not same(facts[kind, "fresh before"], facts[kind, "saved"])
    assert same(facts[kind, "fresh"], facts[kind, "saved"])
    assert same(facts[kind, "same trainer"], facts[kind, "saved"])


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_resuming_from_weights_only_is_rejected_with_the_reason(weights_only: Any, kind: str) -> None:
    for facts in weights_only:
        assert facts[kind, "resume"].startswith("KeyError: ")
        assert "save_weights_only" in facts[kind, "resume"]


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_the_learning_rate_finder_restores_the_model(weights_only: Any, kind: str) -> None:
    found = [facts[kind, "finder"] for facts in weights_only]
    assert len(set(found[0]["losses"])) == 5
    assert found[0]["restored"]
    suggestion, rate = found[0]["rate"]
    assert suggestion in found[0]["tried"]
    assert rate == 0.1
    assert found[0]["rate"] == found[1]["rate"]
    assert found[0]["tried"] == found[1]["tried"]
    assert found[0]["files"] == []
