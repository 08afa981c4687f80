"""Going on from a checkpoint exactly where it was saved, also on another number of ranks: what Lightning leaves open.

Lightning counts an epoch in micro-steps of one rank. On other ranks the same place is another count, and the same epoch
has another number of them; optimizer steps are the same on both. It also saves no random numbers' states, and begins
the epoch after a checkpoint with other calls than a run that was never interrupted.

The moment is the start of training: Lightning has made the iterators of the data by then, for which torch draws random
numbers, and has not taken a batch.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_mics.checkpoint import random_states
from lightning_mics.sampler import ResumableSampler

KEY = "mics"  # in a checkpoint


@dataclass(frozen=True, kw_only=True)
class EpochGeometry:
    """How a run walks through an epoch.

    Attributes:
        world_size: Ranks.
        batch_size: Samples of a rank in a micro-step; None if its loader does not say.
        micro_steps: Per optimizer step, as the Trainer counts them.
        batches_per_epoch: Micro-steps in an epoch; infinite if the data do not say.
    """

    world_size: int
    batch_size: int | None
    micro_steps: int
    batches_per_epoch: float

    @classmethod
    def of(cls, trainer: pl.Trainer) -> EpochGeometry:
        """That of a Trainer which has its data."""
        return cls(
            world_size=trainer.world_size,
            batch_size=getattr(trainer.train_dataloader, "batch_size", None),
            micro_steps=trainer.accumulate_grad_batches,
            batches_per_epoch=trainer.num_training_batches,
        )

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in an epoch, of which the last may be a shorter one."""
        infinite = math.isinf(self.batches_per_epoch)
        return self.batches_per_epoch if infinite else math.ceil(self.batches_per_epoch / self.micro_steps)


@dataclass(frozen=True, kw_only=True)
class ResumeState:
    """What a checkpoint says of the run that it was taken from.

    Attributes:
        pace: Of that run.
        random_state: Of this rank; of rank 0 if there were more or fewer ranks.
    """

    pace: EpochGeometry
    random_state: dict[str, Tensor]

    @classmethod
    def now(cls, trainer: pl.Trainer) -> ResumeState:
        """For a checkpoint that is taken now."""
        return cls(pace=EpochGeometry.of(trainer), random_state=random_states.capture())

    def plain(self) -> dict[str, Any]:
        """The pace as plain data."""
        return asdict(self.pace)


def go_on(trainer: pl.Trainer, saved: ResumeState) -> None:
    """Put a Trainer that has loaded its loops, and made its data's iterators, where the saved run was.

    Raises:
        ValueError: If that is no boundary here.
        RuntimeError: If it was none there, and the ranks or batches are others.
    """
    now, loop = EpochGeometry.of(trainer), trainer.fit_loop
    if saved.pace.world_size == now.world_size:
        random_states.restore(saved.random_state)
    else:
        random_states.branch(saved.random_state, rank=trainer.global_rank, world_size=now.world_size)
    if loop.restarted_mid_epoch:
        _go_on_in_epoch(trainer, now=now, saved=saved.pace)
    else:
        _begin_next_epoch(loop, now=now, saved=saved.pace)


def place_in_epoch(micro_steps: int, *, now: EpochGeometry, saved: EpochGeometry) -> int:
    """After how many micro-steps of now an epoch is where it was after so many of the saved run.

    Raises:
        ValueError: If that is no boundary here.
        RuntimeError: If it was none there.
    """
    here, there = _samples(now, saved)
    open_micro_steps = micro_steps % saved.micro_steps
    if open_micro_steps:
        raise RuntimeError(
            f"the checkpoint was saved on {saved.world_size} ranks after {open_micro_steps} of the "
            f"{saved.micro_steps} micro-steps of an optimizer step, whose gradients it does not hold: on "
            f"{now.world_size} ranks there is no such place; take a checkpoint from a boundary, where "
            "ModelCheckpoint(every_n_train_steps=...) saves"
        )
    place, rest = divmod(micro_steps * there, here)
    if rest or place % now.micro_steps:
        raise ValueError(
            f"the checkpoint was saved after {micro_steps} micro-steps of {saved.world_size} ranks, which is no whole "
            f"number of optimizer steps here, with {now.world_size} ranks and accumulate_grad_batches="
            f"{now.micro_steps}; {_remedy(now, saved)}"
        )
    return place


