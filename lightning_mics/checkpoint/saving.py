"""Saving a sharded checkpoint: a directory that every rank writes a part of, and that loads on any number of ranks.

``torch.distributed.checkpoint`` stores and reshards tensors. The directory holds the model under the key ``model``,
optimizers under ``optimizer_0``, ``optimizer_1``, ..., states of single ranks under ``rank_0``, ``rank_1``, ..., and
everything else in ``meta.pt``; Lightning's ``consolidate_checkpoint`` reads these keys. Replicas do not write the same
bytes twice: they divide each shard by rows (:mod:`~lightning_mics.checkpoint.dcp.rows`).

The directory's files are listed in its manifest, which is checked before anything is loaded. For their location, and
how they replace an earlier checkpoint, see [Note: How a checkpoint becomes visible].
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

from lightning_mics.checkpoint.content.entries import entries_of_all_ranks
from lightning_mics.checkpoint.content.layout import LAYOUT_KEY, FullNames, Layout
from lightning_mics.checkpoint.dcp.save_planner import HostBuffers, OwnRowsSavePlanner
from lightning_mics.checkpoint.dcp.second_names import TRAINER_MODEL_KEY, second_keys
from lightning_mics.checkpoint.dcp.unpickling import load_value
from lightning_mics.checkpoint.dcp.writer import ShardWriter
from lightning_mics.checkpoint.errors import UnsafeCheckpointError, saving
from lightning_mics.checkpoint.keys import rank_key
from lightning_mics.checkpoint.storage.folder import META_FILE
from lightning_mics.checkpoint.storage.location import checkpoint_location
from lightning_mics.checkpoint.storage.manifest import FileFacts, Manifest
from lightning_mics.checkpoint.storage.path import StoragePath
from lightning_mics.checkpoint.storage.progress import progress_bar
from lightning_mics.collectives.agreement import on_all_ranks, on_rank_0
from lightning_mics.collectives.control_plane import control_plane


def save_sharded(
    path: StoragePath,
    *,
    model_state: dict[str, Any],
    optimizer_states: Sequence[dict[str, Any]],
    meta: dict[str, Any],
    rank_state: Mapping[str, Tensor] | None = None,
    names: FullNames | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint to the directory ``path``, in place of an earlier one; every rank calls it.

    Shards of an earlier checkpoint, perhaps of more ranks, never mix with the new ones: see
    [Note: How a checkpoint becomes visible]. Other files in the directory are preserved.

    Args:
        path: Directory on storage that all ranks share; the same on all ranks.
        model_state: Tensors by FQN; sharded ones are DTensors.
        optimizer_states: States of the optimizers, each from :func:`optimizer_state`.
        meta: Entries that are not sharded; rank 0's are written.
        rank_state: Tensors that belong to this rank alone; every rank's are written.
        names: The user's keys of the model and the optimizers, if they have any.
        group: Process group of all ranks, for their communication; None is the default group.

    Raises:
        OSError: On all ranks, if storage fails on one; an earlier checkpoint at ``path`` is preserved.
        RuntimeError: On all ranks, if anything else fails on one; an earlier checkpoint is preserved.
    """
    write = prepare_sharded(
        path,
        model_state=model_state,
        optimizer_states=optimizer_states,
        meta=meta,
        rank_state=rank_state,
        names=names,
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
    names: FullNames | None = None,
    group: dist.ProcessGroup | None,
    buffers: HostBuffers | None,
    show_progress: bool = False,
) -> Callable[[], None]:
    """Prepare to write a checkpoint, which a thread may do while training continues; every rank calls it.

    Args:
        path: See :func:`save_sharded`.
        model_state: See :func:`save_sharded`.
        optimizer_states: See :func:`save_sharded`.
        meta: See :func:`save_sharded`.
        rank_state: See :func:`save_sharded`.
        names: See :func:`save_sharded`.
        group: See :func:`save_sharded`; while a thread writes, nothing else may use the group.
        buffers: Host memory for copies of the tensors, which may then change; None writes the tensors themselves.
        show_progress: Whether this rank displays a progress bar while it writes.

    Returns:
        A function that writes the checkpoint, called on every rank; it raises the errors of :func:`save_sharded`.

    Raises:
        RuntimeError: On all ranks, if ``meta`` cannot be saved.
        OSError: On all ranks, if the parent folder of ``path`` cannot be made.
    """
    own = {rank_key(dist.get_rank()): rank_state} if rank_state else {}
    layout = Layout(names=names)
    content: list[bytes] = []  # filled on rank 0, which writes it

    def begin() -> None:
        with entries.as_calls():
            content.append(serialized({**meta, LAYOUT_KEY: layout.plain()}))
        if isinstance(path, Path):  # now: a link to the checkpoint may be made there before it exists
            path.parent.mkdir(parents=True, exist_ok=True)

    with saving(path):
        entries = entries_of_all_ranks(meta)
        states = layout.describe(model_state, optimizer_states)
        planner = OwnRowsSavePlanner({**states, **own, **entries.tensors()}, buffers=buffers)
        on_rank_0(begin)
    elsewhere = names or FullNames(model=TRAINER_MODEL_KEY, optimizers=[])
    keys = second_keys("" if elsewhere.models else elsewhere.model, elsewhere.optimizers)
    return partial(
        _write_sharded, path, planner, b"".join(content), keys=keys, group=group, show_progress=show_progress
    )


def _write_sharded(
    path: StoragePath,
    planner: OwnRowsSavePlanner,
    meta: bytes,
    *,
    keys: Mapping[str, str],
    group: dist.ProcessGroup | None,
    show_progress: bool,
) -> None:
    location = checkpoint_location(path)
    with (
        saving(path),
        progress_bar(f"saving {path.name}", total_bytes=planner.own_bytes, enabled=show_progress) as advance,
    ):
        draft: StoragePath = on_rank_0(location.begin, group=group)
        try:
            writer = ShardWriter(draft, advance=advance, second_keys=keys, from_host=planner.has_copies)
            plans = group or control_plane().group
            save_shards({}, storage_writer=writer, planner=planner, process_group=plans)
            written = on_all_ranks(lambda: _with_meta(writer, meta), group=group)
        except BaseException:
            if dist.get_rank() == 0:
                location.abandon(draft)
            raise
        files = {name: facts for of_rank in written for name, facts in of_rank.items()}
        on_rank_0(lambda: location.publish(draft, Manifest.now(files, world_size=len(written))), group=group)


def _with_meta(writer: ShardWriter, meta: bytes) -> dict[str, FileFacts]:
    """Write the unsharded entries on rank 0; returns the facts of all files that this rank has written, by name."""
    if dist.get_rank() == 0:
        writer.write_bytes(meta, name=META_FILE)
    return writer.written


def serialized(meta: dict[str, Any], *, warns: bool = True) -> bytes:
    """The entries that are not sharded, pickled.

    Args:
        meta: The entries.
        warns: Whether to warn now if loading will need ``weights_only=False``.
    """
    stream = io.BytesIO()
    torch.save(meta, stream)
    if not warns:
        return stream.getvalue()
    stream.seek(0)
    try:
        load_value(stream, name=f"this checkpoint's {META_FILE}", weights_only=True)
    except UnsafeCheckpointError as error:
        warnings.warn(str(error), stacklevel=2)
    return stream.getvalue()
