"""Peak memory of a run."""

from __future__ import annotations

import resource
import sys
from typing import Any

import lightning as L
import torch

from recipes.callbacks.log_steps import at_log_step


class PeakMemory(L.Callback):
    """Logs the peak memory of ranks since the start: memory of tensors on the GPU, or of the process without a GPU.

    ``peak_memory_gib`` is the largest over all ranks, ``least_peak_memory_gib`` the smallest. A large difference shows
    that work is divided unequally.
    """

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if not at_log_step(trainer):
            return
        device = trainer.strategy.root_device
        own = peak_memory_bytes(device) / 2**30
        both = trainer.strategy.reduce(torch.tensor([own, -own], device=device), reduce_op="max")
        pl_module.log_dict({"peak_memory_gib": both[0], "least_peak_memory_gib": -both[1]})


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process in bytes: of tensors on a GPU, or in all on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
