"""Saving and loading sharded models without a trainer: what is in the files, and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_mics import checkpoint
from lightning_mics.checkpoint import saving
from lightning_mics.checkpoint.dcp.unpickling import read_metadata
from lightning_mics.checkpoint.optimizer_states import optimizer_state
from lightning_mics.checkpoint.storage.manifest import MANIFEST_FILE, FileFacts, Manifest
from lightning_mics.sharding.shard_model import shard_model
from lightning_mics.techniques.partition_groups import create_partition_groups
from lightning_mics.topology import Topology
from tests.support.forked import RankError, run_ranks
from tests.support.models import Block, TinyLM, tokens

MakeOptimizer = Callable[[Any], Optimizer]


class WithSpareBlock(TinyLM):
    """Its last block is never used."""

    def __init__(self) -> None:
        super().__init__(layers=2)
        self.blocks.append(Block(7))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        spare, self.blocks = self.blocks, self.blocks[:-1]
        try:
            return super().forward(tokens)
        finally:
            self.blocks = spare


class WithExtraState(TinyLM):
    """Keeps a dict of its own in the state dict."""

    seen = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def _sharded(*, seed: int = 0, make: Callable[[], nn.Module] = TinyLM, nodes: int = 2) -> nn.Module:
    """A model over two ranks: on one node in one partition group, or on two nodes as two replicas."""
    torch.manual_seed(seed)
    model = make()
    topology = Topology(world_size=2, ranks_per_node=2 // nodes, partition_size=2 // nodes)
    shard_model(model, create_partition_groups(topology, device_type="cpu"))
    return model


def _train(model: nn.Module, optimizer: Optimizer, *, steps: int = 2) -> None:
    for step in range(steps):
        model(tokens(2, seed=10 * step + dist.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()


def _save(path: Path, model: nn.Module, *optimizers: Optimizer, meta: Any = None) -> None:
    checkpoint.save_sharded(
        path,
        model_state=get_model_state_dict(model),
        optimizer_states=[optimizer_state(model, each, sharded=True) for each in optimizers],
        meta={"meta": meta},
    )


def _save_full(path: Path, model: nn.Module, *optimizers: Optimizer) -> None:
    content = {
        "state_dict": {name: _whole(tensor) for name, tensor in get_model_state_dict(model).items()},
        "optimizer_states": [optimizer_state(model, each, sharded=False) for each in optimizers],
    }
    checkpoint.save_full(path, write=lambda file: torch.save(content, file))


def _load(path: Path, model: nn.Module, *optimizers: Optimizer, strict: bool = True) -> dict[str, Any]:
    return checkpoint.load(path, model=model, optimizers=optimizers, strict=strict, weights_only=False)


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _weights(model: nn.Module) -> dict[str, Any]:
    return {name: _whole(tensor) for name, tensor in get_model_state_dict(model).items()}


def _slots(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Of each parameter in turn what the optimizer keeps for it, whole."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [{slot: _whole(value) for slot, value in optimizer.state.get(p, {}).items()} for p in parameters]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def _refusal(path: Path, model: nn.Module, *optimizers: Optimizer, strict: bool = True) -> str:
    """The message of the error that loading raises."""
    try:
        _load(path, model, *optimizers, strict=strict)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def _sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1)


def _momentum(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def _adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01)


# -- what a checkpoint restores ---------------------------------------------------------------------------------------


def _round_trips() -> dict[str, Any]:
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared)
        for save in (_save, _save_full):
            for make in (_sgd, _momentum, _adamw):
                facts[save.__name__, make.__name__] = _round_trip(Path(shared[0], f"{save}{make}"), save, make)
            facts[save.__name__, "spare"] = _round_trip(Path(shared[0], f"{save}"), save, _adamw, WithSpareBlock)
            facts[save.__name__, "extra"] = _round_trip(Path(shared[0], f"{save}e"), save, _adamw, WithExtraState)
        dist.barrier()
    return facts


def _round_trip(path: Path, save: Any, make: MakeOptimizer, model_class: type[nn.Module] = TinyLM) -> dict[str, Any]:
    model = _sharded(make=model_class, nodes=2)
    first, optimizer = _weights(model), make(model.parameters())
    _train(model, optimizer)
    model.seen = 3
    save(path, model, optimizer)
    resumed = _sharded(seed=1, make=model_class, nodes=1)
    again = make(resumed.parameters())
    _load(path, resumed, again)
    facts = {
        "trained": not _same(first, _weights(model)),
        "weights": _same(_weights(model), _weights(resumed)),
        "slots": _same(_slots(optimizer), _slots(again)),
        "without slots": sum(not slots for slots in _slots(again)),
        "seen": getattr(resumed, "seen", None),
    }
    _train(model, optimizer)
    _train(resumed, again)
    later = _weights(model)
    facts["later"] = all(
        torch.allclose(value, later[name], atol=1e-6)
        for name, value in _weights(resumed).items()
        if "extra" not in name
    )
    return facts


@pytest.fixture(scope="module")
def round_trips() -> dict[str, Any]:
    return run_ranks(2, _round_trips)[0]


@pytest.mark.parametrize("save", ["_save", "_save_full"])
@pytest.mark.parametrize("optimizer", ["_sgd", "_momentum", "_adamw"])
def test_two_replicas_resume_as_one_partition_group_bit_for_bit(round_trips: Any, save: str, optimizer: str) -> None:
    facts = round_trips[save, optimizer]
    assert facts["trained"]
    assert facts["weights"]
    assert facts["slots"]
    assert facts["later"]


@pytest.mark.parametrize("save", ["_save", "_save_full"])
def test_a_block_that_was_never_used_resumes_without_optimizer_state(round_trips: Any, save: str) -> None:
    facts = round_trips[save, "spare"]
    assert facts["slots"]
    assert facts["without slots"] == len(list(Block(7).parameters()))
    assert facts["later"]


@pytest.mark.parametrize("save", ["_save", "_save_full"])
def test_extra_state_of_a_module_is_restored(round_trips: Any, save: str) -> None:
    assert round_trips[save, "extra"]["seen"] == 3
    assert round_trips[save, "extra"]["weights"]


def _saved_before_the_first_step(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for make in (_momentum, _adamw):
        model, undisturbed = _sharded(), _sharded()
        optimizer, plain = make(model.parameters()), make(undisturbed.parameters())
        _save(folder / make.__name__, model, optimizer)
        optimizer_state(model, optimizer, sharded=False)
        facts[make.__name__, "state"] = len(optimizer.state)
        resumed = _sharded(seed=1)
        again = make(resumed.parameters())
        _train(resumed, again)
        _load(folder / make.__name__, resumed, again)
        for each, its in ((model, optimizer), (undisturbed, plain), (resumed, again)):
            _train(each, its)
        facts[make.__name__, "saved"] = _same(_weights(model), _weights(undisturbed))
        facts[make.__name__, "resumed"] = _same(_weights(resumed), _weights(undisturbed))
    return facts


def test_saving_before_the_first_step_changes_neither_the_run_nor_one_that_resumes(tmp_path: Path) -> None:
    facts = run_ranks(2, _saved_before_the_first_step, tmp_path)[0]
    for make in ("_momentum", "_adamw"):
        assert facts[make, "state"] == 0
        assert facts[make, "saved"]
        assert facts[make, "resumed"]


def _options(folder: Path) -> dict[str, Any]:
    model = _sharded()
    optimizer = SGD(model.parameters(), lr=0.3, momentum=0.5)
    _train(model, optimizer)
    _save(folder / "shards", model, optimizer)
    _save_full(folder / "file", model, optimizer)
    facts = {}
    for name in ("shards", "file"):
        resumed = _sharded(seed=1)
        again = _sgd(resumed.parameters())
        _load(folder / name, resumed, again)
        facts[name] = (
            again.param_groups[0]["lr"],
            again.param_groups[0]["momentum"],
            _same(_slots(again), _slots(optimizer)),
        )
    return facts


def test_options_come_from_the_checkpoint_with_the_state_that_they_need(tmp_path: Path) -> None:
    facts = run_ranks(2, _options, tmp_path)[0]
    assert facts == {"shards": (0.3, 0.5, True), "file": (0.3, 0.5, True)}


def _frozen_and_grouped(folder: Path) -> dict[str, Any]:
    def make(model: nn.Module) -> list[Optimizer]:
        for parameter in model.blocks[0].parameters():
            parameter.requires_grad_(False)
        decayed = [p for name, p in model.named_parameters() if name.endswith("weight")]
        others = [p for name, p in model.named_parameters() if not name.endswith("weight")]
        return [AdamW([{"params": decayed}, {"params": others[:3], "weight_decay": 0.0}]), _momentum(others[3:])]

    model = _sharded()
    optimizers = make(model)
    _train(model, optimizers[0])
    model(tokens(2)).backward()
    optimizers[1].step()
    _save(folder / "shards", model, *optimizers)
    _save_full(folder / "file", model, *optimizers)
    facts: dict[str, Any] = {}
    for name in ("shards", "file"):
        resumed = _sharded(seed=1)
        again = make(resumed)
        _load(folder / name, resumed, *again)
        facts[name] = [_same(_slots(one), _slots(other)) for one, other in zip(optimizers, again, strict=True)]
        facts[name] += [again[0].param_groups[1]["weight_decay"], len(_slots(again[0])), len(again[0].state)]
    if dist.get_rank() == 0:
        state = torch.load(folder / "file", weights_only=True)["optimizer_states"][0]
        facts["numbers"] = sorted(state["state"])
        facts["groups"] = [group["params"] for group in state["param_groups"]]
    return facts


def test_two_optimizers_with_groups_and_frozen_parameters_are_restored_and_numbered_as_plain_ones(
    tmp_path: Path,
) -> None:
    facts = run_ranks(2, _frozen_and_grouped, tmp_path)[0]
    assert facts["shards"] == facts["file"]
    same, same_too, weight_decay, parameters, with_state = facts["file"]
    assert same
    assert same_too
    assert weight_decay == 0.0
    assert with_state < parameters  # the frozen ones have none
    assert [number for group in facts["groups"] for number in group] == list(range(parameters))
    assert len(facts["numbers"]) == with_state


# -- what is on disk --------------------------------------------------------------------------------------------------


def _listing(path: Path) -> list[str]:
    dist.barrier()
    names = sorted(entry.name for entry in path.iterdir())
    dist.barrier()
    return names


def _overwrite(folder: Path) -> dict[str, Any]:
    path, model = folder / "a" / "b.ckpt", _sharded()
    facts: dict[str, Any] = {}
    _save(path, model)
    facts["fresh"] = _listing(path)
    if dist.get_rank() == 0:
        (path / "__7_0.distcp").write_bytes(b"of a larger world")
        (path / "notes.txt").write_text("mine")
        (path / "runs").mkdir()
        (path / "runs" / "log.csv").write_text("mine too")
    _save(path, model)
    facts["overwritten"] = _listing(path)
    facts["beside"] = _listing(path.parent)
    facts["kept"] = (path / "runs" / "log.csv").read_text()
    if dist.get_rank() == 0:
        (folder / "file").write_text("a full file")
        (folder / "last").symlink_to(path)
    dist.barrier()
    _save(folder / "file", model)
    facts["instead of a file"] = _listing(folder / "file")
    _save(folder / "last", model)
    facts["instead of a link"] = ((folder / "last").is_symlink(), _listing(folder / "last"), _listing(path))
    return facts


@pytest.fixture(scope="module")
def overwritten(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(2, _overwrite, tmp_path_factory.mktemp("overwrite"))[0]


SHARDS = [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt"]


def test_a_checkpoint_is_one_file_of_shards_per_rank_two_of_metadata_and_a_manifest(
    overwritten: dict[str, Any],
) -> None:
    assert overwritten["fresh"] == SHARDS


def test_old_shards_go_and_foreign_files_stay(overwritten: dict[str, Any]) -> None:
    assert overwritten["overwritten"] == sorted([*SHARDS, "notes.txt", "runs"])
    assert overwritten["kept"] == "mine too"
    assert overwritten["beside"] == ["b.ckpt"]


def test_a_sharded_checkpoint_replaces_a_file_or_a_link_and_not_what_the_link_points_to(
    overwritten: dict[str, Any],
) -> None:
    assert overwritten["instead of a file"] == SHARDS
    is_link, listing, target = overwritten["instead of a link"]
    assert not is_link
    assert listing == SHARDS
    assert target == overwritten["overwritten"]


def _fail_midway(folder: Path) -> dict[str, Any]:
    path, model = folder / "ckpt", _sharded()
    facts: dict[str, Any] = {}

    def attempt(name: str, save: Callable[[], None]) -> None:
        try:
            save()
        except Exception as error:
            facts[name] = f"{type(error).__name__}: {error}"
        restored = _sharded(seed=1)
        facts[name, "before"] = _same(_weights(restored), _weights(model))
        facts[name, "meta"] = _load(path, restored)["meta"]
        facts[name, "after"] = _same(_weights(restored), _weights(model))
        facts[name, "files"] = _listing(path)

    _save(path, model, meta="first")
    if dist.get_rank() == 0:
        (path / "notes.txt").write_text("mine")
    changed = _sharded(seed=2)
    attempt("unpicklable meta", lambda: _save(path, changed, meta=lambda: None))
    write_shards = saving.save_shards
    saving.save_shards = _raising(OSError(28, "No space left on device"))
    attempt("full disk", lambda: _save(path, changed, meta="second"))
    saving.save_shards = write_shards
    write = _raising(OSError(28, "No space left on device"))
    if dist.get_rank() == 0:
        (path / "notes.txt").unlink()
    attempt("full file on a full disk", lambda: checkpoint.save_full(path, write=write))
    if dist.get_rank() == 0:  # killed between the two renames
        (path / "notes.txt").write_text("mine")
        path.rename(path.with_name(".ckpt.former"))
    dist.barrier()
    attempt("after a kill", lambda: _save(path, model, meta="third"))
    if dist.get_rank() == 0:  # killed after the second
        (folder / ".ckpt.former").mkdir()
        (folder / ".ckpt.former" / "todo.txt").write_text("mine")
        (folder / ".ckpt.former" / "meta.pt").write_text("old")
    dist.barrier()
    attempt("after a later kill", lambda: _save(path, model, meta="fourth"))
    facts["beside"] = _listing(folder)
    return facts


def _raising(error: Exception) -> Callable[..., None]:
    def fail(*_args: Any, **_options: Any) -> None:
        raise error

    return fail


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, _fail_midway, tmp_path_factory.mktemp("fail"))


@pytest.mark.parametrize("failure", ["unpicklable meta", "full disk", "full file on a full disk"])
def test_a_write_that_fails_leaves_the_earlier_checkpoint(failures: Any, failure: str) -> None:
    for facts in failures:
        assert not facts[failure, "before"]
        assert facts[failure, "after"]
        assert facts[failure, "meta"] == "first"


def test_all_ranks_raise_when_rank_zero_cannot_write(failures: Any) -> None:
    assert all("lambda" in facts["unpicklable meta"] for facts in failures)
    for facts in failures:
        assert facts["full file on a full disk"].startswith("OSError: [Errno 28] checkpoint /")
        assert facts["full file on a full disk"].endswith(
            "/ckpt was not saved, and earlier ones are unchanged; what failed: No space left on device"
        )


def test_foreign_files_outlive_a_job_that_was_killed_while_it_replaced_a_checkpoint(failures: Any) -> None:
    assert failures[0]["after a kill", "files"] == [*SHARDS, "notes.txt"]
    assert failures[0]["after a kill", "meta"] == "third"
    assert failures[0]["after a later kill", "files"] == [*SHARDS, "notes.txt", "todo.txt"]
    assert failures[0]["beside"] == ["ckpt"]


def _full_over_directories(folder: Path) -> dict[str, Any]:
    model = _sharded()
    facts: dict[str, Any] = {}
    _save(folder / "shards", model)
    _save_full(folder / "shards", model)
    facts["over shards"] = (folder / "shards").is_file()
    _save(folder / "annotated", model)
    if dist.get_rank() == 0:
        (folder / "annotated" / "notes.txt").write_text("mine")
        (folder / "foreign").mkdir()
    dist.barrier()
    for name in ("annotated", "foreign"):
        try:
            _save_full(folder / name, model)
        except Exception as error:
            facts[name] = f"{type(error).__name__}: {error}"
        facts[name, "files"] = _listing(folder / name)
    facts["beside"] = _listing(folder)
    return facts


def test_a_full_file_replaces_a_sharded_checkpoint_and_no_directory_with_foreign_files(tmp_path: Path) -> None:
    for facts in run_ranks(2, _full_over_directories, tmp_path):
        assert facts["over shards"]
        for name in ("annotated", "foreign"):
            assert facts[name].startswith("IsADirectoryError")
            assert str(tmp_path / name) in facts[name]
        assert facts["annotated", "files"] == [*SHARDS, "notes.txt"]
        assert facts["foreign", "files"] == []
        assert facts["beside"] == ["annotated", "foreign", "shards"]


# -- what is refused --------------------------------------------------------------------------------------------------


def _refusals(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    model = _sharded()
    optimizers = {make.__name__: make(model.parameters()) for make in (_sgd, _momentum, _adamw)}
    for name, optimizer in optimizers.items():
        _train(model, optimizer, steps=1)
        _save(folder / "shards" / name, model, optimizer)
        _save_full(folder / "file" / name, model, optimizer)
    for form in ("shards", "file"):
        paths = folder / form
        for saved, resumed in (("_sgd", _adamw), ("_momentum", _adamw), ("_adamw", _sgd), ("_adamw", _momentum)):
            other = _sharded(seed=1)
            facts[form, saved, resumed.__name__] = _refusal(paths / saved, other, resumed(other.parameters()))
        deeper, wider = _sharded(make=lambda: TinyLM(layers=4)), _sharded(make=lambda: TinyLM(dim=9))
        facts[form, "deeper"] = _refusal(paths / "_adamw", deeper)
        facts[form, "deeper, not strict"] = _refusal(paths / "_adamw", deeper, strict=False)
        facts[form, "partly loaded"] = _same(
            _weights(deeper)["blocks.2.up.weight"], _weights(model)["blocks.2.up.weight"]
        )
        facts[form, "shallower"] = _refusal(paths / "_adamw", _sharded(make=lambda: TinyLM(layers=2)))
        facts[form, "shallower, not strict"] = _refusal(
            paths / "_adamw", _sharded(make=lambda: TinyLM(layers=2)), strict=False
        )
        facts[form, "wider"] = _refusal(paths / "_adamw", wider)
        two = list(model.parameters())
        facts[form, "two optimizers"] = _refusal(paths / "_adamw", model, Adam(two[:2]), Adam(two[2:]))
        facts[form, "fewer parameters"] = _refusal(paths / "_adamw", model, AdamW(two[:2]))
        facts[form, "more groups"] = _refusal(
            paths / "_adamw", model, AdamW([{"params": two[:2]}, {"params": two[2:]}])
        )
    if dist.get_rank() == 0:
        (folder / "empty").mkdir()
        torch.save({"weight": torch.zeros(1)}, folder / "raw.pt")
    dist.barrier()
    for name in ("empty", "nowhere", "raw.pt"):
        facts[name] = _refusal(folder / name, model)
    return facts


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("refusals")
    (folder / "file").mkdir()
    by_rank = run_ranks(2, _refusals, folder)
    assert by_rank[0].keys() == by_rank[1].keys()
    assert {key for key in by_rank[0] if str(by_rank[0][key])[:12] != str(by_rank[1][key])[:12]} == set()
    return {**by_rank[0], "folder": folder}


@pytest.mark.parametrize("form", ["shards", "file"])
@pytest.mark.parametrize(
    ("saved", "resumed", "lacking"),
    [
        ("_sgd", "_adamw", "optimizer_0 (AdamW), for instance ['optimizer_0.param_groups.0.betas'"),
        ("_momentum", "_adamw", "exp_avg"),
        ("_adamw", "_sgd", "optimizer_0 (SGD), for instance ['optimizer_0.param_groups.0.momentum'"),
        ("_adamw", "_momentum", "momentum_buffer"),
    ],
    ids=["sgd to adamw", "momentum to adamw", "adamw to sgd", "adamw to momentum"],
)
def test_the_state_of_another_kind_of_optimizer_is_refused(
    refusals: dict[str, Any], form: str, saved: str, resumed: str, lacking: str
) -> None:
    message = refusals[form, saved, resumed]
    assert message.startswith("RuntimeError: the checkpoint lacks")
    assert lacking in message
    assert "another kind of optimizer" in message


@pytest.mark.parametrize("form", ["shards", "file"])
def test_other_parameter_groups_are_refused(refusals: dict[str, Any], form: str) -> None:
    assert (
        "parameter group 0 of optimizer_0 has 2 parameters, in the checkpoint 15" in refusals[form, "fewer parameters"]
    )
    assert "parameter group 0 of optimizer_0 has 2 parameters" in refusals[form, "more groups"]


@pytest.mark.parametrize("form", ["shards", "file"])
def test_another_number_of_optimizers_is_refused_with_both_numbers(refusals: dict[str, Any], form: str) -> None:
    assert "holds the states of 1 optimizers, the model has 2" in refusals[form, "two optimizers"]


@pytest.mark.parametrize("form", ["shards", "file"])
def test_names_that_differ_are_refused_unless_strict_is_off(refusals: dict[str, Any], form: str) -> None:
    assert "5 names are missing in the checkpoint ['blocks.3.down.bias', " in refusals[form, "deeper"]
    assert "0 are unknown to the model" in refusals[form, "deeper"]
    assert "0 names are missing" in refusals[form, "shallower"]
    assert "5 are unknown to the model ['blocks.2.down.bias', " in refusals[form, "shallower"]
    assert refusals[form, "deeper, not strict"] == "nothing was refused"
    assert refusals[form, "shallower, not strict"] == "nothing was refused"
    assert refusals[form, "partly loaded"]


@pytest.mark.parametrize("form", ["shards", "file"])
def test_another_width_is_refused(refusals: dict[str, Any], form: str) -> None:
    assert refusals[form, "wider"].startswith("RuntimeError: 19 tensors have another shape in the checkpoint")
    assert "'blocks.0.down.bias' with [7] in the checkpoint and [9] in the model" in refusals[form, "wider"]


def test_a_path_that_is_no_checkpoint_is_refused_by_name(refusals: dict[str, Any]) -> None:
    for name, reason in (
        ("empty", "neither a file nor"),
        ("nowhere", "neither a file nor"),
        ("raw.pt", "'state_dict'"),
    ):
        assert refusals[name].startswith(f"ValueError: {str(refusals['folder'] / name)!r} does not point to a valid")
        assert reason in refusals[name]


def test_a_rank_that_cannot_write_its_shards_makes_all_ranks_raise(tmp_path: Path) -> None:
    def save() -> None:
        model = _sharded()
        if dist.get_rank() == 1:
            torch.save = _raising(OSError(28, "No space left on device"))
        _save(tmp_path / "ckpt", model, _adamw(model.parameters()), meta=1)

    with pytest.raises(RankError) as raised:
        run_ranks(2, save)
    assert set(raised.value.failures) == {0, 1}
    assert not (tmp_path / "ckpt").exists()


def _damages(folder: Path) -> dict[str, Any]:
    path, model = folder / "ckpt", _sharded()
    _save(path, model)
    intact = {file.name: file.read_bytes() for file in path.iterdir()}
    dist.barrier()
    facts: dict[str, Any] = {"intact": sorted(intact)}
    for name, content in intact.items():
        half = len(content) // 2
        damaged = {
            "missing": None,
            "cut": content[:-9],
            "altered": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :],
        }
        for damage, wrong in damaged.items():
            if dist.get_rank() == 0:
                (path / name).unlink() if wrong is None else (path / name).write_bytes(wrong)
            dist.barrier()
            restored = _sharded(seed=1)
            before = _weights(restored)
            facts[name, damage] = _refusal(path, restored) if (name, damage) != (MANIFEST_FILE, "missing") else None
            facts[name, damage, "untouched"] = _same(_weights(restored), before)
            dist.barrier()
            if dist.get_rank() == 0:
                (path / name).write_bytes(content)
            dist.barrier()
    return facts


@pytest.fixture(scope="module")
def damages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, _damages, tmp_path_factory.mktemp("damage"))


@pytest.mark.parametrize("name", [name for name in SHARDS if name != MANIFEST_FILE])
@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
def test_damage_is_refused_on_all_ranks_by_the_name_of_the_file(damages: Any, name: str, damage: str) -> None:
    expected = {"missing": "is missing", "cut": "bytes", "altered": "was altered: its checksum is another"}[damage]
    for facts in damages:
        assert facts["intact"] == SHARDS
        assert facts[name, damage, "untouched"]
        assert facts[name, damage].startswith("DamagedCheckpointError: ")
        assert f"{name} " in facts[name, damage] and expected in facts[name, damage]


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_manifest_that_is_not_one_is_refused_or_lists_what_is_not_there(damages: Any, damage: str) -> None:
    assert all(facts[MANIFEST_FILE, damage].startswith("DamagedCheckpointError: ") for facts in damages)


def test_a_directory_without_a_manifest_loads_with_a_warning(tmp_path: Path) -> None:
    assert run_ranks(2, _without_manifest, tmp_path)[0] == ["ckpt has no manifest.json"]


def _without_manifest(folder: Path) -> list[str]:
    path, model = folder / "ckpt", _sharded()
    _save(path, model)
    if dist.get_rank() == 0:
        (path / MANIFEST_FILE).unlink()
    dist.barrier()
    restored = _sharded(seed=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _load(path, restored)
    assert _same(_weights(restored), _weights(model))
    return [str(w.message).split(":")[0].rpartition("/")[2] for w in caught if "manifest" in str(w.message)]


class Payload:
    """What a hostile pickle holds: loading it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


