"""The rest of a boundary: what an uninterrupted run does after a checkpoint is saved, and a resumed one must do, too.

ModelCheckpoint saves in ``on_train_batch_end``. After that come, depending on the batch, a validation and the end of
the epoch with its hooks. Lightning's counts in such a checkpoint say that the batch is not complete, and it resumes
with the next batch. Here they say what a resumed run needs: the batch is complete, and the validation has not begun.
Lightning then resumes with the validation and with the end of the epoch.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

_BATCHES = "epoch_loop.batch_progress"
_VALIDATION = "epoch_loop.val_loop.batch_progress"


def note_what_follows(state: dict[str, Any], trainer: pl.Trainer) -> None:
    """Note in a checkpoint that is saved now which part of the boundary is still to come.

    Args:
        state: Content of the checkpoint, whose ``loops`` are replaced.
        trainer: The Trainer that saves.
    """
    if not _in_batch_end(trainer):
        return
    validation, last = validation_follows(trainer), trainer.fit_loop.epoch_loop._num_ready_batches_reached()
    if not (validation or last):
        return
    loops = deepcopy(state["loops"])
    fit = loops["fit_loop"]
    for of_counts in ("total", "current"):
        fit[_BATCHES][of_counts]["completed"] = fit[_BATCHES][of_counts]["processed"]
    if validation:  # the counts inside of its first batch
        total, current = fit[_VALIDATION]["total"], fit[_VALIDATION]["current"]
        total.update(ready=total["completed"] + 1, started=total["completed"] + 1, processed=total["completed"])
        current.update(ready=0, started=0, processed=0, completed=0)
        fit[_VALIDATION]["is_last_batch"] = False
    state["loops"] = loops


def _in_batch_end(trainer: pl.Trainer) -> bool:
    """Whether hooks of ``on_train_batch_end`` run, at a boundary."""
    fitting = trainer.state.fn == TrainerFn.FITTING and trainer.state.status == TrainerStatus.RUNNING
    if not fitting or not trainer.training:
        return False
    epoch_loop = trainer.fit_loop.epoch_loop
    counts: Any = epoch_loop.batch_progress.total
    done = counts.ready == counts.started == counts.processed == counts.completed + 1
    return done and not epoch_loop._should_accumulate()


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether a validation comes after the batch that is ending."""
    fit = trainer.fit_loop
    return fit._data_fetcher is not None and fit.epoch_loop._should_check_val_fx(fit._data_fetcher)
