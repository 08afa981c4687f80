"""Coordinated preemption: after a signal to any rank, all ranks save and stop after the same optimizer step.

A cluster preempts a job by SIGTERM to one rank, some or all, followed by SIGKILL some seconds later. SLURM can send
another signal before the job's time limit, which asks for the job to be requeued. Lightning's handlers communicate
inside the handler, where ranks may be at different points: a collective that one rank calls there can meet a different
collective of the others. Here a handler only records the request. Ranks compare their requests at points that all of
them reach in the same order, by an all-reduce of one number::

    rank 0    step 7 ------------- read: -  begin     step 8 ---- read: SIGTERM   save   exit
    rank 1    step 7 -- SIGTERM -- read: -  begin     step 8 ---- read: SIGTERM   save   exit

A comparison that begins after a step is read after the next one. By then all ranks have long begun it, so a step waits
neither for a device nor for the slowest rank: see [Note: Agreement without waiting]. And every rank
receives the same request at the same point, at any time and number of signals. (The process group's store would not do:
ranks that read it at different times get different answers. They would have to agree on a later step, and one server
would answer all of them.) The points are after each optimizer step, never inside an accumulation window, and after some
batches of an evaluation: about one second apart, but no more than :data:`MOST_BATCHES`, and read after the next batch.
At the end of a loop requests are compared and read at once. If a validation follows a step, the checkpoint records that
it is still to be run.

The file is the ``last`` checkpoint of the first ModelCheckpoint that saves more than weights, for ``ckpt_path="last"``;
before requeuing it is ``hpc_ckpt_N.ckpt`` in ``default_root_dir``, which Lightning finds by itself. Then all ranks
raise Lightning's ``SIGTERMException``: callbacks receive it in ``on_exception``, and the exit status is 0.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, Protocol

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

from lightning_mics.in_memory.saver import NOTHING
from lightning_mics.integrations.trainer.boundary import validation_follows

MOST_BATCHES = 16  # of an evaluation from one comparison to the next
APART = 1000  # milliseconds between two comparisons in an evaluation, as long as a batch is shorter

_SAVED = 2  # place of the step that a rank has saved in what is compared, negative: all ranks have the least one

BeginMax = Callable[[Tensor, str], Callable[[], Tensor]]


class Request(IntEnum):
    """Requests made by signals; the larger of two requests wins."""

    NOTHING = 0
    STOP = 1
    REQUEUE = 2


class SignalRecorder(_SignalConnector):
    """Lightning's connector, which registers and restores handlers, with handlers that only record the request.

    Attributes:
        request: Largest request of the signals to this rank.
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


class SavesBeside(Protocol):
    """Saves steps beside the training, and needs to know which step all ranks have saved."""

    def is_due(self) -> bool:
        """Whether the optimizer step that has just ended is to be saved."""

    def saved_step(self) -> int:
        """The newest step that this rank has saved completely; -1 if there is none."""

    def save(self, read_saved: Callable[[], int]) -> None:
        """Save the step; ``read_saved`` waits for the newest one that all ranks have saved."""

    def confirm(self) -> None:
        """Called now and then, while nothing that was saved changes."""


