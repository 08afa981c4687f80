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


class MuonUpdate:
    """The parts of Muon's step, which are torch's operations on the same numbers.

    Attributes:
        update_dtype: Dtype that the iteration computes in.
    """

    def __init__(self) -> None:
        options = {"ns_coefficients": (1.0, 0.0, 0.0), "ns_steps": 1, "eps": 1e-7}
        self.update_dtype: torch.dtype | None = self.of_matrix(torch.eye(2), options).dtype

    def of_rows(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The update from momentum: [rows, columns].

        Args:
            gradient: Some rows of the gradient: [rows, columns].
            state: State of these rows, changed in place.
            group: Parameter group of the matrix.
        """
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(gradient)
        momentum = state[MOMENTUM].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def of_matrix(self, update: Tensor, group: dict[str, Any]) -> Tensor:
        """The update of a matrix, orthogonalized by Newton-Schulz iterations: [rows, columns].

        Args:
            update: Update before it: [rows, columns].
            group: Parameter group of the matrix.
        """
        result: Tensor = _muon._zeropower_via_newtonschulz(
            update, group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        return result

    def apply(self, weights: Tensor, update: Tensor, group: dict[str, Any], shape: torch.Size) -> None:
        """Decay the weights and add the update, in place.

        Args:
            weights: Some rows of the weights: [rows, columns].
            update: These rows of the update: [rows, columns].
            group: Parameter group of the matrix.
            shape: Shape of the matrix.
        """
        lr = float(group["lr"])
        weights.mul_(1 - lr * group["weight_decay"])
        weights.add_(update, alpha=-_muon._adjust_lr(lr, group["adjust_lr_fn"], shape))

    def flops(self, rows: int, columns: int, group: dict[str, Any]) -> float:
        """Floating-point operations that orthogonalize one matrix.

        Args:
            rows: Number of rows.
            columns: Number of columns.
            group: Parameter group of the matrix.
        """
        short, long = sorted((rows, columns))
        return float(group["ns_steps"] * (4 * short * short * long + 2 * short**3))


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
