"""Checkpoints: a directory that every rank writes a part of, or one full file; both load on any number of ranks.

``torch.distributed.checkpoint`` stores and reshards; here is what surrounds it. A directory holds the model under the
key ``model``, optimizers under ``optimizer_0``, ``optimizer_1``, ..., and everything else in ``meta.pt``: the keys that
Lightning's ``consolidate_checkpoint`` reads. What is of one rank alone is under ``rank_0``, ``rank_1``, .... Replicas
do not write twice: they share each tensor's rows (``own_rows``). A full file is what Lightning writes on one device,
optimizer states by parameter number.

A directory's files are listed in its manifest, which is checked before anything is loaded. Where they are written, and
how they replace an earlier checkpoint, is for ``checkpoint_folder`` and, in a store, ``checkpoint_store``.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.optim import Optimizer

from lightning_mics.agreement import on_all_ranks, on_rank_0
from lightning_mics.checkpoint_folder import META_FILE, is_sharded
from lightning_mics.checkpoint_store import checkpoint_place
from lightning_mics.manifest import MANIFEST_FILE, FileFacts, Manifest, refuse_damaged
from lightning_mics.optimizer_states import copy_state, dotted, load_optimizer, named, prefixes
from lightning_mics.progress import progress_bar
from lightning_mics.safe_reading import SafePlanner, SafeReader, UnsafeCheckpointError, load_value, plain_errors
from lightning_mics.save_failures import saving
from lightning_mics.save_planner import HostBuffers, OwnRowsSavePlanner
from lightning_mics.shard_files import ShardWriter
from lightning_mics.storage_path import StoragePath, exists, forget_listings

NAMES_KEY = "mics_names"  # in a full file


@dataclass(frozen=True, kw_only=True)
class FullNames:
    """What users call the model and its optimizers in a full file, where the Trainer has names of its own.

    Attributes:
        model: A key of the file.
        optimizers: Likewise, in their order.
    """

    model: str
    optimizers: Sequence[str]

    def plain(self) -> dict[str, Any]:
        """What to add to the file, so that whoever loads it knows."""
        return {NAMES_KEY: {"model": self.model, "optimizers": list(self.optimizers)}}

    @classmethod
    def said_by(cls, content: Mapping[str, Any]) -> FullNames | None:
        """What a file says."""
        return cls(**content[NAMES_KEY]) if NAMES_KEY in content else None


def save_sharded(
    path: StoragePath,
    *,
    model_state: dict[str, Any],
    optimizer_states: Sequence[dict[str, Any]],
    meta: dict[str, Any],
    rank_state: Mapping[str, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint to the directory ``path``, in place of one that is there; every rank calls it.

    The files are written beside ``path`` and moved there when all ranks have finished, so shards of an earlier
    checkpoint, perhaps of more ranks, never mix with the new ones. Files that are not a checkpoint's stay.

    Args:
        path: The same on all ranks, on storage that all ranks share.
        model_state: Tensors by parameter name; DTensors for what is sharded.
        optimizer_states: One per optimizer, from :func:`optimizer_state`.
        meta: What is not sharded; rank 0's is written.
        rank_state: What is of this rank alone; every rank's is written.
        group: All ranks, for what they tell each other; None is the default group.

    Raises:
        OSError: On all ranks, if storage fails on one; what was at ``path`` before is still there.
        RuntimeError: Likewise if anything else fails.
    """
    write = prepare_sharded(
        path,
        model_state=model_state,
        optimizer_states=optimizer_states,
        meta=meta,
        rank_state=rank_state,
        group=group,
        buffers=None,
    )
    write()


