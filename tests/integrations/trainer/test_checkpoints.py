"""Checkpoints of a Trainer: Lightning's ModelCheckpoint, ``ckpt_path``, the learning rate finder, other strategies."""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import Tensor

from lightning_mics import checkpoint
from tests.support.fits import STEPS_PER_EPOCH, AdamModule, Scored, data, files, fit, refusal, same, whole_weights
from tests.support.models import TinyModule
from tests.support.trainers import make_trainer, mics, on_ranks

SHARDS_OF_TWO = [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt"]


# -- another partition size, another number of ranks ------------------------------------------------------------------


def _uninterrupted(folder: Path) -> dict[str, Any]:
    saving = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, save_last=True)
    trainer, recorder = fit(folder, epochs=2, callbacks=[saving])
    content = torch.load(folder / "epoch=0.ckpt" / "meta.pt", weights_only=True)
    return {
        "first": recorder.started,
        "weights": recorder.after_epoch,
        "losses": recorder.losses,
        "rates": recorder.rates,
        "files": {name: files(folder / name) for name in files(folder)},
        "meta": sorted(content),
        "callbacks": list(content["callbacks"]),
        "tensors in meta": sum(isinstance(entry, Tensor) for entry in content.values()),
        "names": list(trainer.strategy.lightning_module_state_dict()),
        "sizes": [entry.stat().st_size for entry in sorted((folder / "epoch=0.ckpt").glob("*.distcp"))],
    }


class SaveAtStart(Callback):
    """Saves what a run has loaded before it goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def _resumed(folder: Path, settings: list[tuple[str, dict[str, int]]]) -> list[dict[str, Any]]:
    facts = []
    for source, options in settings:
        again = SaveAtStart(folder / f"of_{dist.get_world_size()}.ckpt")
        trainer, recorder = fit(
            folder, ckpt_path=folder / source, epochs=2, strategy=mics(**options), callbacks=[again]
        )
        facts.append({"weights": recorder.started, "losses": recorder.losses, "rates": recorder.rates})
        facts[-1]["partition_size"] = trainer.strategy.topology.partition_size
    return facts


def _forgetful(folder: Path) -> list[float]:
    class Forget(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.optimizers[0].state.clear()

    return fit(
        folder, ckpt_path=folder / "epoch=0.ckpt", epochs=2, strategy=mics(ranks_per_node=1), callbacks=[Forget()]
    )[1].losses


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of two epochs on 4 ranks with partition groups of 2, with a checkpoint after each epoch."""
    folder = tmp_path_factory.mktemp("saved")
    return {**on_ranks(_uninterrupted, folder)[0], "folder": folder}


@pytest.fixture(scope="module")
def resumed(saved: dict[str, Any]) -> dict[str, Any]:
    """The second epoch again from the checkpoint after the first, by world size and partition size."""
    folder, of_four = saved["folder"], "epoch=0.ckpt"
    (eight,) = on_ranks(_resumed, folder, [(of_four, {"partition_size": 4})], world_size=8)[0]
    (two,) = on_ranks(_resumed, folder, [(of_four, {"partition_size": 2})], world_size=2)[0]
    (one,) = on_ranks(_resumed, folder, [(of_four, {"ranks_per_node": 1})], world_size=1)[0]
    same_size, whole_world, replicas, back = on_ranks(
        _resumed,
        folder,
        [
            (of_four, {"partition_size": 2}),
            (of_four, {"partition_size": 4}),
            (of_four, {"partition_size": 1}),
            ("of_8.ckpt", {"partition_size": 2}),
        ],
    )[0]
    return {
        "4 ranks, partition groups of 2": same_size,
        "4 ranks, partition groups of 4": whole_world,
        "4 ranks, partition groups of 1": replicas,
        "2 ranks": two,
        "1 rank": one,
        "8 ranks, partition groups of 4 over 2 nodes": eight,
        "from 8 ranks back to 4": back,
    }


RESUMED = {  # how it was resumed: the partition size there
    "4 ranks, partition groups of 2": 2,
    "4 ranks, partition groups of 4": 4,
    "4 ranks, partition groups of 1": 1,
    "2 ranks": 2,
    "1 rank": 1,
    "8 ranks, partition groups of 4 over 2 nodes": 4,
    "from 8 ranks back to 4": 2,
}


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_restores_the_weights_bit_for_bit(saved: Any, resumed: Any, name: str) -> None:
    assert not same(saved["first"], saved["weights"][0])
    assert resumed[name]["partition_size"] == RESUMED[name]
    assert same(resumed[name]["weights"], saved["weights"][0])


