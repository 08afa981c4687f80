"""Exceptions and stops of one rank: the others hear of them at once, and nothing hides them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_debug, rank_zero_warn
from typing_extensions import override

from lightning_mics.collectives.control_plane import ControlPlane, RanksDifferError


class TellOtherRanks(Callback):
    """Tells the other ranks that this one has raised an exception, before callbacks that may save wait for them.

    Args:
        control: Control plane of all ranks.
    """

    def __init__(self, control: ControlPlane) -> None:
        self._control = control

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        rank_zero_debug(f"telling the other ranks of {exception!r}")
        self._control.raised(exception)


def tell_of_exceptions(trainer: pl.Trainer, control: ControlPlane) -> None:
    """Make ``trainer`` tell the other ranks of exceptions, first of all of its callbacks.

    Args:
        trainer: The Trainer that is about to run.
        control: Control plane of all ranks.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    rest = [callback for callback in callbacks if not isinstance(callback, TellOtherRanks)]
    trainer.callbacks = [TellOtherRanks(control), *rest]  # type: ignore[attr-defined]
    # Lightning's own broadcasts over the default group, and waits for the device, in each batch: StopTogether does it
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    epoch_loop._broadcast_sigterm_tensor = partial(control.agree, "begins a batch of training")


@contextmanager
def without_other_ranks(path: Any, control: ControlPlane | None) -> Iterator[None]:
    """Save inside; after an exception of this rank alone the others do not come, and it is the one to be seen.

    Args:
        path: Path of the checkpoint, for the warning.
        control: Control plane of all ranks, if a model is sharded.
    """
    try:
        yield
    except RanksDifferError as error:
        if control is None or not control.has_raised:
            raise
        rank_zero_warn(f"{path} was not saved, as other ranks do not take part: {error}")


def raise_cause(exception: BaseException, control: ControlPlane | None) -> None:
    """Raise what has cut off a collective, if ``exception`` is the effect of another rank's.

    Raises:
        RanksDifferError: If it is.
    """
    cause = exception if control is None else control.explained(exception)
    if cause is not exception:
        raise cause from exception
