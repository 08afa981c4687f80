"""Checkpoints with the user's own objects; strictness, callbacks, wrong paths."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from lightning_mics.integrations.trainer import checkpoints
from tests.support.fits import (
    STEPS_PER_EPOCH,
    AdamModule,
    data,
    files,
    fit,
    refusal,
    same,
    whole_weights,
)
from tests.support.models import OneBlock, TinyModule
from tests.support.trainers import make_trainer, mics, on_ranks


class Note:
    """An object of the user's own that loading rejects by default."""

    def __init__(self, text: str) -> None:
        self.text = text


class Annotated(AdamModule):
    """Puts an object of its own into every checkpoint."""

    note = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["note"] = Note("mine")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.note = checkpoint["note"].text


class Counter(Callback):
    """A callback with a state."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


class TwoOptimizersOfOneBlock(AdamModule):
    """The same model, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return [torch.optim.AdamW(half, lr=0.02) for half in (parameters[:3], parameters[3:])]


class Extended(AdamModule):
    """Has weights that the checkpoint lacks."""

    def __init__(self, *, strict: bool = True) -> None:
        super().__init__()
        self.extra = torch.nn.Linear(2, 2)
        self.strict_loading = strict


def _own_objects(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for kind in ("sharded", "full"):
        path = folder / f"{kind}.ckpt"
        trainer, recorder = fit(folder, Annotated, callbacks=[Counter()], strategy=mics(state_dict_type=kind))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.save_checkpoint(path)
        facts[kind, "saving"] = [str(warning.message) for warning in caught]
        facts[kind, "by default"] = refusal(lambda path=path: fit(folder, Annotated, ckpt_path=path, epochs=2))
        trainer, _ = fit(folder, Annotated, ckpt_path=path, epochs=2, strategy=mics(weights_only=False))
        facts[kind, "trusted"] = trainer.lightning_module.note
        facts[kind, True] = refusal(
            lambda path=path, trainer=trainer: trainer.strategy.load_checkpoint(path, weights_only=True)
        )
        for stage in ("validate", "test", "predict"):
            module, counter = Annotated(), Counter()
            evaluating = make_trainer(folder, devices=2, callbacks=[counter], strategy=mics(weights_only=False))
            getattr(evaluating, stage)(module, data(), ckpt_path=path)
            facts[kind, stage] = (module.note, counter.count, same(whole_weights(module), recorder.after_epoch[0]))
        for name, module in (("strict", Extended()), ("loose", Extended(strict=False))):
            module.on_load_checkpoint = lambda checkpoint: None
            tester = make_trainer(folder, devices=2, strategy=mics(weights_only=False))
            facts[kind, name] = refusal(
                lambda module=module, path=path, tester=tester: tester.test(module, data(), ckpt_path=path)
            )
            facts[kind, name, "loaded"] = torch.equal(
                whole_weights(module)["net.norm.weight"], recorder.after_epoch[0]["net.norm.weight"]
            )
    return facts


@pytest.fixture(scope="module")
def own_objects(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(_own_objects, tmp_path_factory.mktemp("own_objects"), world_size=2)


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_objects_of_the_user_load_with_weights_only_false_alone(own_objects: Any, kind: str) -> None:
    for facts in own_objects:
        assert facts[kind, "trusted"] == "mine"
        for refused in ("by default", True):
            assert facts[kind, refused].startswith("UnsafeCheckpointError: ")
            assert (
                "holds tests.integrations.trainer.test_own_objects.Note, which is neither plain" in facts[kind, refused]
            )
            assert "weights_only=False, to this call or to the strategy" in facts[kind, refused]


def test_saving_an_object_of_the_users_own_warns_by_its_name(own_objects: Any) -> None:
    (warning,) = own_objects[0]["sharded", "saving"]
    assert warning.startswith("this checkpoint's meta.pt holds tests.integrations.trainer.test_own_objects.Note")


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_callbacks_are_restored_for_evaluation(own_objects: Any, stage: str) -> None:
    for kind in ("sharded", "full"):
        assert own_objects[0][kind, stage] == ("mine", STEPS_PER_EPOCH, True)


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_strict_loading_follows_the_module(own_objects: Any, kind: str) -> None:
    for facts in own_objects:
        message = facts[kind, "strict"]
        assert message.startswith("CheckpointMismatchError: the checkpoint and the model differ: 2 names are missing")
        assert "['extra.bias', 'extra.weight']" in message
        assert "strict_loading" in message
        assert not facts[kind, "strict", "loaded"]
        assert facts[kind, "loose"] == "nothing was refused"
        assert facts[kind, "loose", "loaded"]


def _refused(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    trainer, _ = fit(folder)
    trainer.save_checkpoint(folder / "adam.ckpt")
    (folder / f"empty{dist.get_rank()}").mkdir()
    here = folder / f"here{dist.get_rank()}"
    here.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for kind in ("sharded", "full"):
            full, _ = fit(folder, strategy=mics(state_dict_type=kind))
            save = full.save_checkpoint
            facts["save to a URL", kind] = refusal(lambda save=save: save("nosuch://bucket/a.ckpt"))
            facts["load from a URL", kind] = refusal(
                lambda full=full: full.test(full.lightning_module, data(), ckpt_path="nosuch://bucket/a.ckpt")
            )
            facts["storage options", kind] = refusal(
                lambda save=save: save(folder / "other.ckpt", storage_options={"a": 1})
            )
        facts["here"] = [entry.name for entry in here.iterdir()]
    facts["files"] = files(folder)
    for name in ("nowhere", "empty0"):
        facts[name] = refusal(lambda name=name: fit(folder, ckpt_path=folder / name))
    facts["number"] = refusal(lambda: fit(folder, TwoOptimizersOfOneBlock, ckpt_path=folder / "adam.ckpt", epochs=2))
    facts["kind"] = refusal(
        lambda: fit(folder, partial(TinyModule, kind=OneBlock), ckpt_path=folder / "adam.ckpt", epochs=2)
    )
    load, replicas = checkpoints.load_model, {"ranks_per_node": 1, "partition_size": 1}

    def load_otherwise_on_rank_1(opened: Any, *, model: torch.nn.Module, **options: Any) -> None:
        load(opened, model=model, **options)
        if dist.get_rank() == 1:
            with torch.no_grad():
                model.net.norm.weight.to_local().add_(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "load_model", load_otherwise_on_rank_1)
        facts["replicas"] = refusal(lambda: fit(folder, ckpt_path=folder / "adam.ckpt", strategy=mics(**replicas)))
    facts["equal replicas"] = refusal(lambda: fit(folder, ckpt_path=folder / "adam.ckpt", strategy=mics(**replicas)))
    return facts


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("refused")
    return [{**facts, "folder": folder} for facts in on_ranks(_refused, folder, world_size=2)]


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_url_never_becomes_a_local_directory(refused: Any, kind: str) -> None:
    for facts in refused:
        for action in ("save to a URL", "load from a URL"):
            assert facts[action, kind].startswith("ValueError: ") and "nosuch" in facts[action, kind]
        assert facts["here"] == []


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_storage_options_are_rejected(refused: Any, kind: str) -> None:
    for facts in refused:
        assert facts["storage options", kind].startswith("TypeError: `MiCSStrategy.save_checkpoint(")
        assert "other.ckpt" not in facts["files"]


def test_a_path_that_is_no_checkpoint_is_rejected(refused: Any) -> None:
    for facts in refused:
        for kind, name in (("FileNotFoundError", "nowhere"), ("ValueError", "empty0")):
            assert facts[name].startswith(f"{kind}: {str(facts['folder'] / name)!r} does not point to a valid")


def test_another_number_of_optimizers_is_rejected(refused: Any) -> None:
    for facts in refused:
        assert facts["number"].startswith(
            "CheckpointMismatchError: the checkpoint holds the states of 1 optimizers, the model has 2"
        )


def test_another_kind_of_optimizer_is_rejected(refused: Any) -> None:
    for facts in refused:
        assert facts["kind"].startswith("CheckpointMismatchError: the checkpoint lacks")
        assert "optimizer_0 (SGD)" in facts["kind"]


def test_a_checkpoint_that_loads_differently_on_replicas_is_rejected(refused: Any) -> None:
    for facts in refused:
        assert facts["replicas"].startswith("RuntimeError: the replicas of the model differ in 1 of")
        assert "net.norm.weight" in facts["replicas"]
        assert facts["equal replicas"] == "nothing was refused"
