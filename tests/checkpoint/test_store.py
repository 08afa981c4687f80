"""Checkpoints in a store: what is in it, what is read again, and what faults on the way to it leave."""

from __future__ import annotations

import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pytest
import s3fs
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from lightning_mics import checkpoint
from lightning_mics.checkpoint import inspect
from lightning_mics.checkpoint.storage.manifest import MANIFEST_FILE, FileFacts, Manifest
from lightning_mics.checkpoint.storage.path import StoragePath, storage_path
from lightning_mics.checkpoint.storage.store import CheckpointStore
from lightning_mics.sharding.shard_model import shard_model
from lightning_mics.techniques.partition_groups import create_partition_groups
from lightning_mics.topology import Topology
from tests.support.forked import Run, run_cases
from tests.support.s3 import BUCKET, Fault, fault, s3

__all__ = ["fault", "s3"]


FILES = [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]


def _model(*, seed: int = 0, width: int = 8) -> nn.Module:
    """Two equal layers over two ranks in one partition group."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    topology = Topology(world_size=2, ranks_per_node=2, partition_size=2)
    shard_model(model, create_partition_groups(topology, device_type="cpu"))
    return model


def _save(path: StoragePath, model: nn.Module, *, meta: Any) -> None:
    state = get_model_state_dict(model)
    checkpoint.save_sharded(path, model_state=state, optimizer_states=[], meta={"meta": meta})


def _load(path: StoragePath, model: nn.Module) -> Any:
    return checkpoint.load(path, model=model, optimizers=[], strict=True, weights_only=True)["meta"]


def _weights(model: nn.Module) -> list[bytes]:
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.state_dict().values()]
    return [tensor.numpy().tobytes() for tensor in whole]


def _names(path: StoragePath) -> list[str]:
    """What is at ``path``, at any depth; the folder of a save is written as a star."""
    dist.barrier()
    path.fs.invalidate_cache()
    names = sorted(name.removeprefix(f"{path.path}/") for name in path.fs.find(path.path))
    dist.barrier()
    return [name if "/" not in name else f"*/{name.rpartition('/')[2]}" for name in names]


def _error(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# -- what is in the store ---------------------------------------------------------------------------------------------


def _round_trip(url: str) -> dict[str, Any]:
    path, model, loaded = storage_path(f"{url}/a/b.ckpt"), _model(), _model(seed=1)
    facts: dict[str, Any] = {"before": _weights(loaded) == _weights(model)}
    _save(path, model, meta="first")
    facts["fresh"] = _names(path)
    facts["meta"] = _load(path, loaded)
    facts["after"] = _weights(loaded) == _weights(model)
    manifest = Manifest.read(path)
    facts["etags"] = [manifest.files[name].etag is not None for name in sorted(manifest.files)]
    facts["checksums"] = {name: FileFacts.of(manifest.content(path) / name).sha256 for name in manifest.files} == {
        name: facts.sha256 for name, facts in manifest.files.items()
    }
    facts["inspect"] = inspect.main([str(path)])
    if dist.get_rank() == 0:
        for name in ("notes.txt", "20200101T000000-0123abcd/__0_0.distcp"):  # the user's, and a killed job's
            (path / name).write_bytes(b"there")
        (path.with_name("b.ckpt-v1") / MANIFEST_FILE).write_bytes(b"a neighbor's")
    dist.barrier()
    _save(path, _model(seed=2), meta="second")
    facts["overwritten"] = _names(path)
    facts["second"] = _load(path, loaded)
    if dist.get_rank() == 0:
        CheckpointStore(path).remove()
    facts["removed"] = _names(path.parent)
    facts["nothing"] = _error(lambda: _load(path, loaded))
    return facts


@pytest.fixture(scope="module")
def round_trip(s3: str, run_shared: Run) -> list[dict[str, Any]]:
    return run_shared(2, _round_trip, s3)


def test_a_checkpoint_is_a_manifest_and_a_folder_of_its_own(round_trip: Any) -> None:
    assert round_trip[0]["fresh"] == sorted([*(f"*/{name}" for name in FILES), MANIFEST_FILE])


def test_what_was_saved_is_loaded_on_all_ranks(round_trip: Any) -> None:
    for facts in round_trip:
        assert not facts["before"]
        assert facts["after"]
        assert (facts["meta"], facts["second"]) == ("first", "second")
        assert facts["inspect"] == 0


def test_the_manifest_has_the_etags_of_the_store_and_checksums_of_the_content(round_trip: Any) -> None:
    assert round_trip[0]["etags"] == [True] * len(FILES)
    assert round_trip[0]["checksums"]


def test_a_save_removes_what_killed_and_earlier_ones_have_left_and_nothing_else(round_trip: Any) -> None:
    assert round_trip[0]["overwritten"] == sorted([*round_trip[0]["fresh"], "notes.txt"])


def test_removing_leaves_a_neighbour_whose_name_begins_alike(round_trip: Any) -> None:
    assert round_trip[0]["removed"] == ["*/manifest.json"]
    assert all("does not point to a valid checkpoint" in facts["nothing"] for facts in round_trip)


def _copied(url: str, folder: Path) -> dict[str, Any]:
    path, model, loaded = storage_path(f"{url}/copied.ckpt"), _model(), _model(seed=1)
    _save(path, model, meta="in the store")
    if dist.get_rank() == 0:
        path.fs.get(path.path, str(folder / "local.ckpt"), recursive=True)
    dist.barrier()
    facts: dict[str, Any] = {"to a file system": _load(folder / "local.ckpt", loaded)}
    facts["same"] = _weights(loaded) == _weights(model)
    _save(folder / "plain.ckpt", model, meta="on a file system")
    again = storage_path(f"{url}/plain.ckpt")
    if dist.get_rank() == 0:
        path.fs.put(str(folder / "plain.ckpt"), again.path, recursive=True)
    facts["to the store"] = _load(again, loaded)
    facts["plain"] = _names(again)
    _save(again, model, meta="over it")
    facts["over it"] = (_load(again, loaded), _names(again))
    return facts


def test_a_copy_is_whole_elsewhere_too(s3: str, tmp_path: Path, run_shared: Run) -> None:
    facts = run_shared(2, _copied, s3, tmp_path)[0]
    assert (facts["to a file system"], facts["same"]) == ("in the store", True)
    assert facts["to the store"] == "on a file system"
    assert facts["plain"] == sorted([*FILES, MANIFEST_FILE])
    assert facts["over it"] == ("over it", sorted([*(f"*/{name}" for name in FILES), MANIFEST_FILE]))


def _damaged(url: str) -> dict[str, Any]:
    path, loaded = storage_path(f"{url}/damaged.ckpt"), _model(seed=1)
    facts = {}
    for damage in ("missing", "altered", "cut short", "rewritten"):
        _save(path, _model(), meta=damage)
        shard = Manifest.read(path).content(path) / "__1_0.distcp"
        content = shard.read_bytes()
        dist.barrier()
        if dist.get_rank() == 0:
            if damage == "missing":
                shard.unlink()
            else:
                shard.write_bytes(
                    {"altered": content[:-1] + b"!", "cut short": content[:-1], "rewritten": content}[damage]
                )
        dist.barrier()
        facts[damage] = _error(lambda: _load(path, loaded))
    return facts


def test_a_file_that_is_missing_or_other_than_it_was_is_named(s3: str, run_shared: Run) -> None:
    for facts in run_shared(2, _damaged, s3):
        assert "damaged.ckpt is corrupted: __1_0.distcp is missing" in facts["missing"]
        assert "damaged.ckpt is corrupted: __1_0.distcp was altered" in facts["altered"]
        assert "damaged.ckpt is corrupted: __1_0.distcp has " in facts["cut short"]
        assert facts["rewritten"] == "no error"


def _requests(url: str) -> dict[str, int]:
    path, model = storage_path(f"{url}/requests.ckpt"), _model(width=64)
    _save(path, model, meta=None)
    fetched: list[int] = []
    fetch_range = s3fs.S3File._fetch_range

    def counting(file: Any, start: int, end: int) -> bytes:
        if file.path.endswith(".distcp"):
            fetched.append(end - start)
        return bytes(fetch_range(file, start, end))

    s3fs.S3File._fetch_range = counting
    _load(path, model)
    manifest = Manifest.read(path)
    stored = sum(facts.size_bytes for name, facts in manifest.files.items() if name.endswith(".distcp"))
    return {"fetched": sum(fetched), "requests": len(fetched), "stored": stored}


def test_a_rank_fetches_the_shards_it_needs_once(in_one_job: Any) -> None:
    facts = in_one_job["requests"]
    assert all(0 < each["fetched"] <= each["stored"] for each in facts)
    assert sum(each["fetched"] for each in facts) == facts[0]["stored"]
    assert all(each["requests"] == 1 for each in facts)  # two weights and two biases in one block


# -- faults -----------------------------------------------------------------------------------------------------------


def _attempt(fault: Fault, beginning: str, action: Any, *, answers: bool = False) -> tuple[str, int]:
    """The error that ``action`` raises while requests that begin so are cut, and how many were."""
    dist.barrier()
    with fault.cutting(beginning, answers=answers) if dist.get_rank() == 0 else nullcontext():
        dist.barrier()
        error = _error(action)
        dist.barrier()
    return error, fault.hits


CUT = {
    "a shard of rank 1": "__1_0.distcp",
    "the metadata": ".metadata.tmp",
    "what is not sharded": "meta.pt",
    "the manifest": MANIFEST_FILE,
}


def _faults(url: str, fault: Fault) -> dict[str, Any]:
    path, other = storage_path(f"{url}/faults.ckpt"), storage_path(f"{url}/other.ckpt")
    model, changed, loaded = _model(), _model(seed=1), _model(seed=2)
    _save(other, model, meta="other")
    _save(path, model, meta="first")
    facts: dict[str, Any] = {}
    for name, file in CUT.items():
        cut = rf"PUT \S*/{re.escape(file)} "
        error, hits = _attempt(fault, cut, lambda: _save(path, changed, meta="new"))
        facts[name] = {"error": error, "hits": hits, "left": _names(path)}
        facts[name]["loaded"] = (_load(path, loaded), _weights(loaded) == _weights(model), _load(other, loaded))
    cut = "HEAD /checkpoints/faults.ckpt/manifest.json"
    facts["no answer"] = _attempt(fault, cut, lambda: _save(path, changed, meta="new"), answers=True)
    facts["after no answer"] = _load(path, loaded)
    cut = "PUT /checkpoints/faults.ckpt/manifest.json"
    facts["lost answer"] = _attempt(fault, cut, lambda: _save(path, changed, meta="arrived"), answers=True)
    facts["arrived"] = (_load(path, loaded), _weights(loaded) == _weights(changed))
    _save(path, changed, meta="next")
    facts["next"] = (_load(path, loaded), _names(path))
    return facts


@pytest.fixture(scope="module")
def in_one_job(s3: str, fault: Fault) -> dict[str, list[dict[str, Any]]]:
    """By case what both ranks have seen; the last two change how files are read and written."""
    cases = {
        "faults": partial(_faults, s3, fault),
        "full": partial(_full, s3, fault),
        "requests": partial(_requests, s3),
        "in parts": partial(_in_parts, s3, fault),
    }
    return run_cases(2, cases)


@pytest.fixture(scope="module")
def faults(in_one_job: Any) -> list[dict[str, Any]]:
    return in_one_job["faults"]


@pytest.mark.parametrize("name", CUT)
def test_all_ranks_say_what_could_not_be_uploaded(faults: Any, name: str) -> None:
    messages = [facts[name]["error"] for facts in faults]
    assert faults[0][name]["hits"] > 0
    for message in messages:
        assert message.startswith(
            "OSError: checkpoint s3://checkpoints/faults.ckpt was not saved, and earlier ones are"
        )
        assert CUT[name] in message
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", CUT)
def test_an_upload_that_is_cut_leaves_the_checkpoint_before_it_and_others(faults: Any, name: str) -> None:
    for facts in faults:
        assert facts[name]["loaded"] == ("first", True, "other")


WHOLE = sorted([*(f"*/{name}" for name in FILES), MANIFEST_FILE])


@pytest.mark.parametrize("name", ["a shard of rank 1", "the metadata", "what is not sharded"])
def test_the_files_of_a_save_that_failed_are_removed_at_once(faults: Any, name: str) -> None:
    assert faults[0][name]["left"] == WHOLE


def test_those_of_a_save_whose_manifest_may_have_arrived_are_removed_by_the_next(faults: Any) -> None:
    assert len(faults[0]["the manifest"]["left"]) == len(WHOLE) + len(FILES)
    assert faults[0]["next"] == ("next", WHOLE)


def test_a_manifest_that_has_arrived_counts_though_the_answer_is_lost(faults: Any) -> None:
    for facts in faults:
        error, hits = facts["lost answer"]
        assert hits > 0
        assert error == "no error"
        assert facts["arrived"] == ("arrived", True)


def test_a_store_that_does_not_answer_is_not_taken_for_an_empty_one(faults: Any) -> None:
    for facts in faults:
        error, hits = facts["no answer"]
        assert hits > 0
        assert "faults.ckpt was not saved" in error
        assert facts["after no answer"] == "first"


def _in_parts(url: str, fault: Fault) -> dict[str, Any]:
    s3fs.S3FileSystem.default_block_size = s3fs.S3File.part_min
    path, model, loaded = storage_path(f"{url}/parts.ckpt"), _model(width=1500), _model(seed=2, width=1500)
    _save(path, model, meta="first")
    facts: dict[str, Any] = {
        "attempt": _attempt(fault, r"PUT \S*[?&]partNumber=2\b", lambda: _save(path, loaded, meta="second"))
    }
    facts["pending"] = boto3.client("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    facts["meta"] = _load(path, loaded)
    facts["same"] = _weights(loaded) == _weights(model)
    facts["files"] = _names(path)
    return facts


def test_an_upload_that_is_cut_between_its_parts_leaves_none_of_them(in_one_job: Any) -> None:
    for facts in in_one_job["in parts"]:
        error, hits = facts["attempt"]
        assert hits > 0
        assert "was not saved" in error and ".distcp could not be written" in error
        assert facts["pending"] == []
        assert (facts["meta"], facts["same"]) == ("first", True)
        assert facts["files"] == WHOLE


# -- full files, and what is refused ----------------------------------------------------------------------------------


def _full(url: str, fault: Fault) -> dict[str, Any]:
    path, model, loaded = storage_path(f"{url}/full.ckpt"), _model(), _model(seed=1)
    _save(path, model, meta="shards")

    def save() -> None:
        state = {name: weight.full_tensor() for name, weight in model.state_dict().items()}
        content = {"state_dict": state, "meta": "file"}
        checkpoint.save_full(path, write=lambda file: TorchCheckpointIO().save_checkpoint(content, str(file)))

    facts: dict[str, Any] = {"cut": _attempt(fault, "PUT /checkpoints/full.ckpt ", save), "before": _load(path, loaded)}
    save()
    facts["file"] = (_load(path, loaded), _weights(loaded) == _weights(model), _names(path))
    _save(path, model, meta="shards again")
    facts["shards"] = (_load(path, loaded), _names(path), path.fs.isfile(path.path))
    if dist.get_rank() == 0:
        (path / "notes.txt").write_text("mine")
    dist.barrier()
    facts["foreign"] = _error(save)
    return facts


def test_a_full_file_and_a_sharded_checkpoint_replace_each_other(in_one_job: Any) -> None:
    for facts in in_one_job["full"]:
        assert facts["cut"][1] > 0 and "s3://checkpoints/full.ckpt was not saved" in facts["cut"][0]
        assert facts["before"] == "shards"
        assert facts["file"] == ("file", True, ["*/full.ckpt"])
        assert facts["shards"] == ("shards again", WHOLE, False)
        assert "is a directory that holds other files than a checkpoint's" in facts["foreign"]


def _no_bucket() -> dict[str, str]:
    path = storage_path("s3://nowhere/a.ckpt")
    return {"saved": _error(lambda: _save(path, _model(), meta=None)), "loaded": _error(lambda: _load(path, _model()))}


def test_a_bucket_that_is_not_there_is_an_error_on_all_ranks_and_is_not_made(s3: str, run_shared: Run) -> None:
    for facts in run_shared(2, _no_bucket):
        assert facts["saved"].startswith("FileNotFoundError: ") or "OSError: " in facts["saved"]
        assert "s3://nowhere/a.ckpt was not saved" in facts["saved"]
        assert "does not point to a valid checkpoint" in facts["loaded"]
    assert [bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]] == [BUCKET]