@pytest.mark.parametrize("name", RESUMED)
def test_the_losses_after_resuming_are_those_of_the_uninterrupted_run(saved: Any, resumed: Any, name: str) -> None:
    assert resumed[name]["losses"] == pytest.approx(saved["losses"][STEPS_PER_EPOCH:], abs=1e-6)
    assert resumed[name]["rates"] == saved["rates"][STEPS_PER_EPOCH:]
    assert saved["rates"][-1] != saved["rates"][0]


def test_without_the_optimizer_states_the_losses_would_differ(saved: dict[str, Any]) -> None:
    losses = on_ranks(_forgetful, saved["folder"], world_size=1)[0]
    assert losses[0] == pytest.approx(saved["losses"][STEPS_PER_EPOCH], abs=1e-6)
    assert abs(losses[1] - saved["losses"][STEPS_PER_EPOCH + 1]) > 1e-3


def test_a_sharded_checkpoint_holds_shards_and_metadata_only(saved: dict[str, Any]) -> None:
    shards = [f"__{rank}_0.distcp" for rank in range(4)]
    files = [".metadata", *shards, "manifest.json", "meta.pt"]
    assert saved["files"] == dict.fromkeys(("epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"), files)
    assert {"pytorch-lightning_version", "callbacks", "lr_schedulers", "loops"} <= set(saved["meta"])
    assert not {"state_dict", "optimizer_states"} & set(saved["meta"])
    assert saved["tensors in meta"] == 0
    assert any("ModelCheckpoint" in name for name in saved["callbacks"])


def test_replicas_share_the_writing(saved: dict[str, Any]) -> None:
    assert max(saved["sizes"]) < sum(saved["sizes"]) / 2


def test_the_state_dict_has_the_names_of_the_unsharded_model(saved: dict[str, Any]) -> None:
    assert saved["names"] == list(AdamModule().state_dict())


def _model_checkpoint(folder: Path) -> dict[str, Any]:
    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(
            dirpath=folder / "top", filename="{epoch}", monitor="score", mode="max", save_top_k=1, save_last="link"
        )

    trainer, recorder = fit(folder, Scored, epochs=3, callbacks=[saving()], validate=True)
    module = trainer.lightning_module
    facts: dict[str, Any] = {
        "files": files(folder / "top"),
        "link": (folder / "top" / "last.ckpt").is_symlink(),
        "epochs": recorder.after_epoch,
        "end": whole_weights(module),
    }
    trainer.test(module, data(), ckpt_path="best")
    facts["best"] = whole_weights(module)
    _, again = fit(folder, Scored, ckpt_path="last", epochs=4, callbacks=[saving()], validate=True)
    facts["last"] = again.started
    rolling = ModelCheckpoint(dirpath=folder / "rolling", filename="{epoch}", save_top_k=1, save_last=True)
    _, recorder = fit(folder, epochs=2, callbacks=[rolling])
    facts["rolling"] = {name: files(folder / "rolling" / name) for name in files(folder / "rolling")}
    facts["rolling epochs"] = recorder.after_epoch
    facts["from path"] = fit(folder, ckpt_path=str(folder / "rolling" / "epoch=1.ckpt"), epochs=3)[1].started
    rolling = ModelCheckpoint(dirpath=folder / "rolling", filename="{epoch}", save_top_k=1, save_last=True)
    facts["rolling last"] = fit(folder, ckpt_path="last", epochs=3, callbacks=[rolling])[1].started
    return facts


@pytest.fixture(scope="module")
def model_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(_model_checkpoint, tmp_path_factory.mktemp("model_checkpoint"), world_size=2)[0]


def test_only_the_best_checkpoint_stays_with_save_top_k_1(model_checkpoint: dict[str, Any]) -> None:
    assert model_checkpoint["files"] == ["epoch=1.ckpt", "last.ckpt"]


def test_save_last_can_be_a_link(model_checkpoint: dict[str, Any]) -> None:
    assert model_checkpoint["link"]
    assert same(model_checkpoint["last"], model_checkpoint["epochs"][1])


def test_ckpt_path_best_loads_the_best_after_fit(model_checkpoint: dict[str, Any]) -> None:
    assert not same(model_checkpoint["end"], model_checkpoint["epochs"][1])
    assert same(model_checkpoint["best"], model_checkpoint["epochs"][1])


