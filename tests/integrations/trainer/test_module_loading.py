"""``LightningModule.load_from_checkpoint`` on the directory of a sharded checkpoint does as on one file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_mics.checkpoint.errors import DamagedCheckpointError, UnsafeCheckpointError
from lightning_mics.checkpoint.whole_model import read_whole
from tests.support.fits import same, whole_weights
from tests.support.models import TinyModule
from tests.support.trainers import loader, make_trainer, on_ranks


class WithParameters(TinyModule):
    """Saves its hyper-parameters, something of its own, and a part that is no tensor."""

    def __init__(self, *, lr: float = 0.1, layers: int = 3, note: str = "") -> None:
        super().__init__(lr=lr, layers=layers)
        self.save_hyperparameters()
        self.counter = Counter()
        self.seen: dict[str, Any] = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = {"number": 5}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = checkpoint


class Counter(nn.Module):
    """Saves an extra state, which is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"batches": 0}

    def get_extra_state(self) -> dict[str, int]:
        return self.counts

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.counts = state


class Deeper(WithParameters):
    """Has a parameter that the checkpoint lacks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.extra = nn.Parameter(torch.ones(2))


class WithObject(TinyModule):
    """Saves an object of its own class."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["object"] = Note()


class Note:
    """Neither plain data nor a tensor."""


class Data(pl.LightningDataModule):
    """Has hyper-parameters too."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return loader(self.hparams["size"])


def _save(folder: Path) -> Any:
    module = WithParameters(lr=0.05, layers=1, note="kept")
    trainer = make_trainer(folder)
    trainer.fit(module, datamodule=Data(24))
    module.counter.counts["batches"] = 3
    trainer.save_checkpoint(folder / "a.ckpt")
    trainer.strategy._save_distributed_checkpoint = False
    trainer.save_checkpoint(folder / "full.ckpt")
    trainer = make_trainer(folder)
    trainer.fit(WithObject(), loader())
    trainer.save_checkpoint(folder / "object.ckpt")
    return whole_weights(module.net)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("saved")
    return {"weights": on_ranks(_save, folder)[0], "folder": folder, "path": folder / "a.ckpt"}


def test_a_module_loads_with_its_weights_and_hyper_parameters(saved: Any) -> None:
    for path in (saved["path"], str(saved["path"])):
        module = WithParameters.load_from_checkpoint(path)
        assert same(module.net.state_dict(), saved["weights"])
        assert (module.lr, len(module.net.blocks), module.hparams["note"]) == (0.05, 1, "kept")
        assert module.seen["own"] == {"number": 5} and module.seen["global_step"] == 3
        assert module.counter.counts == {"batches": 3}
    assert WithParameters.load_from_checkpoint(saved["path"], lr=0.5).lr == 0.5
    assert not same(WithParameters(layers=1).net.state_dict(), saved["weights"])


def test_the_content_equals_the_full_file_except_optimizers_rank_states_and_origin(saved: Any) -> None:
    whole = read_whole(saved["path"])
    full = torch.load(saved["folder"] / "full.ckpt", weights_only=True)
    assert full.keys() - whole.keys() == {"optimizer_states", *(f"rank_{rank}" for rank in range(4))}
    assert whole.keys() - full.keys() == {"mics_topology", "mics_choice"}
    assert whole["state_dict"].keys() == full["state_dict"].keys()
    assert same(*({n: t for n, t in one["state_dict"].items() if torch.is_tensor(t)} for one in (whole, full)))


@pytest.mark.parametrize(
    "map_location",
    ["meta", torch.device("meta"), {"cpu": "meta"}, lambda storage, location: storage, None],
    ids=["name", "device", "dict", "function", "nothing"],
)
def test_map_location_means_what_it_means_for_a_file(saved: Any, map_location: Any) -> None:
    whole = read_whole(saved["path"], map_location=map_location)
    full = torch.load(saved["folder"] / "full.ckpt", map_location=map_location, weights_only=True)
    devices = [
        {name: tensor.device for name, tensor in one["state_dict"].items() if torch.is_tensor(tensor)}
        for one in (whole, full)
    ]
    assert devices[0] == devices[1] and len(devices[0]) == len(saved["weights"])


def test_strict_means_what_it_means_in_lightning(saved: Any) -> None:
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"extra\""):
        Deeper.load_from_checkpoint(saved["path"])
    with pytest.warns(UserWarning, match="Found keys that are in the model state dict but not in the checkpoint"):
        module = Deeper.load_from_checkpoint(saved["path"], strict=False)
    assert same(module.net.state_dict(), saved["weights"]) and module.extra.tolist() == [1, 1]


def test_objects_need_weights_only_false(saved: Any) -> None:
    path = saved["folder"] / "object.ckpt"
    for options in ({}, {"weights_only": True}):
        with pytest.raises(UnsafeCheckpointError, match=r"meta\.pt holds tests\..*\.test_module_loading\.Note"):
            WithObject.load_from_checkpoint(path, **options)
    WithObject.load_from_checkpoint(path, weights_only=False)


def test_corruption_is_named(saved: Any, tmp_path: Path) -> None:
    path = shutil.copytree(saved["path"], tmp_path / "a.ckpt")
    os.truncate(path / "__2_0.distcp", 9)
    with pytest.raises(DamagedCheckpointError, match=r"__2_0\.distcp has 9 of"):
        WithParameters.load_from_checkpoint(path)


def test_a_data_module_loads_too(saved: Any) -> None:
    assert Data.load_from_checkpoint(saved["path"]).hparams["size"] == 24


def test_other_files_and_folders_are_left_to_lightning(saved: Any, tmp_path: Path) -> None:
    module = WithParameters.load_from_checkpoint(saved["folder"] / "full.ckpt")
    assert same(module.net.state_dict(), saved["weights"])
    with pytest.raises(IsADirectoryError):
        WithParameters.load_from_checkpoint(tmp_path)
