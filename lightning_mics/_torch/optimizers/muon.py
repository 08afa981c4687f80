"""Private names of ``torch.optim.Muon``: its iteration, its learning rate by shape, and where its step begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.optim._muon as _muon
from torch import Tensor
from torch.optim import Muon, Optimizer

MOMENTUM = "momentum_buffer"  # name of its state


def is_muon(optimizer: Optimizer) -> bool:
    """Whether the step of an optimizer is that of ``torch.optim.Muon``."""
    kind: Any = type(optimizer)
    return isinstance(optimizer, Muon) and kind.step is Muon.step and kind._init_group is Muon._init_group


def orthogonalized(update: Tensor, group: dict[str, Any]) -> Tensor:
    """The update of a matrix, orthogonalized by Newton-Schulz iterations: [rows, columns].

    Args:
        update: Update before it, from momentum: [rows, columns].
        group: Parameter group of the matrix.
    """
    result: Tensor = _muon._zeropower_via_newtonschulz(
        update, group["ns_coefficients"], group["ns_steps"], group["eps"]
    )
    return result


def iteration_dtype(group: dict[str, Any]) -> torch.dtype:
    """Dtype of orthogonalized updates.

    Args:
        group: A parameter group.
    """
    return orthogonalized(torch.eye(2), group).dtype


def iteration_flops(rows: int, columns: int, *, steps: int = 5) -> float:
    """Floating-point operations that orthogonalize one matrix.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        steps: Number of iterations.
    """
    short, long = sorted((rows, columns))
    return steps * (4.0 * short * short * long + 2.0 * short**3)


def learning_rate(group: dict[str, Any], shape: torch.Size) -> tuple[float, float]:
    """The learning rate of a group, and that of a matrix in it.

    Args:
        group: Parameter group of the matrix.
        shape: Shape of the matrix.
    """
    lr = float(group["lr"])
    return lr, _muon._adjust_lr(lr, group["adjust_lr_fn"], shape)


def take_over_step(optimizer: Optimizer, step: Callable[[], set[Tensor]]) -> None:
    """Run ``step`` in place of the optimizer's own, for the parameters that it returns.

    torch's step calls ``_init_group`` for each group, after the closure, and then steps on what that has collected.

    Args:
        optimizer: A Muon.
        step: Called once in each step of the optimizer, before its own; returns the parameters that have stepped.
    """
    stepped: set[Tensor] = set()

    def init_group(group: dict[str, Any], *collected: Any) -> Any:
        nonlocal stepped
        if group is optimizer.param_groups[0]:
            stepped = step()
        rest = [parameter for parameter in group["params"] if parameter not in stepped]
        return Muon._init_group(optimizer, {**group, "params": rest}, *collected)  # type: ignore[arg-type]

    vars(optimizer)["_init_group"] = init_group