def test_ckpt_path_last_or_a_path_resume_from_directories(model_checkpoint: dict[str, Any]) -> None:
    assert model_checkpoint["rolling"] == {"epoch=1.ckpt": SHARDS_OF_TWO, "last.ckpt": SHARDS_OF_TWO}
    assert same(model_checkpoint["rolling last"], model_checkpoint["rolling epochs"][1])
    assert same(model_checkpoint["from path"], model_checkpoint["rolling epochs"][1])


# -- weights only, the learning rate finder ---------------------------------------------------------------------------


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


# -- the user's own objects, strictness, callbacks, wrong paths -------------------------------------------------------


class Note:
    """Something of the user's own that plain loading refuses."""

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
                "holds tests.integrations.trainer.test_checkpoints.Note, which is neither plain" in facts[kind, refused]
            )
            assert "weights_only=False, to this call or to the strategy" in facts[kind, refused]


def test_saving_an_object_of_the_users_own_warns_by_its_name(own_objects: Any) -> None:
    (warning,) = own_objects[0][True, "saving"]
    assert warning.startswith("this checkpoint's meta.pt holds tests.integrations.trainer.test_checkpoints.Note")


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_callbacks_are_restored_for_evaluation(own_objects: Any, stage: str) -> None:
    for kind in ("sharded", "full"):
        assert own_objects[0][kind, stage] == ("mine", STEPS_PER_EPOCH, True)


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_strict_loading_follows_the_module(own_objects: Any, kind: str) -> None:
    for facts in own_objects:
        message = facts[kind, "strict"]
        assert message.startswith("RuntimeError: the checkpoint and the model differ: 2 names are missing")
        assert "['extra.bias', 'extra.weight']" in message
        assert "strict_loading" in message
        assert not facts[kind, "strict", "loaded"]
        assert facts[kind, "loose"] == "nothing was refused"
        assert facts[kind, "loose", "loaded"]


class TwoOptimizers(pl.LightningModule):
    """Manual optimization with two kinds of optimizer; one block is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = TinyModule().net
        self.net.blocks[1].requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parameters = list(self.parameters())
        return [
            torch.optim.AdamW(parameters[4:], lr=0.02),
            torch.optim.SGD(parameters[:4], lr=0.1, momentum=0.9),
        ]


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
    facts["number"] = refusal(lambda: fit(folder, TwoOptimizers, ckpt_path=folder / "adam.ckpt", epochs=2))
    facts["kind"] = refusal(lambda: fit(folder, TinyModule, ckpt_path=folder / "adam.ckpt", epochs=2))
    load, replicas = checkpoint.load, {"ranks_per_node": 1, "partition_size": 1}

    def load_otherwise_on_rank_1(path: Path, *, model: torch.nn.Module, **options: Any) -> Any:
        meta = load(path, model=model, **options)
        if dist.get_rank() == 1:
            with torch.no_grad():
                model.net.norm.weight.to_local().add_(1)
        return meta

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load", load_otherwise_on_rank_1)
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
        for name in ("nowhere", "empty0"):
            assert facts[name].startswith(f"ValueError: {str(facts['folder'] / name)!r} does not point to a valid")


def test_another_number_of_optimizers_is_rejected(refused: Any) -> None:
    for facts in refused:
        assert facts["number"].startswith(
            "RuntimeError: the checkpoint holds the states of 1 optimizers, the model has 2"
        )


def test_another_kind_of_optimizer_is_rejected(refused: Any) -> None:
    for facts in refused:
        assert facts["kind"].startswith("RuntimeError: the checkpoint lacks")
        assert "optimizer_0 (SGD)" in facts["kind"]


def test_a_checkpoint_that_loads_differently_on_replicas_is_rejected(refused: Any) -> None:
    for facts in refused:
        assert facts["replicas"].startswith("RuntimeError: the replicas of the model differ in 1 of")
        assert "net.norm.weight" in facts["replicas"]
        assert facts["equal replicas"] == "nothing was refused"


# -- full files, consolidated checkpoints, other strategies -----------------------------------------------------------


class RecordingIO(TorchCheckpointIO):
    """A CheckpointIO of the user."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[str] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.saved.append(Path(path).name)
        super().save_checkpoint(checkpoint, path, storage_options)


