"""Checkpoints that are refused: of other models, other optimizers, damaged, hostile."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.optim import Adam, AdamW

from lightning_mics import checkpoint
from lightning_mics.checkpoint.dcp.unpickling import read_metadata
from lightning_mics.checkpoint.errors import UnsafeCheckpointError
from lightning_mics.checkpoint.storage.manifest import MANIFEST_FILE, FileFacts, Manifest
from tests.support.checkpoints import (
    SHARDS,
    WithExtraState,
    adamw,
    is_same,
    load_into,
    momentum,
    raising,
    refusal_of,
    save_file,
    save_shards,
    sgd,
    sharded_model,
    train_steps,
    weights_of,
)
from tests.support.forked import RankError, run_ranks
from tests.support.models import TinyLM


def _refusals(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    model = sharded_model()
    optimizers = {make.__name__: make(model.parameters()) for make in (sgd, momentum, adamw)}
    for name, optimizer in optimizers.items():
        train_steps(model, optimizer, steps=1)
        save_shards(folder / "shards" / name, model, optimizer)
        save_file(folder / "file" / name, model, optimizer)
    for form in ("shards", "file"):
        paths = folder / form
        for saved, resumed in (("sgd", adamw), ("momentum", adamw), ("adamw", sgd), ("adamw", momentum)):
            other = sharded_model(seed=1)
            facts[form, saved, resumed.__name__] = refusal_of(paths / saved, other, resumed(other.parameters()))
        deeper, wider = sharded_model(make=lambda: TinyLM(layers=3)), sharded_model(make=lambda: TinyLM(dim=9))
        facts[form, "deeper"] = refusal_of(paths / "adamw", deeper)
        facts[form, "deeper, not strict"] = refusal_of(paths / "adamw", deeper, strict=False)
        facts[form, "partly loaded"] = is_same(
            weights_of(deeper)["blocks.1.up.weight"], weights_of(model)["blocks.1.up.weight"]
        )
        facts[form, "shallower"] = refusal_of(paths / "adamw", sharded_model(make=lambda: TinyLM(layers=1)))
        facts[form, "shallower, not strict"] = refusal_of(
            paths / "adamw", sharded_model(make=lambda: TinyLM(layers=1)), strict=False
        )
        facts[form, "wider"] = refusal_of(paths / "adamw", wider)
        two = list(model.parameters())
        facts[form, "two optimizers"] = refusal_of(paths / "adamw", model, Adam(two[:2]), Adam(two[2:]))
        facts[form, "fewer parameters"] = refusal_of(paths / "adamw", model, AdamW(two[:2]))
        facts[form, "more groups"] = refusal_of(
            paths / "adamw", model, AdamW([{"params": two[:2]}, {"params": two[2:]}])
        )
    if dist.get_rank() == 0:
        (folder / "empty").mkdir()
        torch.save({"weight": 1}, folder / "raw.pt")
    dist.barrier()
    for name in ("empty", "nowhere", "raw.pt"):
        facts[name] = refusal_of(folder / name, model)
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
        ("sgd", "adamw", "optimizer_0 (AdamW), for instance ['optimizer_0.param_groups.0.betas'"),
        ("momentum", "adamw", "exp_avg"),
        ("adamw", "sgd", "optimizer_0 (SGD), for instance ['optimizer_0.param_groups.0.momentum'"),
        ("adamw", "momentum", "momentum_buffer"),
    ],
    ids=["sgd to adamw", "momentum to adamw", "adamw to sgd", "adamw to momentum"],
)
def test_the_state_of_another_kind_of_optimizer_is_refused(
    refusals: dict[str, Any], form: str, saved: str, resumed: str, lacking: str
) -> None:
    message = refusals[form, saved, resumed]
    assert message.startswith("CheckpointMismatchError: the checkpoint lacks")
    assert lacking in message
    assert "another kind of optimizer" in message


@pytest.mark.parametrize("form", ["shards", "file"])
def test_other_parameter_groups_are_refused(refusals: dict[str, Any], form: str) -> None:
    assert (
        "parameter group 0 of optimizer_0 has 2 parameters, in the checkpoint 11" in refusals[form, "fewer parameters"]
    )
    assert "parameter group 0 of optimizer_0 has 2 parameters" in refusals[form, "more groups"]


@pytest.mark.parametrize("form", ["shards", "file"])
def test_another_number_of_optimizers_is_refused_with_both_numbers(refusals: dict[str, Any], form: str) -> None:
    assert "holds the states of 1 optimizers, the model has 2" in refusals[form, "two optimizers"]


@pytest.mark.parametrize("form", ["shards", "file"])
def test_names_that_differ_are_refused_unless_strict_is_off(refusals: dict[str, Any], form: str) -> None:
    assert "5 names are missing in the checkpoint ['blocks.2.down.bias', " in refusals[form, "deeper"]
    assert "0 are unknown to the model" in refusals[form, "deeper"]
    assert "0 names are missing" in refusals[form, "shallower"]
    assert "5 are unknown to the model ['blocks.1.down.bias', " in refusals[form, "shallower"]
    assert refusals[form, "deeper, not strict"] == "nothing was refused"
    assert refusals[form, "shallower, not strict"] == "nothing was refused"
    assert refusals[form, "partly loaded"]


@pytest.mark.parametrize("form", ["shards", "file"])
def test_another_width_is_refused(refusals: dict[str, Any], form: str) -> None:
    assert refusals[form, "wider"].startswith(
        "CheckpointMismatchError: 14 tensors have another shape in the checkpoint"
    )
    assert "'blocks.0.down.bias' with [7] in the checkpoint and [9] in the model" in refusals[form, "wider"]


def test_a_path_that_is_no_checkpoint_is_refused_by_name(refusals: dict[str, Any]) -> None:
    for kind, name, reason in (
        ("ValueError", "empty", "neither a file nor"),
        ("FileNotFoundError", "nowhere", "there is nothing"),
        ("ValueError", "raw.pt", "'state_dict'"),
    ):
        assert refusals[name].startswith(f"{kind}: {str(refusals['folder'] / name)!r} does not point to a valid")
        assert reason in refusals[name]


def test_a_rank_that_cannot_write_its_shards_makes_all_ranks_raise(tmp_path: Path) -> None:
    def save() -> None:
        model = sharded_model()
        if dist.get_rank() == 1:
            torch.save = raising(OSError(28, "No space left on device"))
        save_shards(tmp_path / "ckpt", model, adamw(model.parameters()), meta=1)

    with pytest.raises(RankError) as raised:
        run_ranks(2, save)
    assert set(raised.value.failures) == {0, 1}
    assert not (tmp_path / "ckpt").exists()


def _damages(folder: Path) -> dict[str, Any]:
    path, model = folder / "ckpt", sharded_model()
    save_shards(path, model)
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
            restored = sharded_model(seed=1)
            before = weights_of(restored)
            facts[name, damage] = refusal_of(path, restored) if (name, damage) != (MANIFEST_FILE, "missing") else None
            facts[name, damage, "untouched"] = is_same(weights_of(restored), before)
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
        if damage == "altered" and name.endswith(".distcp"):  # it is found as tensors are read
            assert "load another checkpoint before you go on" in facts[name, damage]
        else:
            assert facts[name, damage, "untouched"]
        assert facts[name, damage].startswith("DamagedCheckpointError: ")
        assert f"{name} " in facts[name, damage] and expected in facts[name, damage]


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_manifest_that_is_not_one_is_refused_or_lists_what_is_not_there(damages: Any, damage: str) -> None:
    assert all(facts[MANIFEST_FILE, damage].startswith("DamagedCheckpointError: ") for facts in damages)


def test_a_directory_without_a_manifest_loads_with_a_warning(tmp_path: Path) -> None:
    assert run_ranks(2, _without_manifest, tmp_path)[0] == ["ckpt has no manifest.json"]


def _without_manifest(folder: Path) -> list[str]:
    path, model = folder / "ckpt", sharded_model()
    save_shards(path, model)
    if dist.get_rank() == 0:
        (path / MANIFEST_FILE).unlink()
    dist.barrier()
    restored = sharded_model(seed=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_into(path, restored)
    assert is_same(weights_of(restored), weights_of(model))
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
        path, model = folder / name, sharded_model(make=WithPayload)
        model.payload = Payload(ran) if name == "value" else None
        save_shards(path, model)
        if dist.get_rank() == 0:
            spoil(path)
            written = Manifest.read(path).files
            Manifest.now({file: FileFacts.of(path / file) for file in written}, world_size=2).write(path)
        dist.barrier()
        restored = sharded_model(seed=1, make=WithPayload)
        before = weights_of(restored)
        try:
            checkpoint.load(path, model=restored, optimizers=[], strict=True, weights_only=True)
        except Exception as error:
            facts[name] = f"{type(error).__name__}: {error}"
        assert facts[name].startswith("UnsafeCheckpointError")
        facts[name, "ran"] = ran.exists()
        facts[name, "untouched"] = is_same(weights_of(restored), before)

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


def _rewritten(folder: Path) -> dict[str, str]:
    """What loading says of files that are data only, with a manifest that fits, but not what was written."""
    said: dict[str, str] = {}

    def attempt(name: str, change: Callable[[Any, dict[str, Any]], None]) -> None:
        path, model = folder / name, sharded_model()
        save_shards(path, model, adamw(model.parameters()))
        if dist.get_rank() == 0:
            metadata, meta = read_metadata(path / ".metadata"), torch.load(path / "meta.pt")
            change(metadata, meta)
            (path / ".metadata").write_bytes(pickle.dumps(metadata))
            torch.save(meta, path / "meta.pt")
            written = Manifest.read(path).files
            Manifest.now({file: FileFacts.of(path / file) for file in written}, world_size=2).write(path)
        dist.barrier()
        restored = sharded_model(seed=1)
        said[name] = refusal_of(path, restored, adamw(restored.parameters()))

    def first_tensor(metadata: Any) -> Any:
        return next(entry for entry in metadata.state_dict_metadata.values() if hasattr(entry, "chunks"))

    def groups_are_numbers(metadata: Any, meta: dict[str, Any]) -> None:
        paths = metadata.planner_data
        metadata.planner_data = {name: path[:3] if "param_groups" in path else path for name, path in paths.items()}

    attempt("paths", lambda metadata, meta: setattr(metadata, "planner_data", 3))
    attempt("offsets", lambda metadata, meta: delattr(first_tensor(metadata).chunks[0], "offsets"))
    attempt("sizes", lambda metadata, meta: setattr(first_tensor(metadata).chunks[0], "sizes", 7))
    attempt("entry", lambda metadata, meta: metadata.state_dict_metadata.update({"extra": "a tensor"}))
    attempt("groups", groups_are_numbers)
    attempt("layout", lambda metadata, meta: meta["mics_layout"]["record"].pop("keys"))
    return said


def test_metadata_that_were_rewritten_are_refused_by_name(tmp_path: Path) -> None:
    for said in run_ranks(2, _rewritten, tmp_path):
        assert set(said) == {"paths", "offsets", "sizes", "entry", "groups", "layout"}
        for name, message in said.items():
            assert message.startswith("DamagedCheckpointError: checkpoint "), name
            assert f"{name} is corrupted: " in message, name


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
    path, model = folder / "ckpt", sharded_model()
    save_shards(path, model, meta="first")
    if dist.get_rank() == 0:
        path.rename(path.with_name(".ckpt.former"))
        (folder / ".ckpt.unfinished").mkdir()
    dist.barrier()
    return load_into(path, sharded_model(seed=1))["meta"]


class _WithGetattr(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.0 to 3.11.3 do, and the class of metadata as ``hostile`` says."""

    hostile = False

    def reducer_override(self, value: Any) -> Any:
        if self.hostile and isinstance(value, torch.Size):
            return getattr, (Metadata, "__init__")
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


@pytest.mark.parametrize("hostile", [False, True], ids=["an enumeration", "anything else"])
def test_members_of_enumerations_are_read_as_early_pythons_write_them(tmp_path: Path, hostile: bool) -> None:
    run_ranks(2, _saved, tmp_path / "ckpt")
    file = tmp_path / "ckpt" / ".metadata"
    metadata, stream = read_metadata(file), io.BytesIO()
    pickler = _WithGetattr(stream, protocol=pickle.HIGHEST_PROTOCOL)
    pickler.hostile = hostile
    pickler.dump(metadata)
    assert b"getattr" in stream.getvalue()
    file.write_bytes(stream.getvalue())
    if hostile:
        with pytest.raises(UnsafeCheckpointError, match=r"names builtins\.getattr"):
            read_metadata(file)
    else:
        assert read_metadata(file) == metadata


def _saved(path: Path) -> None:
    save_shards(path, sharded_model())
