"""Exceptions and stops of one rank: the others hear of them at once, and nothing hides them.

How they hear of them: [Note: Agreement without waiting].
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerStatus
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_mics.collectives.control_plane import ControlPlane, RanksDifferError


def tell_of_exception(trainer: pl.Trainer, control: ControlPlane | None) -> None:
    """Tell the other ranks if an exception ends the run of ``trainer``, before anything waits for them.

    Args:
        trainer: The Trainer that runs.
        control: Control plane of all ranks, if a model is sharded.
    """
    exception = sys.exc_info()[1]  # Lightning saves, tears down and so on where it handles it
    if exception is not None and control is not None and trainer.state.status == TrainerStatus.INTERRUPTED:
        control.raised(exception)


def agree_on_batches(trainer: pl.Trainer, control: ControlPlane) -> None:
    """Make ranks agree on each batch of training, in place of Lightning's broadcast that waits for the device.

    That broadcast tells of SIGTERM, which ``StopTogether`` does.

    Args:
        trainer: The Trainer that is about to run.
        control: Control plane of all ranks.
    """
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    epoch_loop._broadcast_sigterm_tensor = partial(control.agree, "begins a batch of training")


class WithoutOtherRanks(AbstractContextManager[None]):
    """Ends what saves after an exception of this rank alone, in which the others take no part: the exception matters.

    Args:
        control: Control plane of all ranks, if a model is sharded.
        lost: What is lost, for the warning; None gives none.
    """

    def __init__(self, control: ControlPlane | None, *, lost: str | None = None) -> None:
        self._control = control
        self._lost = lost

    @override
    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        alone = isinstance(error, RanksDifferError) and self._control is not None and self._control.has_raised
        if alone and self._lost is not None:
            rank_zero_warn(f"{self._lost}, as other ranks do not take part: {error}")
        return alone


def raise_cause(exception: BaseException, control: ControlPlane | None) -> None:
    """Raise what has cut off a collective, if ``exception`` is the effect of another rank's.

    Args:
        exception: What has ended the run on this rank.
        control: Control plane of all ranks, if a model is sharded.

    Raises:
        RanksDifferError: If it is.
    """
    cause = exception if control is None else control.explained(exception)
    if cause is not exception:
        raise cause from exception