class NeverAskedTwice(Callback):
    """Fails where Lightning restores optimizers that the strategy has restored."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        def refuse(_checkpoint: Any) -> None:
            raise AssertionError("restored twice")

        trainer.strategy.load_optimizer_state_dict = refuse


def _full_files(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for module_class in (AdamModule, TwoOptimizers):
        facts[module_class.__name__] = _interchange(folder / module_class.__name__, module_class)
    plugin = RecordingIO()
    trainer, recorder = fit(folder, strategy=mics(state_dict_type="full"), plugins=[plugin])
    trainer.save_checkpoint(folder / "plugin.ckpt")
    facts["plugin"] = plugin.saved
    sharded = mics()
    fit(folder, strategy=sharded)
    for name, strategy in (("full", trainer.strategy), ("sharded", sharded)):
        optimizer = strategy.optimizer_state(strategy.optimizers[0])
        facts["held", name] = (len(strategy.lightning_module_state_dict()), len(optimizer.get("state", ())))
    maps: list[Any] = []
    load = torch.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "load", lambda *args, **options: maps.append(options.get("mmap")) or load(*args, **options)
        )
        _, resumed = fit(folder, ckpt_path=folder / "plugin.ckpt", epochs=2, callbacks=[NeverAskedTwice()])
    facts["mapped"] = (maps, same(resumed.started, recorder.after_epoch[0]))
    return facts


def _interchange(folder: Path, module_class: type[pl.LightningModule]) -> dict[str, Any]:
    """From a full file of MiCS to DDP, and from a file of DDP to MiCS."""
    facts: dict[str, Any] = {}
    strategies = {"mics": lambda: mics(state_dict_type="full"), "ddp": lambda: "ddp"}
    for source, targets in (("mics", ("ddp", "mics")), ("ddp", ("mics",))):
        saving = ModelCheckpoint(dirpath=folder / source, filename="{epoch}", save_top_k=-1)
        _, whole = fit(folder, module_class, epochs=2, strategy=strategies[source](), callbacks=[saving])
        path = folder / source / "epoch=0.ckpt"
        plain = module_class.load_from_checkpoint(path, weights_only=True)
        for target in targets:
            _, resumed = fit(folder, module_class, ckpt_path=path, epochs=2, strategy=strategies[target]())
            facts[source, target] = {
                "trained": not same(whole.started, whole.after_epoch[0]),
                "slots": (same(resumed.slots, whole.slots_after_epoch[0]), sum(map(len, resumed.slots))),
                "weights": same(resumed.started, whole.after_epoch[0]),
                "plain": same(plain.state_dict(), whole.after_epoch[0]),
                "losses": (resumed.losses, whole.losses[STEPS_PER_EPOCH:]),
            }
    return facts


@pytest.fixture(scope="module")
def full_files(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(_full_files, tmp_path_factory.mktemp("full"), world_size=2)


MODULES = ["AdamModule", "TwoOptimizers"]


def _assert_resumed(facts: dict[str, Any]) -> None:
    assert facts["weights"]
    equal, slots = facts["slots"]
    assert equal
    assert slots > 0
    resumed, whole = facts["losses"]
    assert resumed == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("module", MODULES)
def test_a_full_file_resumes_under_ddp(full_files: Any, module: str) -> None:
    assert all(each["trained"] for each in full_files[0][module].values())
    _assert_resumed(full_files[0][module]["mics", "ddp"])


@pytest.mark.parametrize("module", MODULES)
def test_a_ddp_checkpoint_resumes_under_mics(full_files: Any, module: str) -> None:
    assert all(each["trained"] for each in full_files[0][module].values())
    _assert_resumed(full_files[0][module]["ddp", "mics"])


@pytest.mark.parametrize("module", MODULES)
def test_a_full_file_resumes_under_mics(full_files: Any, module: str) -> None:
    assert all(each["trained"] for each in full_files[0][module].values())
    _assert_resumed(full_files[0][module]["mics", "mics"])


def test_a_full_file_loads_into_an_unsharded_module(full_files: Any) -> None:
    assert full_files[0]["AdamModule"]["mics", "ddp"]["plain"]


def test_only_rank_zero_holds_the_full_state(full_files: Any) -> None:
    first, second = full_files
    assert min(first["held", "full"]) > 0
    assert second["held", "full"] == (0, 0)
    assert first["held", "sharded"] == second["held", "sharded"] == first["held", "full"]


def test_a_checkpoint_io_plugin_writes_the_full_file(full_files: Any) -> None:
    assert [facts["plugin"] for facts in full_files] == [["plugin.ckpt"], []]


def test_a_full_file_is_read_memory_mapped(full_files: Any) -> None:
    for facts in full_files:
        assert facts["mapped"] == ([True], True)


def test_optimizers_are_restored_once(full_files: Any) -> None:
    assert full_files[0]["mapped"][1]  # `NeverAskedTwice` watched that run


class Shallow(AdamModule):
    """With fewer blocks to compile."""

    def __init__(self) -> None:
        super().__init__(layers=2)


class Compiled(Shallow):
    """Its blocks are compiled in place of plain ones."""

    def __init__(self) -> None:
        super().__init__()
        for index, block in enumerate(self.net.blocks):
            self.net.blocks[index] = torch.compile(block, backend="eager")


def _compiled(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for kind, targets in (("sharded", (Shallow,)), ("full", (Compiled, Shallow))):
        saving = ModelCheckpoint(dirpath=folder / kind, filename="{epoch}", save_top_k=-1)
        _, whole = fit(folder, Compiled, epochs=2, strategy=mics(state_dict_type=kind), callbacks=[saving])
        path = folder / kind / "epoch=0.ckpt"
        for target in targets:
            _, resumed = fit(folder, target, ckpt_path=path, epochs=2)
            facts[kind, target.__name__] = {
                "slots": (same(resumed.slots, whole.slots_after_epoch[0]), sum(map(len, resumed.slots))),
                "weights": same(resumed.started, whole.after_epoch[0]),
                "losses": (resumed.losses, whole.losses[STEPS_PER_EPOCH:]),
            }
    content = torch.load(folder / "full" / "epoch=0.ckpt", weights_only=True)
    facts["names"] = sorted(content["state_dict"])
    facts["numbers"] = sorted(content["optimizer_states"][0]["state"])
    facts["compiled"] = sum("_orig_mod" in name for name, _ in Compiled().named_parameters())
    return facts


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(_compiled, tmp_path_factory.mktemp("compiled"), world_size=2)[0]


def test_a_full_file_of_a_compiled_model_resumes(compiled: dict[str, Any]) -> None:
    assert compiled["compiled"] == 8
    _assert_resumed(compiled["full", "Compiled"])


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_checkpoint_of_a_compiled_model_resumes_without_compilation(compiled: dict[str, Any], kind: str) -> None:
    _assert_resumed(compiled[kind, "Shallow"])


def test_a_full_file_of_a_compiled_model_equals_that_of_the_uncompiled_one(compiled: dict[str, Any]) -> None:
    assert compiled["names"] == sorted(Shallow().state_dict())
    assert compiled["numbers"] == list(range(len(list(Shallow().parameters()))))


@pytest.fixture(scope="module")
def consolidated(saved: dict[str, Any]) -> Path:
    """The checkpoint after the first epoch of ``saved``, made one file by Lightning's own program."""
    source, target = saved["folder"] / "epoch=0.ckpt", saved["folder"] / "consolidated.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["consolidate_checkpoint", str(source), "--output_file", str(target)])
        runpy.run_module("lightning.pytorch.utilities.consolidate_checkpoint", run_name="__main__")
    return target


