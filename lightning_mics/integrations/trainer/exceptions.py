"""Exceptions and stops of one rank: the others hear of them at once, and nothing hides them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerStatus
from lightning_utilities.core.rank_zero import rank_zero_warn

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


@contextmanager
def without_other_ranks(control: ControlPlane | None, *, lost: str | None = None) -> Iterator[None]:
    """Save inside; after an exception of this rank alone the others do not come, and it is the one to be seen.

    Args:
        control: Control plane of all ranks, if a model is sharded.
        lost: What is lost, for the warning; None gives none.
    """
    try:
        yield
    except RanksDifferError as error:
        if control is None or not control.has_raised:
            raise
        if lost is not None:
            rank_zero_warn(f"{lost}, as other ranks do not take part: {error}")


def raise_cause(exception: BaseException, control: ControlPlane | None) -> None:
    """Raise what has cut off a collective, if ``exception`` is the effect of another rank's.

    Raises:
        RanksDifferError: If it is.
    """
    cause = exception if control is None else control.explained(exception)
    if cause is not exception:
        raise cause from exception