# -- where in the epoch ------------------------------------------------------------------------------------------------


def _go_on_in_epoch(trainer: pl.Trainer, *, now: EpochGeometry, saved: EpochGeometry) -> None:
    loop = trainer.fit_loop
    progress: Any = loop.epoch_loop.batch_progress
    done, last = progress.current.processed, progress.is_last_batch
    if _differ(now, saved):
        place = int(now.batches_per_epoch) if last else place_in_epoch(done, now=now, saved=saved)
        earlier = _whole_epochs(progress.total.processed - done, now=now, saved=saved)
        _set_processed(progress.total, earlier + place)
        _set_processed(progress.current, place)
        _warn_of_data(trainer, now=now, saved=saved)
    elif done % saved.micro_steps and not last:
        warnings.warn(
            f"the checkpoint was saved after {done % saved.micro_steps} of {saved.micro_steps} micro-steps of an "
            "optimizer step; their gradients are not in it, and the step goes on without them",
            stacklevel=2,
        )
    if last and loop.epoch_loop.restarted_on_train_batch_end:  # nothing is left of the epoch
        loop.reset_restart_stage()  # else Lightning begins the next one without counting it
        _renew_iterator(loop)


def _begin_next_epoch(loop: Any, *, now: EpochGeometry, saved: EpochGeometry) -> None:
    """As Lightning does in a run that was not interrupted, which counts an epoch and makes the iterators anew."""
    for tracker in (loop.epoch_progress.total, loop.epoch_progress.current):
        tracker.ready = tracker.started = tracker.completed = tracker.processed
    if _differ(now, saved):
        total = loop.epoch_loop.batch_progress.total
        _set_processed(total, _whole_epochs(total.processed, now=now, saved=saved))
    loop.reset_restart_stage()
    loop.epoch_loop.restarting = False
    loop._resuming_from_checkpoint = False  # Lightning 2.6 would keep the iterators, of another epoch with workers


def _renew_iterator(loop: Any) -> None:
    for loader in loop._combined_loader.flattened:
        set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(loop.epoch_progress.current.processed)
    iter(loop._data_fetcher)


def _set_processed(tracker: Any, micro_steps: int) -> None:
    """Move all counts of a tracker; their differences tell Lightning at which hook the checkpoint was saved."""
    shift = micro_steps - tracker.processed
    for name in ("ready", "started", "processed", "completed"):
        setattr(tracker, name, getattr(tracker, name) + shift)


def _whole_epochs(micro_steps: int, *, now: EpochGeometry, saved: EpochGeometry) -> int:
    """So many micro-steps, which make whole epochs, in those of now."""
    if math.isinf(saved.batches_per_epoch) or math.isinf(now.batches_per_epoch):
        here, there = _samples(now, saved)
        return micro_steps * there // here
    return int(micro_steps * now.batches_per_epoch // saved.batches_per_epoch)


# -- other ranks, other batches ----------------------------------------------------------------------------------------


def _differ(now: EpochGeometry, saved: EpochGeometry) -> bool:
    here, there = _samples(now, saved)
    return here != there


def _samples(now: EpochGeometry, saved: EpochGeometry) -> tuple[int, int]:
    """Samples of all ranks in a micro-step, here and there; of one each if a loader does not say."""
    if now.batch_size is None or saved.batch_size is None:
        return now.world_size, saved.world_size
    return now.world_size * now.batch_size, saved.world_size * saved.batch_size


def _remedy(now: EpochGeometry, saved: EpochGeometry) -> str:
    here, there = _samples(now, saved)
    micro_steps, rest = divmod(there * saved.micro_steps, here)
    if rest:
        return f"use a batch size and a number of ranks whose product divides {there * saved.micro_steps}"
    return f"accumulate_grad_batches={micro_steps} makes an optimizer step as large as it was"


def _warn_of_data(trainer: pl.Trainer, *, now: EpochGeometry, saved: EpochGeometry) -> None:
    loader = trainer.train_dataloader
    if not isinstance(getattr(loader, "sampler", None), ResumableSampler):
        warnings.warn(
            f"the epoch goes on with {now.world_size} ranks after {saved.world_size}, and only a ResumableSampler is "
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