def _resume_consolidated(path: Path, strategies: list[str]) -> list[dict[str, Any]]:
    facts = []
    for strategy in strategies:
        chosen = mics(state_dict_type="full") if strategy == "mics" else strategy
        trainer, recorder = fit(path.parent, ckpt_path=path, epochs=2, strategy=chosen)
        facts.append({"weights": recorder.started, "losses": recorder.losses, "with": type(trainer.strategy).__name__})
    return facts


@pytest.mark.parametrize(("world_size", "strategies"), [(2, ["ddp", "mics"]), (1, ["auto"])])
def test_a_consolidated_checkpoint_resumes_anywhere(
    saved: Any, consolidated: Path, world_size: int, strategies: list[str]
) -> None:
    facts = on_ranks(_resume_consolidated, consolidated, strategies, world_size=world_size)[0]
    assert [each["with"] for each in facts] == (
        ["SingleDeviceStrategy"] if world_size == 1 else ["DDPStrategy", "MiCSStrategy"]
    )
    for each in facts:
        assert same(each["weights"], saved["weights"][0])
        assert each["losses"] == pytest.approx(saved["losses"][STEPS_PER_EPOCH:], abs=1e-6)


def test_a_consolidated_checkpoint_loads_into_an_unsharded_module(saved: Any, consolidated: Path) -> None:
    module = AdamModule.load_from_checkpoint(consolidated, weights_only=True)
    assert same(module.state_dict(), saved["weights"][0])