class WithPayload(WithExtraState):
    payload: Any = None

    def get_extra_state(self) -> Any:
        return {"seen": self.seen, "payload": self.payload}


def _hostile(folder: Path) -> dict[str, Any]:
    """A payload in each file of a checkpoint, with a manifest that fits; what loading says, and whether it has run."""
    facts: dict[str, Any] = {}
    ran = folder / "ran"

    def attempt(name: str, spoil: Callable[[Path], None], **loading: Any) -> None:
        path, model = folder / name, _sharded(make=WithPayload)
        model.payload = Payload(ran) if name == "value" else None
        _save(path, model)
        if dist.get_rank() == 0:
            spoil(path)
            written = Manifest.read(path).files
            Manifest.now({file: FileFacts.of(path / file) for file in written}, world_size=2).write(path)
        dist.barrier()
        restored = _sharded(seed=1, make=WithPayload)
        before = _weights(restored)
        try:
            checkpoint.load(path, model=restored, optimizers=[], strict=True, weights_only=True)
        except Exception as error:
            facts[name] = f"{type(error).__name__}: {error}"
        assert facts[name].startswith("UnsafeCheckpointError")
        facts[name, "ran"] = ran.exists()
        facts[name, "untouched"] = _same(_weights(restored), before)

    attempt("meta", lambda path: torch.save({"own": Payload(ran)}, path / "meta.pt"))
    attempt("metadata", lambda path: (path / ".metadata").write_bytes(pickle.dumps(Payload(ran))))
    attempt("shards", lambda path: _overwrite_tensors(path, Payload(ran)))
    attempt("elsewhere", _point_elsewhere)
    attempt("value", lambda path: None)
    return facts