def prepare_sharded(
    path: StoragePath,
    *,
    model_state: dict[str, Any],
    optimizer_states: Sequence[dict[str, Any]],
    meta: dict[str, Any],
    rank_state: Mapping[str, Tensor] | None,
    group: dist.ProcessGroup | None,
    buffers: HostBuffers | None,
    show_progress: bool = False,
) -> Callable[[], None]:
    """What :func:`save_sharded` does, in two parts, of which the second may run beside training.

    Args:
        path: As there.
        model_state: As there.
        optimizer_states: As there.
        meta: As there.
        rank_state: As there.
        group: As there; while the second part runs beside training, nothing else may use it.
        buffers: Where to copy the states to; None copies nothing.
        show_progress: Whether this rank shows a progress bar where writing takes long.

    Returns:
        Writes the checkpoint; every rank calls it. Raises as there.

    Raises:
        RuntimeError: On all ranks, if ``meta`` cannot be saved.
        OSError: On all ranks, if the folder that ``path`` is in cannot be made.
    """
    own = {_of_rank(dist.get_rank()): rank_state} if rank_state else {}
    states = {"model": model_state, **_numbered(optimizer_states), **own}
    planner = OwnRowsSavePlanner(states, buffers=buffers)
    content: list[bytes] = []  # on rank 0, which has something to write

    def begin() -> None:
        content.append(_serialized(meta))
        if isinstance(path, Path):  # at once: a link to the checkpoint may be made there before it is
            path.parent.mkdir(parents=True, exist_ok=True)

    with saving(path):
        on_rank_0(begin)
    return partial(_write_sharded, path, planner, b"".join(content), group=group, show_progress=show_progress)


def _write_sharded(
    path: StoragePath,
    planner: OwnRowsSavePlanner,
    meta: bytes,
    *,
    group: dist.ProcessGroup | None,
    show_progress: bool,
) -> None:
    place = checkpoint_place(path)
    with (
        saving(path),
        progress_bar(f"saving {path.name}", total_bytes=planner.own_bytes, shown=show_progress) as advance,
    ):
        draft: StoragePath = on_rank_0(place.begin, group=group)
        try:
            writer = ShardWriter(draft, advance=advance)
            save_shards({}, storage_writer=writer, planner=planner, process_group=group)
            written = on_all_ranks(lambda: _with_meta(writer, meta), group=group)
        except BaseException:
            if dist.get_rank() == 0:
                place.abandon(draft)
            raise
        files = {name: facts for of_rank in written for name, facts in of_rank.items()}
        on_rank_0(lambda: place.publish(draft, Manifest.now(files, world_size=len(written))), group=group)


def save_full(path: StoragePath, *, write: Callable[[Any], None]) -> None:
    """Let rank 0 write a checkpoint to the one file ``path``, in place of one that is there; every rank calls it.

    Args:
        path: Where to.
        write: Writes the file; called on rank 0.

    Raises:
        OSError: If storage fails.
        IsADirectoryError: If ``path`` is a directory with anything else in it than a sharded checkpoint.
    """
    with saving(path):
        on_rank_0(lambda: checkpoint_place(path).replace_by_file(write))


