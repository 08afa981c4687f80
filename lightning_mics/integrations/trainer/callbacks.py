"""Callbacks of Lightning that copy the model: averages of weights, which are sharded here, and those that cannot work.

``WeightAveraging``, ``EMAWeightAveraging`` and ``StochasticWeightAveraging`` copy the module in their ``setup``, before
it is sharded. Everything else that they do is elementwise, and right on shards. So their copy is an empty module, and
gets its place taken by a sharded copy as soon as the module is sharded::

    Trainer                        callback                                 here
    strategy.setup_environment                                              announce_averages: copies are stand-ins
    callback.setup                 AveragedModel(module), an empty one
    strategy.setup, or loading                                              shard_averages: a sharded copy of the module
    after each optimizer step      average += ... on this rank's shards
    validation                     exchanges the shards of both
    saving                         the average as `state_dict`, the weights as `current_model_state`
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

REJECTED: dict[type[Callback], str] = {
    ModelPruning: (
        "puts a mask and a new parameter in the place of each parameter, which strategy 'mics' has replaced by a "
        "shard; prune the model before training with torch.nn.utils.prune, or set weights to zero in "
        "`on_train_batch_end`, as in `parameter.mul_(parameter.abs() > threshold)`"
    ),
}

AVERAGING = (WeightAveraging, StochasticWeightAveraging)


def check_callbacks(trainer: pl.Trainer) -> None:
    """Check the callbacks of a fit; evaluations run with any.

    Raises:
        MisconfigurationException: If one cannot work on a sharded model.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return
    for callback in _callbacks(trainer):
        for kind, reason in REJECTED.items():
            if isinstance(callback, kind):
                raise MisconfigurationException(f"{type(callback).__name__} {reason}")


def announce_averages(trainer: pl.Trainer) -> None:
    """Let callbacks that average weights copy an empty module in their ``setup``, which comes next.

    Args:
        trainer: The Trainer that is about to run.
    """
    module = trainer.lightning_module
    if not _averaging(trainer):
        return
    warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model that overrides")

    def copied(memo: dict[int, Any]) -> Any:
        if _called_by_callback():
            return nn.Module()
        del vars(module)["__deepcopy__"]
        try:
            return copy.deepcopy(module, memo)
        finally:
            vars(module)["__deepcopy__"] = copied

    vars(module)["__deepcopy__"] = copied
    if is_overridden("configure_model", module):
        configure = module.configure_model

        @wraps(configure)
        def configure_model() -> None:
            if not _called_by_callback():  # nothing whole is needed for a copy that is empty
                configure()

        vars(module)["configure_model"] = configure_model


def shard_averages(trainer: pl.Trainer, *, prepare: Callable[[], None]) -> None:
    """Give callbacks that average weights sharded copies of the sharded module; does not communicate.

    Args:
        trainer: The Trainer, whose module is sharded.
        prepare: Called before weights are exchanged, or an average changes between optimizer steps: shows the shards of
            the root, which is unsharded after a forward of a validation, and waits for copies that are being made.

    Raises:
        MisconfigurationException: If an average needs statistics of the data that no rank has for the whole model.
    """
    module = trainer.lightning_module
    if "__deepcopy__" not in vars(module):
        return
    del vars(module)["__deepcopy__"]
    vars(module).pop("configure_model", None)
    if trainer.state.fn == TrainerFn.FITTING:
        for callback in _averaging(trainer):
            _shard_average(callback, module)
    trainer.callbacks = [_Prepared(prepare), *_callbacks(trainer)]  # type: ignore[attr-defined]


def _shard_average(callback: WeightAveraging | StochasticWeightAveraging, module: pl.LightningModule) -> None:
    if isinstance(callback, WeightAveraging):
        if callback._average_model is None:  # a `setup` of the user's own
            return
        average = copy.deepcopy(module)
        if callback._device is not None:
            average = average.to(callback._device)
        callback._average_model.module = average
    else:
        if StochasticWeightAveraging.pl_module_contains_batch_norm(module):
            raise MisconfigurationException(
                f"{type(callback).__name__} runs another epoch for the statistics of BatchNorm, in which no optimizer "
                "steps, and strategy 'mics' has no such epoch; use WeightAveraging(use_buffers=True), which averages "
                "the statistics too, or a norm without them"
            )
        callback._average_model = copy.deepcopy(module)
    if any(parameter.dtype == torch.bfloat16 for parameter in module.parameters()):
        rank_zero_warn(
            f"{type(callback).__name__} averages weights in bfloat16, with 8 bits of precision: an average with a "
            "decay above 1 - 2**-8 = 0.996 never changes; train with precision='bf16-mixed', whose weights are in "
            "float32"
        )


def forget_averages(trainer: pl.Trainer) -> None:
    """Leave ``trainer`` with the callbacks that it was given, at the end of a run.

    Args:
        trainer: The Trainer.
    """
    if any(isinstance(callback, _Prepared) for callback in _callbacks(trainer)):
        others = [callback for callback in _callbacks(trainer) if not isinstance(callback, _Prepared)]
        trainer.callbacks = others  # type: ignore[attr-defined]


def number_of_averages(trainer: pl.Trainer) -> int:
    """Number of averages of the weights that callbacks keep.

    Args:
        trainer: The Trainer.
    """
    return len(_averaging(trainer))


def is_averaged(trainer: pl.Trainer) -> bool:
    """Whether a callback averages weights.

    Args:
        trainer: The Trainer.
    """
    return bool(_averaging(trainer))


class _Prepared(Callback):
    """The first callback of a run: prepares for what those that average do between two steps of an optimizer."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._prepare = prepare

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._prepare()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._prepare()

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._prepare()

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._prepare()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._prepare()


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _averaging(trainer: pl.Trainer) -> list[WeightAveraging | StochasticWeightAveraging]:
    return [callback for callback in _callbacks(trainer) if isinstance(callback, AVERAGING)]


def _called_by_callback() -> bool:
    """Whether the ``setup`` of an averaging callback of Lightning is running."""
    setups = [kind.setup.__code__ for kind in AVERAGING]
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in setups:
        frame = frame.f_back
    return frame is not None
