"""Callbacks of Lightning that cannot work on a sharded model, found before a fit starts."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

REJECTED: dict[type[Callback], str] = {
    StochasticWeightAveraging: "copies the unsharded model, which no rank holds with strategy 'mics'; remove it",
    WeightAveraging: "copies the unsharded model, which no rank holds with strategy 'mics'; remove it",
    ModelPruning: (
        "puts a mask and a new parameter in the place of each parameter, which strategy 'mics' has replaced by a "
        "shard; prune the model before training with torch.nn.utils.prune, or set weights to zero in "
        "`on_train_batch_end`, as in `parameter.mul_(parameter.abs() > threshold)`"
    ),
}


def check_callbacks(trainer: pl.Trainer) -> None:
    """Check the callbacks of a fit; evaluations run with any.

    Raises:
        MisconfigurationException: If one cannot work on a sharded model.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        for kind, reason in REJECTED.items():
            if isinstance(callback, kind):
                raise MisconfigurationException(f"{type(callback).__name__} {reason}")
