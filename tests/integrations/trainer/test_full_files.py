"""Full files: under DDP, under MiCS, of compiled models, by a CheckpointIO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tests.support.fits import STEPS_PER_EPOCH, AdamModule, TwoOptimizers, fit, same
from tests.support.trainers import mics, on_ranks


class RecordingIO(TorchCheckpointIO):
    """A CheckpointIO of the user."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[str] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.saved.append(Path(path).name)
        super().save_checkpoint(checkpoint, path, storage_options)


class AskedOnce(Callback):
    """Counts how often optimizers are loaded, by Lightning or by the strategy itself."""

    def __init__(self) -> None:
        self.asked = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        load = trainer.strategy.load_optimizer_state_dict

        def count(state: Any) -> None:
            self.asked += 1
            load(state)

        trainer.strategy.load_optimizer_state_dict = count


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
        asked = AskedOnce()
        _, resumed = fit(folder, ckpt_path=folder / "plugin.ckpt", epochs=2, callbacks=[asked])
    facts["asked"] = asked.asked
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
    assert full_files[0]["mapped"][1]
    assert full_files[0]["asked"] == 1


class Compiled(AdamModule):
    """Has a compiled block."""

    def __init__(self) -> None:
        super().__init__()
        for index, block in enumerate(self.net.blocks):
            self.net.blocks[index] = torch.compile(block, backend="eager")


def _compiled(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for kind, targets in (("sharded", (AdamModule,)), ("full", (Compiled, AdamModule))):
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
    assert compiled["compiled"] == 4
    _assert_resumed(compiled["full", "Compiled"])


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_checkpoint_of_a_compiled_model_resumes_without_compilation(compiled: dict[str, Any], kind: str) -> None:
    _assert_resumed(compiled[kind, "AdamModule"])


def test_a_full_file_of_a_compiled_model_equals_that_of_the_uncompiled_one(compiled: dict[str, Any]) -> None:
    assert compiled["names"] == sorted(AdamModule().state_dict())
    assert compiled["numbers"] == list(range(len(list(AdamModule().parameters()))))
