"""Checkpoints of other strategies load here, and those of here load there: losses go on as where they were saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallel
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lightning_mics import MiCSFabricStrategy
from tests.support.accelerators import start as start_accelerator
from tests.support.elsewhere import (
    BEFORE,
    Loop,
    LoopFSDP,
    TrainedSharded,
    TrainerFSDP,
    accelerate_ddp,
    accelerate_load,
    accelerate_loop,
    accelerate_save,
    fabric_load,
    fabric_loop,
    fabric_save,
    for_fabric,
    fsdp2,
    fsdp_on_cpus,
    full,
    plain_loop,
    trainer_losses,
    use_kind,
)
from tests.support.fits import refusal
from tests.support.models import Block
from tests.support.trainers import mics

THERE, HERE = 2, 3  # ranks
BY_RANKS = {"data_parallel_size": THERE, "tensor_parallel_size": 1}
ONE_GROUP = {"ranks_per_node": HERE, "partition_size": HERE}
REPLICAS = {"ranks_per_node": 1, "partition_size": 1}
OWN_KEYS = ("net", "opt")


class App:
    """An object with a state, as torch's tutorial has it."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def plain_states(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """What programs pass to ``dcp.save``, by the name of the checkpoint."""
    weights, of_optimizer = get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    return {
        "dcp": {"model": weights, "optimizer": of_optimizer, "step": BEFORE, "loader": {"epoch": 1}},
        "dcp optim": {"model": weights, "optim": of_optimizer, "step": BEFORE},
        "dcp long keys": {"model_state_dict": weights, "optimizer_state_dict": of_optimizer, "step": BEFORE},
        "dcp flat": {**weights, "optimizer": flat, "step": BEFORE},
        "dcp app": {"app": App(model, optimizer)},
        "dcp numbers": {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": BEFORE},
        "dcp weights": model.state_dict(),
        "dcp unknown": {"one": weights, "other": weights},
    }


def model_parallel() -> Loop:
    return fabric_loop(FabricModelParallel(for_fabric, **BY_RANKS))


def save_plainly(loop: Loop, path: Path) -> None:
    for name, state in plain_states(loop.model, loop.optimizer).items():
        dcp.save(state, checkpoint_id=path.with_name(name))


def saved(loop: Loop, save: Callable[[], None]) -> list[float]:
    """Losses of going on after saving."""
    loop.before()
    save()
    return loop.after()


def run_there(folder: Path) -> dict[Any, list[float]]:
    """Save with other strategies; returns the losses that followed."""
    with fsdp_on_cpus():
        found = {
            "trainer model parallel": trainer_losses(
                ModelParallelStrategy(**BY_RANKS), make=TrainedSharded, save=folder / "trainer model parallel"
            ),
            "trainer fsdp": trainer_losses(
                TrainerFSDP(state_dict_type="sharded", auto_wrap_policy={Block}), save=folder / "trainer fsdp"
            ),
        }
        loops = {
            "fabric model parallel": (model_parallel, lambda loop, path: fabric_save(loop, path, OWN_KEYS)),
            "fabric fsdp": (
                lambda: fabric_loop(LoopFSDP(state_dict_type="sharded", auto_wrap_policy={Block})),
                fabric_save,
            ),
            "accelerate": (lambda: accelerate_loop(fsdp2()), accelerate_save),
            "accelerate unsharded": (
                lambda: accelerate_loop(accelerate_ddp()),
                lambda loop, path: loop.host.save_state(str(path)),
            ),
            "dcp": (plain_loop, save_plainly),
        }
        for name, (make, save) in loops.items():
            loop = make()
            found[name] = saved(loop, partial(save, loop, folder / name))
        return found


OF_TRAINERS = ["trainer model parallel", "trainer fsdp full"]

BY_FABRIC = {  # with the keys in the state, and whether there is another entry
    "fabric model parallel": (OWN_KEYS, True),
    "fabric model parallel full": (OWN_KEYS, True),
    "fabric fsdp": (("model", "optimizer"), True),
    "fabric fsdp full": (("model", "optimizer"), True),
    "accelerate": (OWN_KEYS, False),
    "accelerate full": (OWN_KEYS, False),
    "accelerate unsharded": (OWN_KEYS, False),
    "dcp": (("model", "optimizer"), True),
    "dcp optim": (("model", "optimizer"), True),
    "dcp long keys": (OWN_KEYS, True),
    "dcp flat": (("model", "optimizer"), True),
    "dcp app": (("model", "optimizer"), False),
    "dcp numbers": (("model", "optimizer"), True),
}

BY_ACCELERATE = ["accelerate", "accelerate full"]

BY_PLUGIN = ["fabric fsdp full", "accelerate", "accelerate unsharded", "dcp flat"]


def rejected(loop: Loop, path: Path) -> str:
    """The error of a load, before which no weight was changed."""
    before = [parameter.detach().clone() for parameter in loop.model.parameters()]
    message = refusal(lambda: fabric_load(loop, path))
    unchanged = zip(before, loop.model.parameters(), strict=True)
    assert all(torch.equal(one.to_local(), other.detach().to_local()) for one, other in unchanged)
    return message


REJECTED = {
    "dcp unknown": "holds tensors under 'one', 'other', and no key says which are the model's; save it under one of",
    "dcp weights": "has no 'optimizer'",
    "dcp app": "has no 'step'",
    "cut": "__0_0.distcp has 100 of",
    "unfinished": "it has shards and no .metadata, so saving it was not completed",
    "deepspeed": "it is a checkpoint of DeepSpeed, which stores parts of flattened parameters; turn it into a file",
    "by rank": "each rank has saved its own part in a file that only the same ranks can load",
    "transformers": "load them with lightning_mics.load_pretrained(network, folder)",
}


def make_unreadable(folder: Path) -> None:
    for name, files in {
        "unfinished": ["__0_0.distcp"],
        "deepspeed": ["latest", "zero_to_fp32.py"],
        "by rank": ["pytorch_model_fsdp_0_rank0.bin"],
        "transformers": ["model.safetensors", "config.json"],
    }.items():
        (folder / name).mkdir()
        for file in files:
            (folder / name / file).touch()
    (folder / "cut").mkdir()
    for file in (folder / "dcp").iterdir():
        (folder / "cut" / file.name).write_bytes(file.read_bytes()[: 100 if file.name == "__0_0.distcp" else None])


def run_here(folder: Path) -> dict[Any, Any]:
    """Load what was saved there, and save; returns losses and messages."""
    if dist.get_rank() == 0:
        make_unreadable(folder)
    dist.barrier()
    found: dict[Any, Any] = {
        (name, "trainer"): trainer_losses(mics(**ONE_GROUP), resume=folder / name) for name in OF_TRAINERS
    }
    found["our trainer"] = trainer_losses(mics(**REPLICAS), save=folder / "our trainer")
    loop = fabric_loop(MiCSFabricStrategy(**ONE_GROUP), seed=2)
    for name, (keys, entry) in BY_FABRIC.items():
        found[name, "fabric"] = fabric_load(loop, folder / name, keys, entry=entry)
    found.update({f"rejected {name}": rejected(loop, folder / name) for name in REJECTED})
    loop = fabric_loop(MiCSFabricStrategy(**ONE_GROUP))
    found["our fabric"] = saved(loop, lambda: fabric_save(loop, folder / "our fabric", OWN_KEYS))
    loop = accelerate_loop(start_accelerator(plugin=ONE_GROUP))
    plugin = loop.host.state.fsdp_plugin
    found["our accelerate"] = saved(loop, lambda: accelerate_save(loop, folder / "our accelerate"))
    for name in BY_ACCELERATE:
        found[name, "accelerate"] = accelerate_load(loop, folder / name)
    for name in BY_PLUGIN:
        plugin.load_checkpoint(loop.host, folder / name)
        found[name, "plugin"] = loop.after()
    found["load_state of dcp"] = refusal(lambda: accelerate_load(loop, folder / "dcp"))
    use_kind(loop, "SHARDED")
    found["load_state of full"] = refusal(lambda: loop.host.load_state(str(folder / "accelerate full")))
    return found


def load_plainly(loop: Loop, path: Path, keys: tuple[str, str]) -> list[float]:
    state = {
        keys[0]: get_model_state_dict(loop.model),
        keys[1]: get_optimizer_state_dict(loop.model, loop.optimizer),
    }
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(loop.model, state[keys[0]])
    set_optimizer_state_dict(loop.model, loop.optimizer, state[keys[1]])
    return loop.after()


def run_back(folder: Path) -> dict[Any, Any]:
    """Load with other strategies what was saved here."""
    ours = folder / "our trainer"
    file = folder / "our fabric.pt"
    if dist.get_rank() == 0:
        dcp_to_torch_save(folder / "our fabric", file)
    dist.barrier()
    with fsdp_on_cpus():
        found: dict[Any, Any] = {
            ("our trainer", "model parallel"): trainer_losses(
                ModelParallelStrategy(**BY_RANKS), make=TrainedSharded, resume=ours
            ),
            ("our trainer", "fsdp"): trainer_losses(TrainerFSDP(auto_wrap_policy={Block}), resume=ours),
            ("our trainer full", "model parallel"): trainer_losses(
                ModelParallelStrategy(**BY_RANKS), make=TrainedSharded, resume=full(ours)
            ),
        }
    loop = model_parallel()
    found["our fabric", "model parallel"] = fabric_load(loop, folder / "our fabric", OWN_KEYS)
    found["our fabric full", "model parallel"] = fabric_load(loop, folder / "our fabric full", OWN_KEYS)
    found["our fabric", "dcp_to_torch_save"] = fabric_load(loop, file, OWN_KEYS, entry=False)
    found["our accelerate", "accelerate"] = accelerate_load(accelerate_loop(fsdp2()), folder / "our accelerate")
    loop = plain_loop(seed=2)
    found["our fabric", "dcp"] = load_plainly(loop, folder / "our fabric", OWN_KEYS)
    loop.optimizer.state.clear()
    found["new optimizer"] = loop.after()
    return found


LOADED_THERE = [
    ("our trainer", "model parallel"),
    ("our trainer", "fsdp"),
    ("our trainer full", "model parallel"),
    ("our fabric", "model parallel"),
    ("our fabric full", "model parallel"),
    ("our fabric", "dcp_to_torch_save"),
    ("our accelerate", "accelerate"),
    ("our fabric", "dcp"),
]

LOADED_HERE = [
    *((name, "trainer") for name in OF_TRAINERS),
    *((name, "fabric") for name in BY_FABRIC),
    *((name, "accelerate") for name in BY_ACCELERATE),
    *((name, "plugin") for name in BY_PLUGIN),
]


@pytest.fixture(scope="module")
def runs(on_shared_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """The losses, or messages, of all cases; equal on all ranks."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found: dict[Any, Any] = {}
    for run, ranks in ((run_there, THERE), (run_here, HERE), (run_back, THERE)):
        first, *others = on_shared_ranks(run, folder, world_size=ranks)
        assert all(other == first for other in others)
        found.update(first)
    return found


def where_saved(runs: dict[Any, Any], name: str) -> list[float]:
    return runs["dcp" if name.startswith("dcp") else name.removesuffix(" full")]


@pytest.mark.parametrize("case", LOADED_HERE, ids=" into ".join)
def test_losses_go_on_here_as_where_the_checkpoint_was_saved(runs: dict[Any, Any], case: tuple[str, str]) -> None:
    assert runs[case] == pytest.approx(where_saved(runs, case[0]), rel=0, abs=1e-6)


@pytest.mark.parametrize("case", LOADED_THERE, ids=" into ".join)
def test_losses_go_on_there_as_here(runs: dict[Any, Any], case: tuple[str, str]) -> None:
    assert runs[case] == pytest.approx(where_saved(runs, case[0]), rel=0, abs=1e-6)


def test_losses_show_that_states_of_optimizers_are_loaded(runs: dict[Any, Any]) -> None:
    assert max(abs(one - other) for one, other in zip(runs["new optimizer"], runs["dcp"], strict=True)) > 0.01


@pytest.mark.parametrize("case", REJECTED)
def test_what_cannot_be_loaded_is_named_before_weights_change(runs: dict[Any, Any], case: str) -> None:
    assert REJECTED[case] in runs[f"rejected {case}"]


def test_accelerate_names_the_method_that_loads_other_checkpoints(runs: dict[Any, Any]) -> None:
    """Its neighbors, folders of ``save_state`` with both kinds of files, load above."""
    assert "was not written by accelerator.save_state with FSDP" in runs["load_state of dcp"]
    assert 'pass MiCSPlugin(state_dict_type="full"), or load model and optimizers with' in runs["load_state of full"]
