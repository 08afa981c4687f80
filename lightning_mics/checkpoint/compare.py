"""Checks that a checkpoint's model and optimizers are those of the job."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from lightning_mics.checkpoint.content.trained_only import HOW_TO_GIVE, left_out
from lightning_mics.checkpoint.errors import CheckpointMismatchError
from lightning_mics.checkpoint.optimizer_states import prefixes


def check_model(model_state: Mapping[str, Any], stored: Mapping[str, Any], *, strict: bool) -> None:
    """Check that a model can take the tensors of a checkpoint.

    Args:
        model_state: Tensors of the model by FQN, sharded or not.
        stored: Tensors of the checkpoint, or their metadata, by FQN.
        strict: Whether both must have the same names.

    Raises:
        CheckpointMismatchError: If a shape differs, or if names differ and ``strict``.
    """
    shared = [name for name in model_state.keys() & stored.keys() if not name.endswith("_extra_state")]
    other = [name for name in shared if _shape(model_state[name]) != _shape(stored[name])]
    if other:
        name = min(other)
        raise CheckpointMismatchError(
            f"{len(other)} tensors have another shape in the checkpoint than in the model, for instance {name!r} with "
            f"{_shape(stored[name])} in the checkpoint and {_shape(model_state[name])} in the model"
        )
    missing = sorted(model_state.keys() - prefixes(stored))  # a dict in the state is stored entry by entry
    unexpected = sorted(name for name in stored if not prefixes([name]) & model_state.keys())
    if strict and (missing or unexpected):
        raise CheckpointMismatchError(
            f"the checkpoint and the model differ: {len(missing)} names are missing in the checkpoint {missing[:3]}, "
            f"{len(unexpected)} are unknown to the model {unexpected[:3]}; load with strict=False to allow it "
            "(in Lightning: `self.strict_loading = False`)"
        )


def check_optimizer_count(optimizers: Sequence[Optimizer], saved: int) -> None:
    """Check that a model has as many optimizers as its checkpoint, unless one of them has none.

    Args:
        optimizers: The model's optimizers.
        saved: Number of optimizers whose states are in the checkpoint.

    Raises:
        CheckpointMismatchError: If the numbers differ.
    """
    if saved and optimizers and saved != len(optimizers):
        raise CheckpointMismatchError(
            f"the checkpoint holds the states of {saved} optimizers, the model has {len(optimizers)}"
        )


def check_base(entries: Mapping[str, Any], unset: Collection[str], *, path: Any) -> None:
    """Check that the model has the weights that a checkpoint leaves out.

    Args:
        entries: Entries of the checkpoint.
        unset: FQNs of frozen parameters to which nothing has given weights.
        path: Path or name of the checkpoint, for the error.

    Raises:
        CheckpointMismatchError: If it has not.
    """
    if unset and left_out(entries):
        raise CheckpointMismatchError(
            f"{path} holds only what trains: it was saved with save_frozen=False, without {left_out(entries)}. This "
            f"model has no weights for {len(unset)} frozen parameters, which were on the meta device, for instance "
            f"{min(unset)!r}: {HOW_TO_GIVE}"
        )


def _shape(entry: Any) -> list[int] | None:
    if isinstance(entry, TensorStorageMetadata):
        return list(entry.size)
    return list(entry.shape) if isinstance(entry, Tensor) else None
