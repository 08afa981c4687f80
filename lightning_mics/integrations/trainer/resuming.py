"""Resuming exactly where a checkpoint was saved, also on another number of ranks: what Lightning does not restore.

Lightning counts an epoch in micro-steps of one rank. On another number of ranks the same position has another count,
and the epoch another length; only optimizer steps are the same. Lightning also saves no states of random number
generators, and starts the epoch after a checkpoint with other calls than an uninterrupted run.

A run resumes at the start of training: by then Lightning has created the data's iterators, for which torch draws random
numbers, and has not taken a batch.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_mics.checkpoint import random_states
from lightning_mics.sampler import ResumableSampler

KEY = "mics"  # of the geometry in a checkpoint


@dataclass(frozen=True, kw_only=True)
class EpochGeometry:
    """How a run divides an epoch into micro-steps.

    Attributes:
        world_size: Number of ranks.
        batch_size: Samples per rank and micro-step; None if the loader has no such attribute.
        micro_steps: Micro-steps per optimizer step, as the Trainer counts them.
        batches_per_epoch: Micro-steps per epoch; infinite if the data have no length.
    """

    world_size: int
    batch_size: int | None
    micro_steps: int
    batches_per_epoch: float

    @classmethod
    def of(cls, trainer: pl.Trainer) -> EpochGeometry:
        """The geometry of a Trainer that has set up its data."""
        return cls(
            world_size=trainer.world_size,
            batch_size=getattr(trainer.train_dataloader, "batch_size", None),
            micro_steps=trainer.accumulate_grad_batches,
            batches_per_epoch=trainer.num_training_batches,
        )

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps per epoch; the last may have fewer micro-steps."""
        infinite = math.isinf(self.batches_per_epoch)
        return self.batches_per_epoch if infinite else math.ceil(self.batches_per_epoch / self.micro_steps)


@dataclass(frozen=True, kw_only=True)
class ResumeState:
    """The part of a checkpoint that a run needs to resume exactly, besides model, optimizers and loops.

    Attributes:
        geometry: Epoch geometry of the saved run.
        random_state: States of this rank's random number generators by name, each [values]; rank 0's on another number
            of ranks.
    """

    geometry: EpochGeometry
    random_state: dict[str, Tensor]

    @classmethod
    def now(cls, trainer: pl.Trainer) -> ResumeState:
        """The state for a checkpoint that is saved now."""
        return cls(geometry=EpochGeometry.of(trainer), random_state=random_states.capture())

    def plain(self) -> dict[str, Any]:
        """The geometry as a dict of numbers, for the checkpoint."""
        return asdict(self.geometry)


def resume(trainer: pl.Trainer, saved: ResumeState) -> None:
    """Move a Trainer to the position of the saved run, after it has loaded its loops and created the data's iterators.

    Args:
        trainer: The Trainer that starts training.
        saved: State of the saved run.

    Raises:
        ValueError: If the position is not a boundary of this run.
        RuntimeError: If it was not a boundary of the saved run, and the number of ranks or the batch size differs.
    """
    now, loop = EpochGeometry.of(trainer), trainer.fit_loop
    _note_saved_step(trainer)
    if saved.geometry.world_size == now.world_size:
        random_states.restore(saved.random_state)
    else:
        random_states.branch(saved.random_state, rank=trainer.global_rank, world_size=now.world_size)
    if loop.restarted_mid_epoch or _goes_on_in_epoch(loop):
        _resume_in_epoch(trainer, now=now, saved=saved.geometry)
    else:
        _warn_of_cut_epoch(loop)
        _begin_next_epoch(loop, now=now, saved=saved.geometry)


