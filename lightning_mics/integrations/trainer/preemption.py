"""Leaving in time: a signal to any rank makes all ranks save and stop after the same optimizer step.

Whoever wants a machine back sends SIGTERM, to one rank, to some or to all, and SIGKILL some seconds later. SLURM can
send another signal before the time of a job is up, upon which the job is to be queued again. Lightning's handlers
communicate inside the handler, where the ranks may be at different places: what one rank sends there meets another
collective of the others. Here a handler takes a note and does nothing else. The notes are compared where all ranks pass
in any case, by an all-reduce of one number::

    rank 0    step 7 ------------- compare: nothing    step 8 ------------- compare: SIGTERM   save   exit
    rank 1    step 7 ------------- compare: nothing    step 8 -- SIGTERM -- compare: SIGTERM   save   exit

So every rank hears the same at the same place, whenever the signals come and however many: the result of a collective
does not depend on when a rank looks at it. (A look into the process group's store would be answered differently from
one rank to the next, so ranks would have to agree on a step ahead of all of them, and one store would answer all.) The
places are after each optimizer step, never inside an accumulation window, and after each batch of an evaluation. If a
validation follows a step, the checkpoint says that it is still to be run.

What is saved is the ``last`` of the first ModelCheckpoint that keeps whole checkpoints, for ``ckpt_path="last"``;
before a job is queued again, ``hpc_ckpt_N.ckpt`` in ``default_root_dir``, which Lightning looks for by itself. Then all
ranks raise Lightning's ``SIGTERMException``: callbacks hear of it by ``on_exception``, and the exit status is 0.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override


class Request(IntEnum):
    """What a signal asks for; of two the larger is done."""

    NOTHING = 0
    STOP = 1
    REQUEUE = 2


class SignalNotes(_SignalConnector):
    """Lightning's connector, which registers handlers and restores those before, with handlers that only take notes.

    Attributes:
        request: What signals to this rank have asked for.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer)
        self.request = Request.NOTHING

    @override
    def _sigterm_notifier_fn(self, signum: Any, _: Any) -> None:
        self.request = max(self.request, Request.STOP)

    @override
    def _slurm_sigusr_handler_fn(self, signum: Any, _: Any) -> None:
        self.request = Request.REQUEUE


