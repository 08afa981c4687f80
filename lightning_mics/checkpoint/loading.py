"""Loading checkpoints, sharded or full, on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim import Optimizer

from lightning_mics.checkpoint.compare import check_model, check_optimizer_count
from lightning_mics.checkpoint.full_file import FullNames, load_full
from lightning_mics.checkpoint.keys import MODEL_KEY, optimizer_entries, rank_key_to_load
from lightning_mics.checkpoint.opening import OpenCheckpoint, open_on_all_ranks
from lightning_mics.checkpoint.optimizer_states import load_optimizer, prefixes
from lightning_mics.checkpoint.storage.folder import META_FILE, is_sharded
from lightning_mics.checkpoint.storage.location import checkpoint_location
from lightning_mics.checkpoint.storage.path import StoragePath, forget_listings
from lightning_mics.collectives.agreement import on_rank_0


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
        path: Directory of :func:`save_sharded`, of any number of ranks and any partition size, or a full file.
        model: The sharded model.
        optimizers: The model's optimizers, in the order of saving; those in the checkpoint are loaded.
        strict: Whether the checkpoint's parameters must be those of the model.
        weights_only: Whether entries other than tensors must be plain data. Otherwise loading may run code.
        rank_state: Tensors to fill with those that this rank has saved, or rank 0's if the number of ranks has changed.
            Tensors that the checkpoint lacks keep their values.
        names: Keys of the model and the optimizers in a full file that neither states them nor has the Trainer's.
        show_progress: Whether this rank displays progress bars for long operations.

    Returns:
        The entries that are neither the model's nor an optimizer's.

    Raises:
        ValueError: If ``path`` is not a checkpoint.
        DamagedCheckpointError: If files of a directory are missing, cut short or altered.
        UnsafeCheckpointError: If loading would run code of the checkpoint that ``weights_only`` does not allow.
        RuntimeError: If ``strict`` and the parameters differ, or the optimizers are not those of the checkpoint.
    """
    on_rank_0(checkpoint_location(path).recover)  # see [Note: How a checkpoint becomes visible]
    forget_listings(path)
    into: dict[str, Any] = {"model": model, "optimizers": optimizers, "rank_state": rank_state or {}}
    if is_sharded(path):
        checkpoint = open_on_all_ranks(path, show_progress=show_progress)
        checkpoint.check_on_all_ranks()
        return _load_sharded(checkpoint, **into, strict=strict, weights_only=weights_only)
    if path.is_file():
        return load_full(path, **into, names=names, strict=strict, weights_only=weights_only)
    raise ValueError(
        f"{str(path)!r} does not point to a valid checkpoint: neither a file nor a directory with {META_FILE} in it"
    )


def _load_sharded(
    checkpoint: OpenCheckpoint,
    *,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    rank_state: dict[str, Tensor],
    strict: bool,
    weights_only: bool,
) -> dict[str, Any]:
    meta = checkpoint.meta(weights_only=weights_only)
    stored = checkpoint.reader.read_metadata().state_dict_metadata
    model_state = get_model_state_dict(model)
    of_model = f"{MODEL_KEY}."
    check_model(
        model_state,
        {name.removeprefix(of_model): entry for name, entry in stored.items() if name.startswith(of_model)},
        strict=strict,
    )
    saved = {name.split(".")[0] for name in stored if name.startswith("optimizer_")}
    check_optimizer_count(optimizers, len(saved))
    names, read = prefixes(stored), partial(checkpoint.read_into, weights_only=weights_only)
    for key, optimizer in optimizer_entries(optimizers if saved else []).items():
        load_optimizer(model, optimizer, key, stored=names, read=read)
    read({MODEL_KEY: model_state, **({rank_key_to_load(names): rank_state} if rank_state else {})})
    set_model_state_dict(model, model_state)
    return meta