def _overwrite_tensors(path: Path, payload: Payload) -> None:
    for file in path.glob("*.distcp"):
        content = io.BytesIO()
        torch.save(payload, content)
        size = file.stat().st_size
        file.write_bytes(content.getvalue().ljust(size, b"\0"))
    metadata = read_metadata(path / ".metadata")
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = replace(info, offset=0, length=len(content.getvalue()))
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def _point_elsewhere(path: Path) -> None:
    metadata = read_metadata(path / ".metadata")
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = replace(info, relative_path=f"../elsewhere/{info.relative_path}")
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, _hostile, tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("meta", "meta.pt holds posix.mkdir, which is neither plain data nor a tensor, and loading it could run code"),
        ("metadata", "metadata names posix.mkdir, which describes no tensor: loading it could run code"),
        ("shards", "posix.mkdir"),
        ("elsewhere", "names files outside of the checkpoint: ['../elsewhere/__0_0.distcp'"),
        ("value", "_extra_state.payload holds posix.mkdir, which is neither plain data nor a tensor"),
    ],
)
def test_a_hostile_checkpoint_runs_nothing_and_is_refused(hostile: Any, where: str, said: str) -> None:
    for facts in hostile:
        assert said in facts[where]
        assert not facts[where, "ran"]
        assert facts[where, "untouched"] or where in ("shards", "value")  # found while weights are read in place


def test_a_checkpoint_is_found_by_a_job_that_was_killed_between_the_two_renames(tmp_path: Path) -> None:
    assert run_ranks(2, _killed_between_renames, tmp_path) == ["first", "first"]


def _killed_between_renames(folder: Path) -> Any:
    path, model = folder / "ckpt", _sharded()
    _save(path, model, meta="first")
    if dist.get_rank() == 0:
        path.rename(path.with_name(".ckpt.former"))
        (folder / ".ckpt.unfinished").mkdir()
    dist.barrier()
    return _load(path, _sharded(seed=1))["meta"]