class StopTogether(Callback):
    """Stops all ranks at the same point after one of them has received a signal.

    Args:
        recorder: Recorder of this rank's signals.
        begin_max: Begins the elementwise maximum of a tensor over all ranks, described in words, and returns a function
            that waits for it and returns it; every rank calls both.
        wait_for_checkpoints: Returns when the files of all checkpoints are complete.
        beside: What saves steps beside the training, by the same comparisons; None if nothing does.
    """

    def __init__(
        self,
        recorder: SignalRecorder,
        *,
        begin_max: BeginMax,
        wait_for_checkpoints: Callable[[], None],
        beside: SavesBeside | None = None,
    ) -> None:
        self._recorder = recorder
        self._begin_max = begin_max
        self._wait_for_checkpoints = wait_for_checkpoints
        self._beside = beside
        self._begun: Callable[[], Tensor] | None = None  # the comparison in flight
        self._last_batch = 0.0  # time at which it ended, seconds
        self._batches = 0  # of an evaluation since a comparison began
        self._batches_apart = 1
        self._steps = 0
        self._at_boundary = True  # a resumed run may begin with the validation that follows a step
        self._equally_many = False

    # -- where ranks compare requests ----------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps = trainer.global_step

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._at_boundary = trainer.global_step != self._steps
        self._steps = trainer.global_step
        due = self._at_boundary and self._beside is not None and self._beside.is_due()
        if due or (self._at_boundary and not validation_follows(trainer)):
            self._stop_if_asked(trainer, self._read())
            begun = self._begin(saved_step=self._beside.saved_step() if due and self._beside is not None else NOTHING)
            if due and self._beside is not None:
                self._beside.save(lambda: -int(begun()[_SAVED]))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._at_boundary:
            self._compare_at_end(trainer)
        self._read()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    @override
    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._beside is not None:
            self._beside.confirm()
        if self._at_boundary or not _training(trainer):
            self._after_batch(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._at_boundary or not _training(trainer):
            self._compare_at_end(trainer)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count(trainer.num_test_batches)

    @override
    def on_test_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._after_batch(trainer)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._compare_at_end(trainer)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count(trainer.num_predict_batches)

    @override
    def on_predict_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._after_batch(trainer)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._compare_at_end(trainer)

    def _count(self, batches: Sequence[int | float]) -> None:
        """Check whether all ranks evaluate the same number of batches; if not, they compare requests at the end only.

        The numbers may differ where evaluation does not communicate.
        """
        own = float(sum(batches))
        largest, smallest = self._begin_max(torch.tensor([own, -own]), "counts batches of an evaluation")().tolist()
        self._equally_many = largest == -smallest != float("inf")
        self._batches, self._batches_apart, self._last_batch = 0, 1, time.monotonic()

    def _after_batch(self, trainer: pl.Trainer) -> None:
        """Begin or read a comparison after some batches of an evaluation, the same ones on all ranks."""
        if not self._equally_many:
            return
        milliseconds, self._last_batch = 1000 * (time.monotonic() - self._last_batch), time.monotonic()
        self._batches += 1
        if self._begun is not None:
            self._stop_if_asked(trainer, self._read())
        elif self._batches >= self._batches_apart:
            self._batches = 0
            self._begin(batch_milliseconds=int(milliseconds))

    def _compare_at_end(self, trainer: pl.Trainer) -> None:
        """Compare requests at the end of a loop, where ranks meet anyway."""
        self._stop_if_asked(trainer, self._read(), at_end=True)
        self._begin()
        self._stop_if_asked(trainer, self._read(), at_end=True)

    # -- comparing requests --------------------------------------------------------------------------------------------

    def _begin(self, *, batch_milliseconds: int = 0, saved_step: int = NOTHING) -> Callable[[], Tensor]:
        note = [self._recorder.request, batch_milliseconds]
        if self._beside is not None:
            note.append(-saved_step)
        self._begun = self._begin_max(torch.tensor(note), "compares signals")
        return self._begun

    def _read(self) -> Request:
        """The largest request of all ranks when the last comparison began; nothing if it was read."""
        if self._begun is None:
            return Request.NOTHING
        request, batch_milliseconds, *_ = self._begun().tolist()
        self._begun = None
        self._batches_apart = max(1, min(MOST_BATCHES, APART // max(1, batch_milliseconds)))
        return Request(request)

    # -- saving and stopping -------------------------------------------------------------------------------------------

    def _stop_if_asked(self, trainer: pl.Trainer, request: Request, *, at_end: bool = False) -> None:
        if request == Request.NOTHING:
            return
        if trainer.validating and _training(trainer) and not at_end:
            _validate_again(trainer)
        if request == Request.REQUEUE:
            self._requeue(trainer)
        elif _training(trainer):
            self._save_last(trainer)
        self._recorder.request = Request.NOTHING
        self._recorder.received_sigterm = True  # callbacks read it as `trainer.received_sigterm`
        raise SIGTERMException

    def _save_last(self, trainer: pl.Trainer) -> None:
        candidates = (
            callback
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint) and not callback.save_weights_only
        )
        callback = next(candidates, None)
        if callback is None:
            rank_zero_warn(
                f"Stopped by a signal after step {trainer.global_step} without a checkpoint: no ModelCheckpoint of this"
                " Trainer saves complete ones; add one to `callbacks`, with save_weights_only=False"
            )
            return
        if trainer.validating or not callback.save_last or callback._last_global_step_saved != trainer.global_step:
            _save_last_of(callback, trainer)
        self._wait_for_checkpoints()
        rank_zero_info(f"Stopped by a signal after step {trainer.global_step}: {callback.last_model_path}")

    def _requeue(self, trainer: pl.Trainer) -> None:
        path = trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)
        # moved there when complete: Lightning would resume from an incomplete checkpoint of that name
        complete = f"{path.rpartition('/')[0]}/requeue.ckpt"
        trainer.save_checkpoint(complete)
        self._wait_for_checkpoints()  # the job may be killed as soon as it is queued again
        if trainer.is_global_zero:
            get_filesystem(path).mv(complete, path, recursive=True)
            _requeue_with_slurm()
        rank_zero_info(f"Stopped by a signal after step {trainer.global_step}: {path}")


def stop_when_signaled(
    trainer: pl.Trainer,
    *,
    begin_max: BeginMax,
    wait_for_checkpoints: Callable[[], None],
    beside: SavesBeside | None = None,
) -> None:
    """Make ``trainer`` stop on all ranks when one of them receives a signal; for a strategy's ``setup``.

    Lightning registers its handlers later, before it runs; handlers of the user are called as well. Python delivers
    signals to the main thread only.

    Args:
        trainer: The Trainer that is about to run.
        begin_max: See :class:`StopTogether`.
        wait_for_checkpoints: Returns when the files of all checkpoints are complete.
        beside: See :class:`StopTogether`.
    """
    if not isinstance(trainer._signal_connector, SignalRecorder):
        trainer._signal_connector = SignalRecorder(trainer)
    stop = StopTogether(
        trainer._signal_connector, begin_max=begin_max, wait_for_checkpoints=wait_for_checkpoints, beside=beside
    )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    # last, after callbacks that save; a new list, because the caller may pass the same one to another Trainer
    trainer.callbacks = [  # type: ignore[attr-defined]
        *(other for other in callbacks if not isinstance(other, StopTogether)),
        stop,
    ]


def forget_signals(trainer: pl.Trainer) -> None:
    """Leave ``trainer`` with the callbacks that it was given, at the end of a run.

    Args:
        trainer: The Trainer that has run.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, StopTogether) for callback in callbacks):
        trainer.callbacks = [c for c in callbacks if not isinstance(c, StopTogether)]  # type: ignore[attr-defined]


def _training(trainer: pl.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _validate_again(trainer: pl.Trainer) -> None:
    """Set the counts of a validation's first batch, so that a resumed run runs all of the validation."""
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


def _requeue_with_slurm() -> None:
    """Ask SLURM to run this job again."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{task}"
    try:
        finished = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        problem = finished.stderr.strip() if finished.returncode else None
    except OSError as error:
        problem = str(error)
    if problem is not None:
        rank_zero_warn(f"SLURM job {job} was saved but not requeued: `scontrol requeue {job}`: {problem}")