class StopTogether(Callback):
    """Stops all ranks at the same place once one of them was asked to.

    Args:
        notes: This rank's.
        reduce_max: The largest values of a tensor over all ranks; every rank calls it.
        wait_for_checkpoints: Returns when the files of all checkpoints are complete.
    """

    def __init__(
        self, notes: SignalNotes, *, reduce_max: Callable[[Tensor], Tensor], wait_for_checkpoints: Callable[[], None]
    ) -> None:
        self._notes = notes
        self._reduce_max = reduce_max
        self._wait_for_checkpoints = wait_for_checkpoints
        self._steps = 0
        self._at_boundary = True  # a run may begin with the validation that the one before was about to run
        self._equally_many = False

    # -- the places ----------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps = trainer.global_step

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._at_boundary = trainer.global_step != self._steps
        self._steps = trainer.global_step
        if self._at_boundary and not _validation_follows(trainer):
            self._stop_if_asked(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._at_boundary:
            self._stop_if_asked(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    @override
    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._equally_many and (self._at_boundary or not _training(trainer)):
            self._stop_if_asked(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._at_boundary and _training(trainer):
            self._stop_if_asked(trainer, validated=True)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count(trainer.num_test_batches)

    @override
    def on_test_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._equally_many:
            self._stop_if_asked(trainer)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count(trainer.num_predict_batches)

    @override
    def on_predict_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._equally_many:
            self._stop_if_asked(trainer)

    def _count(self, batches: Sequence[int | float]) -> None:
        """Ranks that evaluate unequally many batches, which is allowed where nothing is gathered, meet at the end."""
        own = float(sum(batches))
        largest, smallest = self._reduce_max(torch.tensor([own, -own])).tolist()
        self._equally_many = largest == -smallest != float("inf")

    # -- what is done --------------------------------------------------------------------------------------------------

    def _stop_if_asked(self, trainer: pl.Trainer, *, validated: bool = False) -> None:
        request = Request(int(self._reduce_max(torch.tensor(self._notes.request))))
        if request == Request.NOTHING:
            return
        if trainer.validating and _training(trainer) and not validated:
            _validate_again(trainer)
        if request == Request.REQUEUE:
            self._requeue(trainer)
        elif _training(trainer):
            self._save_last(trainer)
        self._notes.request = Request.NOTHING
        self._notes.received_sigterm = True  # what `trainer.received_sigterm` tells callbacks
        raise SIGTERMException

    def _save_last(self, trainer: pl.Trainer) -> None:
        keeping = (
            callback
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint) and not callback.save_weights_only
        )
        callback = next(keeping, None)
        if callback is None:
            rank_zero_warn(
                f"Stopped by a signal after step {trainer.global_step} without a checkpoint: no ModelCheckpoint of this"
                " Trainer keeps whole ones; add one to `callbacks`"
            )
            return
        if trainer.validating or not callback.save_last or callback._last_global_step_saved != trainer.global_step:
            _save_last_of(callback, trainer)
        self._wait_for_checkpoints()
        rank_zero_info(f"Stopped by a signal after step {trainer.global_step}: {callback.last_model_path}")

    def _requeue(self, trainer: pl.Trainer) -> None:
        path = trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)
        # not there at once: what Lightning resumes is whatever is called so, and one that is being written is too
        complete = f"{path.rpartition('/')[0]}/requeue.ckpt"
        trainer.save_checkpoint(complete)
        self._wait_for_checkpoints()  # the job may be killed as soon as it is queued again
        if trainer.is_global_zero:
            get_filesystem(path).mv(complete, path, recursive=True)
            _queue_again()
        rank_zero_info(f"Stopped by a signal after step {trainer.global_step}: {path}")


def stop_when_signalled(
    trainer: pl.Trainer, *, reduce_max: Callable[[Tensor], Tensor], wait_for_checkpoints: Callable[[], None]
) -> None:
    """Make ``trainer`` stop on all ranks when one of them gets a signal; for a strategy's ``setup``.

    Lightning registers handlers afterwards, before it runs; a handler of the user's is called as well. In a thread that
    is not the main one there are no signals.
    """
    if not isinstance(trainer._signal_connector, SignalNotes):
        trainer._signal_connector = SignalNotes(trainer)
    stop = StopTogether(trainer._signal_connector, reduce_max=reduce_max, wait_for_checkpoints=wait_for_checkpoints)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    # last, after those that save; a new list, because this one may be the caller's and serve another Trainer too
    trainer.callbacks = [  # type: ignore[attr-defined]
        *(other for other in callbacks if not isinstance(other, StopTogether)),
        stop,
    ]


def _training(trainer: pl.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _validation_follows(trainer: pl.Trainer) -> bool:
    fit = trainer.fit_loop
    assert fit._data_fetcher is not None
    return fit.epoch_loop._should_check_val_fx(fit._data_fetcher)


def _validate_again(trainer: pl.Trainer) -> None:
    """Count as Lightning does in a validation's first batch: the run that goes on from there runs all of it."""
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.total.processed = progress.total.completed
    progress.reset_on_run()


def _save_last_of(callback: ModelCheckpoint, trainer: pl.Trainer) -> None:
    """Save as ``save_last=True`` does, with its names and its retention."""
    wanted, callback.save_last = callback.save_last, True
    try:
        callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
    finally:
        callback.save_last = wanted


def _queue_again() -> None:
    """Ask SLURM to run this job again."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{task}"
    try:
        finished = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        problem = finished.stderr.strip() if finished.returncode else None
    except OSError as error:
        problem = str(error)
    if problem is not None:
        rank_zero_warn(f"SLURM job {job} was saved but not queued again: `scontrol requeue {job}`: {problem}")