def gather_rank_states(rank_state: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
    """What each rank has of its own, for a full file: all of it on rank 0, nothing on the others; all call it."""
    states: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(rank_state, states)
    return {_of_rank(rank): state for rank, state in enumerate(states or [])}


def load(
    path: StoragePath,
    *,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    strict: bool,
    weights_only: bool,
    rank_state: dict[str, Tensor] | None = None,
    names: FullNames | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint into a sharded model and its optimizers, in place; every rank calls it.

    Args:
        path: A directory of :func:`save_sharded`, of any number of ranks and any partition size, or one full file.
        model: The sharded model.
        optimizers: In the order of saving; those that the checkpoint holds are loaded.
        strict: Whether the checkpoint's parameters must be those of the model.
        weights_only: Whether what is no tensor may be plain data only. Off, it may run code as it loads.
        rank_state: Is filled with what this rank has saved; with rank 0's if there were more or fewer ranks. What the
            checkpoint lacks keeps its value.
        names: What a full file calls the model and the optimizers, unless it says so itself or has the Trainer's names.
        show_progress: Whether this rank shows progress bars where loading takes long.

    Returns:
        What is neither model nor optimizer.

    Raises:
        ValueError: If ``path`` is no checkpoint.
        DamagedCheckpointError: If files of a directory are missing, cut short or altered.
        UnsafeCheckpointError: If loading would run code of the checkpoint that ``weights_only`` does not allow.
        RuntimeError: If ``strict`` and the parameters differ, or the optimizers are not those of the checkpoint.
    """
    on_rank_0(checkpoint_place(path).put_back)
    forget_listings(path)
    into: dict[str, Any] = {"model": model, "optimizers": optimizers, "rank_state": rank_state or {}}
    if is_sharded(path):
        reader = SafeReader(_check_whole(path, show_progress=show_progress), show_progress=show_progress)
        return _load_sharded(reader, **into, strict=strict, weights_only=weights_only)
    if path.is_file():
        return _load_full(path, **into, names=names, strict=strict, weights_only=weights_only)
    raise ValueError(
        f"{str(path)!r} does not point to a valid checkpoint: neither a file nor a directory with {META_FILE} in it"
    )


def load_raw(path: StoragePath, model: nn.Module, *, strict: bool, weights_only: bool) -> None:
    """Load a file with a plain ``state_dict``, or a checkpoint's, into a module, sharded or not; every rank calls it.

    Args:
        path: The file.
        model: Gets the weights, in place.
        strict: Whether the names must be those of the module.
        weights_only: As of :func:`load`.

    Raises:
        ValueError: If ``path`` is no file, or holds no dictionary.
        RuntimeError: If ``strict`` and the names differ, or a shape does.
    """
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is neither a file with a state_dict nor a sharded checkpoint")
    content = load_value(path, name=str(path), weights_only=weights_only, mapped=True)
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds {type(content).__name__}, no state_dict")
    state = content.get("state_dict", content)
    _check_model(get_model_state_dict(model), state, strict=strict)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=strict))


# -- loading ----------------------------------------------------------------------------------------------------------


def _load_sharded(
    reader: SafeReader,
    *,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    rank_state: dict[str, Tensor],
    strict: bool,
    weights_only: bool,
) -> dict[str, Any]:
    file = reader.path / META_FILE
    meta: dict[str, Any] = load_value(file, name=str(file), weights_only=weights_only)
    stored = reader.read_metadata().state_dict_metadata
    model_state = get_model_state_dict(model)
    _check_model(
        model_state,
        {name.removeprefix("model."): entry for name, entry in stored.items() if name.startswith("model.")},
        strict=strict,
    )
    saved = {name.split(".")[0] for name in stored if name.startswith("optimizer_")}
    _check_count(optimizers, len(saved))
    names, read = prefixes(stored), partial(_read, reader, weights_only=weights_only)
    for key, optimizer in _numbered(optimizers if saved else []).items():
        load_optimizer(model, optimizer, key, stored=names, read=read)
    read({"model": model_state, **({_source_of_rank_state(names): rank_state} if rank_state else {})})
    set_model_state_dict(model, model_state)
    return meta


def _load_full(
    path: StoragePath,
    *,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    rank_state: dict[str, Tensor],
    names: FullNames | None,
    strict: bool,
    weights_only: bool,
) -> dict[str, Any]:
    content: Any = load_value(path, name=str(path), weights_only=weights_only, mapped=True)
    if isinstance(content, dict):
        content = _with_trainers_names(content, names)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{str(path)!r} does not point to a valid checkpoint: the file holds no 'state_dict'")
    model_state = content.pop("state_dict")
    _check_model(get_model_state_dict(model), model_state, strict=strict)
    states = content.pop("optimizer_states", [])
    _check_count(optimizers, len(states))
    for (key, optimizer), state in zip(_numbered(optimizers).items(), states, strict=False):
        whole = {key: named(model, optimizer, state)}
        load_optimizer(model, optimizer, key, stored=prefixes(dotted(whole)), read=partial(copy_state, whole))
    set_model_state_dict(model, model_state, options=StateDictOptions(full_state_dict=True, strict=strict))
    copy_state(content.get(_source_of_rank_state(content.keys()), {}), rank_state)
    return content


def _with_trainers_names(content: dict[str, Any], names: FullNames | None) -> dict[str, Any]:
    names = FullNames.said_by(content) or names
    if "state_dict" in content or names is None or names.model not in content:
        return content
    rest = {key: value for key, value in content.items() if key not in (names.model, *names.optimizers, NAMES_KEY)}
    states = [content[name] for name in names.optimizers if name in content]
    return {**rest, "state_dict": content[names.model], "optimizer_states": states}


def _read(reader: SafeReader, state: dict[str, Any], *, weights_only: bool) -> None:
    planner = SafePlanner(weights_only=weights_only)
    with plain_errors(reader.path):
        load_shards(state, storage_reader=reader, planner=planner)
    planner.exchange()


def _numbered(entries: Sequence[Any]) -> dict[str, Any]:
    return {f"optimizer_{index}": entry for index, entry in enumerate(entries)}


def _of_rank(rank: int) -> str:
    return f"rank_{rank}"


def _source_of_rank_state(names: Set[str]) -> str:
    """Which rank's state this one gets from a checkpoint with these names."""
    as_many = _of_rank(dist.get_world_size() - 1) in names and _of_rank(dist.get_world_size()) not in names
    return _of_rank(dist.get_rank() if as_many else 0)


# -- what a directory is made of ---------------------------------------------------------------------------------------


def _with_meta(writer: ShardWriter, meta: bytes) -> dict[str, FileFacts]:
    """What this rank has written, by name; rank 0 adds what is not sharded."""
    if dist.get_rank() == 0:
        writer.write_bytes(meta, name=META_FILE)
    return writer.written


def _serialized(meta: dict[str, Any]) -> bytes:
    """``meta`` as its file has it; whoever saves should hear at once if loading will ask for trust."""
    stream = io.BytesIO()
    torch.save(meta, stream)
    stream.seek(0)
    try:
        load_value(stream, name=f"this checkpoint's {META_FILE}", weights_only=True)
    except UnsafeCheckpointError as error:
        warnings.warn(str(error), stacklevel=2)
    return stream.getvalue()


def _check_whole(path: StoragePath, *, show_progress: bool) -> StoragePath:
    """Where the files are. Each is checked once, spread over all ranks; every rank raises what one has found."""
    manifest = on_rank_0(lambda: Manifest.read(path) if exists(path / MANIFEST_FILE) else None)
    if manifest is None:
        if dist.get_rank() == 0:
            warnings.warn(f"{path} has no {MANIFEST_FILE}: nobody can say whether it is whole", stacklevel=2)
        return path
    names = sorted(manifest.files)
    own = [name for number, name in enumerate(names) if _checking_rank(name, number) == dist.get_rank()]
    own_bytes = sum(manifest.files[name].size_bytes for name in own)
    with progress_bar(f"checking {path.name}", total_bytes=own_bytes, shown=show_progress) as advance:
        problems = sorted(chain(*on_all_ranks(lambda: manifest.problems(path, own, advance=advance))))
    refuse_damaged(path, problems)
    return manifest.content(path)


def _checking_rank(name: str, number: int) -> int:
    """The rank that reads a file for its checksum: if it can be, the one that will load most of it."""
    writer = re.match(r"__(\d+)_", name)
    return (int(writer[1]) if writer else number) % dist.get_world_size()


# -- refusals ---------------------------------------------------------------------------------------------------------


def _check_model(model_state: Mapping[str, Any], stored: Mapping[str, Any], *, strict: bool) -> None:
    shared = [name for name in model_state.keys() & stored.keys() if not name.endswith("_extra_state")]
    other = [name for name in shared if _shape(model_state[name]) != _shape(stored[name])]
    if other:
        name = min(other)
        raise RuntimeError(
            f"{len(other)} tensors have another shape in the checkpoint than in the model, for instance {name!r} with "
            f"{_shape(stored[name])} there and {_shape(model_state[name])} here"
        )
    missing = sorted(model_state.keys() - prefixes(stored))  # a dict in the state is stored entry by entry
    unexpected = sorted(name for name in stored if not prefixes([name]) & model_state.keys())
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"the checkpoint and the model differ: {len(missing)} names are missing in the checkpoint {missing[:3]}, "
            f"{len(unexpected)} are unknown to the model {unexpected[:3]}; load with strict=False to allow it "
            "(in Lightning: `self.strict_loading = False`)"
        )


def _shape(entry: Any) -> list[int] | None:
    if isinstance(entry, TensorStorageMetadata):
        return list(entry.size)
    return list(entry.shape) if isinstance(entry, Tensor) else None


def _check_count(optimizers: Sequence[Optimizer], saved: int) -> None:
    if saved and optimizers and saved != len(optimizers):
        raise RuntimeError(f"the checkpoint holds the states of {saved} optimizers, the model has {len(optimizers)}")
