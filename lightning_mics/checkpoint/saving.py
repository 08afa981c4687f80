"""Checkpoints: a directory that every rank writes a part of, or one full file; both load on any number of ranks.

``torch.distributed.checkpoint`` stores and reshards; here is what surrounds it. A directory holds the model under the
key ``model``, optimizers under ``optimizer_0``, ``optimizer_1``, ..., and everything else in ``meta.pt``: the keys that
Lightning's ``consolidate_checkpoint`` reads. What is of one rank alone is under ``rank_0``, ``rank_1``, .... Replicas
do not write twice: they share each tensor's rows (``own_rows``). A full file is what Lightning writes on one device,
optimizer states by parameter number.

A directory's files are listed in its manifest, which is checked before anything is loaded. For where they are written,
and how they replace an earlier checkpoint, see [Note: How a checkpoint becomes visible].
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from lightning_mics.checkpoint.dcp.save_planner import HostBuffers, OwnRowsSavePlanner
from lightning_mics.checkpoint.dcp.unpickling import load_value
from lightning_mics.checkpoint.dcp.writer import ShardWriter
from lightning_mics.checkpoint.errors import UnsafeCheckpointError, saving
from lightning_mics.checkpoint.keys import _numbered, _of_rank
from lightning_mics.checkpoint.progress import progress_bar
from lightning_mics.checkpoint.storage.folder import META_FILE
from lightning_mics.checkpoint.storage.manifest import FileFacts, Manifest
from lightning_mics.checkpoint.storage.path import StoragePath
from lightning_mics.checkpoint.storage.store import checkpoint_place
from lightning_mics.collectives.agreement import on_all_ranks, on_rank_0


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

    Shards of an earlier checkpoint, perhaps of more ranks, never mix with the new ones: see
    [Note: How a checkpoint becomes visible]. Files that are not a checkpoint's stay.

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
