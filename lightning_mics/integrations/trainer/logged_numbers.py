"""Numbers of sharded tensors on their way to loggers, callbacks and metrics: they arrive as plain tensors.

A norm of a sharded parameter or gradient is a DTensor, and each rank holds its part of it. Lightning's results,
progress bars, checkpoint names and EarlyStopping expect plain tensors, and so do the states of metrics.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torchmetrics import Metric

from lightning_mics._torch.dtensors.numbers import taking_whole_values


def log_whole_numbers(module: nn.Module) -> None:
    """Make ``self.log``, the metrics in ``module`` and Lightning's ``grad_norm`` take DTensors; all ranks call these.

    Args:
        module: LightningModule that is sharded, or about to be.
    """
    if isinstance(module, pl.LightningModule):
        vars(module)["log"] = taking_whole_values(module.log)
    for metric in module.modules():
        if isinstance(metric, Metric):  # it wraps its own `update` in the same way, and leaves it out of copies
            metric.update = taking_whole_values(metric.update)  # type: ignore[method-assign]
    _let_grad_norm_take_shards()


def _let_grad_norm_take_shards() -> None:
    """Replace ``torch.tensor`` in the module of ``grad_norm``: it reads the memory of the norms that it is given."""
    from lightning.pytorch.utilities import grads

    names: dict[str, Any] = vars(grads)
    if names.get("torch") is torch:
        names["torch"] = _TorchForNorms()


class _TorchForNorms:
    def tensor(self, data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([float(entry) for entry in data] if isinstance(data, list) else data, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