def position_in_epoch(micro_steps: int, *, now: EpochGeometry, saved: EpochGeometry) -> int:
    """Convert a position in the epoch from the saved run's micro-steps to this run's.

    Args:
        micro_steps: Micro-steps of the saved run since the start of the epoch.
        now: Epoch geometry of this run.
        saved: Epoch geometry of the saved run.

    Raises:
        ValueError: If the position is not a boundary of this run.
        RuntimeError: If it was not a boundary of the saved run.
    """
    samples_now, samples_saved = _samples(now, saved)
    open_micro_steps = micro_steps % saved.micro_steps
    if open_micro_steps:
        raise RuntimeError(
            f"the checkpoint was saved on {saved.world_size} ranks after {open_micro_steps} of the "
            f"{saved.micro_steps} micro-steps of an optimizer step, whose gradients it does not hold: on "
            f"{now.world_size} ranks there is no such position; use a checkpoint that was saved at a boundary, as "
            "ModelCheckpoint(every_n_train_steps=...) does"
        )
    position, rest = divmod(micro_steps * samples_saved, samples_now)
    if rest or position % now.micro_steps:
        raise ValueError(
            f"the checkpoint was saved after {micro_steps} micro-steps of {saved.world_size} ranks, which is not a "
            f"whole number of optimizer steps here, with {now.world_size} ranks and accumulate_grad_batches="
            f"{now.micro_steps}; {_remedy(now, saved)}"
        )
    return position


