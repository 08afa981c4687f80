"""How much memory a run takes at most."""

from __future__ import annotations

import resource
import sys
from typing import Any

import lightning as L
import torch

from recipes.callbacks.log_steps import at_log_step


class PeakMemory(L.Callback):
    """Logs the most that a rank has taken since it began: of its GPU by tensors, else of the machine.

    ``peak_memory_gib`` is that of the rank which has taken most, ``least_peak_memory_gib`` that of the one which has
    taken least: far apart, they tell of work that is divided unequally.
    """

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if not at_log_step(trainer):
            return
        device = trainer.strategy.root_device
        own = peak_memory_bytes(device) / 2**30
        both = trainer.strategy.reduce(torch.tensor([own, -own], device=device), reduce_op="max")
        pl_module.log_dict({"peak_memory_gib": both[0], "least_peak_memory_gib": -both[1]})


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has taken of a GPU by tensors, or of the machine in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) counts bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
