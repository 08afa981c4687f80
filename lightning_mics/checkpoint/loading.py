"""Loading checkpoints, sharded or full, on any number of ranks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.optim import Optimizer

from lightning_mics.checkpoint.compare import _check_count, _check_model
from lightning_mics.checkpoint.dcp.load_planner import SafePlanner
from lightning_mics.checkpoint.dcp.reader import SafeReader
from lightning_mics.checkpoint.dcp.unpickling import load_value, plain_errors
from lightning_mics.checkpoint.full_file import FullNames, _load_full
from lightning_mics.checkpoint.keys import _numbered, _source_of_rank_state
from lightning_mics.checkpoint.optimizer_states import load_optimizer, prefixes
from lightning_mics.checkpoint.progress import progress_bar
from lightning_mics.checkpoint.storage.folder import META_FILE, is_sharded
from lightning_mics.checkpoint.storage.manifest import MANIFEST_FILE, Manifest, refuse_damaged
from lightning_mics.checkpoint.storage.path import StoragePath, exists, forget_listings
from lightning_mics.checkpoint.storage.store import checkpoint_place
from lightning_mics.collectives.agreement import on_all_ranks, on_rank_0


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
    on_rank_0(checkpoint_place(path).put_back)  # see [Note: How a checkpoint becomes visible]
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


def _read(reader: SafeReader, state: dict[str, Any], *, weights_only: bool) -> None:
    planner = SafePlanner(weights_only=weights_only)
    with plain_errors(reader.path):
        load_shards(state, storage_reader=reader, planner=planner)
    planner.exchange()


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
