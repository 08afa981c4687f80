"""Folders that other programs have written: recognized, described as one checkpoint, or rejected by name.

::

    .metadata, *.distcp                          torch.distributed.checkpoint (DCP)
    .metadata, *.distcp, meta.pt                 Lightning's ModelParallelStrategy and FSDPStrategy
    pytorch_model_fsdp_0/, optimizer_0/, ...     Accelerate's SHARDED_STATE_DICT: each a folder of DCP
    pytorch_model_fsdp.bin, optimizer.bin, ...   Accelerate's FULL_STATE_DICT
    model.safetensors, optimizer.bin, ...        Accelerate without sharding
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from lightning_mics.checkpoint.content.layout import FullNames
from lightning_mics.checkpoint.content.opened import OpenedCheckpoint
from lightning_mics.checkpoint.dcp.unpickling import load_value, read_metadata
from lightning_mics.checkpoint.foreign.files import model_names
from lightning_mics.checkpoint.foreign.translation import Translated, own_entries, translated
from lightning_mics.checkpoint.keys import MODEL_KEY
from lightning_mics.checkpoint.storage.folder import DCP_FILE, is_sharded
from lightning_mics.checkpoint.storage.path import StoragePath, exists, size_and_etag

MODEL_FOLDER = "pytorch_model_fsdp"  # Accelerate's name, with the number of the model
MODEL_FILES = ("pytorch_model_fsdp.bin", "model.safetensors", "pytorch_model.bin")
OPTIMIZER_FILE = "optimizer.bin"


def holds_shards(path: StoragePath) -> bool:
    """Whether ``path`` is a directory with a sharded checkpoint, of this package or another program."""
    return is_sharded(path) or exists(path / DCP_FILE) or exists(path / f"{MODEL_FOLDER}_0" / DCP_FILE)


def described(folder: StoragePath, *, own: bool, wanted: FullNames | None) -> Translated:
    """Read the metadata of the shards in a folder, and give the entries this package's names.

    Args:
        folder: Folder of the shards, or of Accelerate's folders.
        own: Whether this package has written it.
        wanted: Keys of the model and the optimizers in the state to load into, if it has any.

    Raises:
        ValueError: If it cannot be recognized which entries are the model's, or they are compressed.
        UnsafeCheckpointError: If reading would run code.
        DamagedCheckpointError: If metadata cannot be read.
    """
    if own:
        return Translated(metadata=own_entries(read_metadata(folder / DCP_FILE)))
    if not exists(folder / DCP_FILE) and exists(folder / f"{MODEL_FOLDER}_0" / DCP_FILE):
        return _described_parts(folder)
    metadata = read_metadata(folder / DCP_FILE)
    _check_plain(folder, metadata)
    try:
        return translated(metadata, wanted=wanted)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from None


def problems_of_sizes(folder: StoragePath, metadata: Metadata) -> list[str]:
    """A few words for each file that is missing or shorter than its metadata say, of a checkpoint without a manifest.

    Args:
        folder: Folder of the shards.
        metadata: Metadata of :func:`described`.
    """
    ends: dict[str, int] = {}
    for place in (metadata.storage_data or {}).values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    problems = []
    for name, end in sorted(ends.items()):
        try:
            size, _ = size_and_etag(folder / name)
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        else:
            problems += [f"{name} has {size} of {end} bytes"] if size < end else []
    return problems


def open_files(folder: StoragePath, *, weights_only: bool) -> OpenedCheckpoint | None:
    """Open a folder in which Accelerate has saved the unsharded model and its optimizers; None if it is none.

    Args:
        folder: Folder of ``Accelerator.save_state``.
        weights_only: Whether plain data and tensors only are unpickled.
    """
    file = next((folder / name for name in MODEL_FILES if exists(folder / name)), None)
    if file is None or not (file.name == MODEL_FILES[0] or exists(folder / OPTIMIZER_FILE)):
        return None
    optimizers: list[dict[str, Any]] = []
    while exists(folder / _numbered(OPTIMIZER_FILE, len(optimizers))):
        each = folder / _numbered(OPTIMIZER_FILE, len(optimizers))
        optimizers.append(load_value(each, name=str(each), weights_only=weights_only, mapped=True))
    model = _model_in(file, weights_only=weights_only)
    return OpenedCheckpoint(model=model_names(model), optimizers=optimizers, entries={})


def why_not(path: StoragePath) -> str:
    """Say what a directory is that cannot be loaded, and what to do."""
    names = sorted(child.name for child in path.iterdir()) if path.is_dir() else []
    text = " ".join(names)
    if "latest" in names or re.search(r"\b(zero_pp_rank|mp_rank|bf16_zero|global_step)", text):
        return (
            "it is a checkpoint of DeepSpeed, which stores parts of flattened parameters; turn it into a file with "
            "`python zero_to_fp32.py . weights.bin` in that directory, and load the file with fabric.load_raw"
        )
    if re.search(rf"\b{MODEL_FOLDER}(_\d+)?_rank\d+\.bin", text):
        return (
            "each rank has saved its own part in a file that only the same ranks can load; load it where it was saved, "
            "and save it there with SHARDED_STATE_DICT and use_dcp=True"
        )
    if re.search(r"__\d+\.metadata", text):
        return "each rank has metadata of its own; save it with use_collectives=True"
    if ".distcp" in text:
        return f"it has shards and no {DCP_FILE}, so saving it was not completed; use an earlier checkpoint"
    if ".safetensors" in text:
        return "it holds weights of transformers; load them with lightning_mics.load_pretrained(network, folder)"
    return f"neither a file nor a directory with meta.pt, {DCP_FILE} or {MODEL_FOLDER}_0 in it"


def _described_parts(folder: StoragePath) -> Translated:
    parts = {MODEL_KEY: f"{MODEL_FOLDER}_0"}
    if exists(folder / f"{MODEL_FOLDER}_1"):
        raise ValueError(f"{folder} holds several models; load each from its own folder, such as {MODEL_FOLDER}_0")
    while exists(folder / f"optimizer_{len(parts) - 1}" / DCP_FILE):
        parts[f"optimizer_{len(parts) - 1}"] = f"optimizer_{len(parts) - 1}"
    joined = Metadata(state_dict_metadata={}, planner_data={}, storage_data={})
    groups = {}
    for key, name in parts.items():
        metadata = read_metadata(folder / name / DCP_FILE)
        _check_plain(folder / name, metadata)
        of_part = translated(
            metadata, wanted=None, first=int(key.removeprefix("optimizer_")) if key != MODEL_KEY else 0
        )
        joined.state_dict_metadata.update(of_part.metadata.state_dict_metadata)
        joined.planner_data.update(of_part.metadata.planner_data)
        joined.storage_data.update(
            {
                index: replace(place, relative_path=f"{name}/{place.relative_path}")
                for index, place in of_part.metadata.storage_data.items()
            }
        )
        groups.update(of_part.groups)
    return Translated(metadata=joined, groups=groups)


def _check_plain(folder: StoragePath, metadata: Metadata) -> None:
    if any(getattr(place, "transform_descriptors", None) for place in (metadata.storage_data or {}).values()):
        raise ValueError(f"the shards in {folder} are compressed; save them without extensions of the FileSystemWriter")


def _model_in(file: StoragePath, *, weights_only: bool) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file  # imported here: nothing else needs the package

        return load_file(str(file))
    model: dict[str, Any] = load_value(file, name=str(file), weights_only=weights_only, mapped=True)
    return model


def _numbered(name: str, number: int) -> str:
    stem, dot, suffix = name.partition(".")
    return name if number == 0 else f"{stem}_{number}{dot}{suffix}"
