"""When callbacks log."""

from __future__ import annotations

import lightning as L


def at_log_step(trainer: L.Trainer) -> bool:
    """Whether an optimizer step has just ended after which Lightning hands metrics to the loggers.

    For ``on_train_batch_end``, which comes after every micro-step; the last step of an epoch may have fewer of them.
    """
    return not trainer.fit_loop._should_accumulate() and is_log_step(trainer, trainer.global_step)


def is_log_step(trainer: L.Trainer, step: int) -> bool:
    """Whether Lightning hands metrics to the loggers after the optimizer step of that number; the first is 1."""
    every = trainer.log_every_n_steps
    return every > 0 and step % every == 0