def _note_saved_step(trainer: pl.Trainer) -> None:
    """Tell callbacks that save by optimizer steps that the step of now is saved.

    Lightning does not restore that. They would save it once more after each batch until the next step is done: without
    the gradients of the open window, and with buffers that are made equal in its middle.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback._every_n_train_steps >= 1:
            callback._last_global_step_saved = trainer.global_step


# -- position in the epoch ---------------------------------------------------------------------------------------------


def _resume_in_epoch(trainer: pl.Trainer, *, now: EpochGeometry, saved: EpochGeometry) -> None:
    loop = trainer.fit_loop
    progress: Any = loop.epoch_loop.batch_progress
    done, last = progress.current.processed, progress.is_last_batch
    if _differ(now, saved):
        position = int(now.batches_per_epoch) if last else position_in_epoch(done, now=now, saved=saved)
        earlier = _convert_epochs(progress.total.processed - done, now=now, saved=saved)
        _set_processed(progress.total, earlier + position)
        _set_processed(progress.current, position)
        _warn_of_data(trainer, now=now, saved=saved)
    elif done % saved.micro_steps and not last:
        warnings.warn(
            f"the checkpoint was saved after {done % saved.micro_steps} of {saved.micro_steps} micro-steps of an "
            "optimizer step; their gradients are not in it, and the step continues without them",
            stacklevel=2,
        )
    if last and loop.epoch_loop.restarted_on_train_batch_end:  # nothing is left of the epoch
        loop.reset_restart_stage()  # otherwise Lightning begins the next epoch without counting it
        _renew_iterator(loop)
    elif last:
        _leave_restart_after_reset(loop.epoch_loop)


def _leave_restart_after_reset(epoch_loop: Any) -> None:
    """Let an epoch of which only the end is left begin as a restarted one, and the next one as any other.

    Lightning ends a restart with a batch or a validation, and would take a batch of another epoch if neither comes.
    """
    on_run_start = epoch_loop.on_run_start

    def on_run_start_once(data_fetcher: Any) -> None:
        on_run_start(data_fetcher)
        del vars(epoch_loop)["on_run_start"]
        epoch_loop.restarting = epoch_loop._should_check_val_fx(data_fetcher)

    vars(epoch_loop)["on_run_start"] = on_run_start_once


def _goes_on_in_epoch(loop: Any) -> bool:
    """Whether Lightning goes on in an epoch that ``max_steps``, ``should_stop`` or a time limit has cut: the checkpoint
    was saved at its end, and batches are left.
    """
    return bool(loop.restarted_on_epoch_end and loop.restarting and not loop.epoch_loop.batch_progress.is_last_batch)


def _warn_of_cut_epoch(loop: Any) -> None:
    """Warn if batches of the saved run's epoch are left out: it was cut, and the checkpoint was saved after the fit.

    Lightning has counted the epoch as complete by then, and no longer has the position of its loaders.
    """
    batches = loop.epoch_loop.batch_progress
    if batches.current.processed and not batches.is_last_batch:
        warnings.warn(
            f"the checkpoint was saved after a fit that ended after {batches.current.processed} batches of an epoch, "
            "where loaders have lost their position: training resumes with the next epoch, and the other batches of "
            "this one are left out; a checkpoint that is saved inside the fit, as by ModelCheckpoint, has the position",
            stacklevel=2,
        )


def _begin_next_epoch(loop: Any, *, now: EpochGeometry, saved: EpochGeometry) -> None:
    """Count the epoch and renew the iterators, as Lightning does in an uninterrupted run."""
    for tracker in (loop.epoch_progress.total, loop.epoch_progress.current):
        tracker.ready = tracker.started = tracker.completed = tracker.processed
    if _differ(now, saved):
        total = loop.epoch_loop.batch_progress.total
        _set_processed(total, _convert_epochs(total.processed, now=now, saved=saved))
    loop.reset_restart_stage()
    loop.epoch_loop.restarting = False
    loop._resuming_from_checkpoint = False  # otherwise Lightning 2.6 reuses the iterators of another epoch


def _renew_iterator(loop: Any) -> None:
    for loader in loop._combined_loader.flattened:
        set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(loop.epoch_progress.current.processed)
    iter(loop._data_fetcher)


def _set_processed(tracker: Any, micro_steps: int) -> None:
    """Shift all counts of a tracker alike; Lightning reads from their differences at which hook it was saved."""
    shift = micro_steps - tracker.processed
    for name in ("ready", "started", "processed", "completed"):
        setattr(tracker, name, getattr(tracker, name) + shift)


def _convert_epochs(micro_steps: int, *, now: EpochGeometry, saved: EpochGeometry) -> int:
    """Convert the micro-steps of complete epochs from the saved run's to this run's."""
    if math.isinf(saved.batches_per_epoch) or math.isinf(now.batches_per_epoch):
        samples_now, samples_saved = _samples(now, saved)
        return micro_steps * samples_saved // samples_now
    return int(micro_steps * now.batches_per_epoch // saved.batches_per_epoch)


# -- other numbers of ranks and batch sizes ----------------------------------------------------------------------------


def _differ(now: EpochGeometry, saved: EpochGeometry) -> bool:
    samples_now, samples_saved = _samples(now, saved)
    return samples_now != samples_saved


def _samples(now: EpochGeometry, saved: EpochGeometry) -> tuple[int, int]:
    """Samples per micro-step on all ranks, now and in the saved run; per batch if a batch size is unknown."""
    if now.batch_size is None or saved.batch_size is None:
        return now.world_size, saved.world_size
    return now.world_size * now.batch_size, saved.world_size * saved.batch_size


def _remedy(now: EpochGeometry, saved: EpochGeometry) -> str:
    samples_now, samples_saved = _samples(now, saved)
    micro_steps, rest = divmod(samples_saved * saved.micro_steps, samples_now)
    if rest:
        return f"use a batch size and a number of ranks whose product divides {samples_saved * saved.micro_steps}"
    return f"accumulate_grad_batches={micro_steps} makes an optimizer step as large as it was"


def _warn_of_data(trainer: pl.Trainer, *, now: EpochGeometry, saved: EpochGeometry) -> None:
    loader = trainer.train_dataloader
    if not isinstance(getattr(loader, "sampler", None), ResumableSampler):
        warnings.warn(
            f"the epoch resumes with {now.world_size} ranks after {saved.world_size}, and only a ResumableSampler is "
            f"known to count the samples of all ranks: {type(loader).__name__} may repeat or skip some",
            stacklevel=2,
        )
    if now.steps_per_epoch != saved.steps_per_epoch:
        warnings.warn(
            f"an epoch had {saved.steps_per_epoch} optimizer steps on {saved.world_size} ranks and has "
            f"{now.steps_per_epoch} on {now.world_size}; {_remedy(now, saved)}, and ResumableSampler leaves out what "
            "does not fill a step",
            stacklevel=2,
        )
