"""The steps at which callbacks log."""

from __future__ import annotations

import lightning as L


def at_log_step(trainer: L.Trainer) -> bool:
    """Whether an optimizer step has just ended after which Lightning logs metrics.

    For ``on_train_batch_end``, which runs after every micro-step; the last step of an epoch may have fewer micro-steps.
    """
    return not trainer.fit_loop._should_accumulate() and is_log_step(trainer, trainer.global_step)


def is_log_step(trainer: L.Trainer, step: int) -> bool:
    """Whether Lightning logs metrics after an optimizer step.

    Args:
        trainer: The trainer.
        step: Number of the optimizer step, from 1.
    """
    every = trainer.log_every_n_steps
    return every > 0 and step % every == 0
