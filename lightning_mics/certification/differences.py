"""How much two trainings may differ: rounding, and nothing else.

========================  ==========================================  ===========================
what                      difference is relative to                   allowed, in units of eps
========================  ==========================================  ===========================
initial weights           the parameter's largest entry               0: they are the same bits
losses, evaluations       the value                                   256 before the first step, then 4,096
gradients, clipped ones   the parameter's largest entry, but at       likewise
                          least 1 % of the model's largest
weights, buffers          the parameter's largest entry, but at       likewise
                          least 0.001
optimizer states          as gradients, by the state's name           likewise
hyperparameters           the number, but at least 0.001              likewise
loaded from a file        as above                                    0 if nothing was trained since
========================  ==========================================  ===========================

``eps`` is that of the dtype: 2.2e-16 in float64, 1.2e-7 in float32. A sum of many terms in another order differs by
some eps of its largest terms, and each optimizer step carries differences on.

In a precision that mixes dtypes nothing can be said beforehand: there, :class:`AsByOrder` allows some times what one
process differs by from itself if the micro-batches of each step come in the opposite order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BEFORE_STEPS = 256  # eps: nothing was updated yet
AFTER_STEPS = 4096  # eps: updates have carried differences on
OF_LARGEST = 0.01  # share of the model's largest gradient below which a parameter's gradient counts as that
TIMES_ORDER = 8  # largest difference by ranks, in those by order: ranks add in yet other orders
TIMES_ROUNDED = 4  # largest difference by weights that are rounded otherwise, in eps of half precision
LEAST_WEIGHT = 1e-3  # weights below it are compared as if they were so large


@dataclass(frozen=True)
class Difference:
    """The largest difference of one comparison.

    Attributes:
        relative: Largest difference, relative to what the table above says; infinity if shapes differ or it is no
            number.
        allowed: Largest that rounding explains.
        where: Name of the tensor.
        moment: When it was compared, in words.
        steps: Number of optimizer steps before.
        factor: Number that the one tensor is of the other, if that is all that differs; None otherwise.
    """

    relative: float
    allowed: float
    where: str
    moment: str
    steps: int = 0
    factor: float | None = None

    @property
    def ratio(self) -> float:
        """The difference as a multiple of the allowed one."""
        if self.relative == 0:
            return 0.0
        return self.relative / self.allowed if self.allowed else math.inf

    @property
    def ok(self) -> bool:
        """Whether rounding explains it."""
        return self.ratio <= 1


Most = Callable[[str, int], float]  # from a kind and the optimizer steps before to the largest allowed difference


@dataclass(frozen=True)
class AsRounded:
    """Allows what rounding explains.

    Attributes:
        dtype: Dtype of the trainings.
    """

    dtype: torch.dtype

    def __call__(self, kind: str, steps: int) -> float:
        """The largest allowed difference of a kind after some optimizer steps."""
        return 0.0 if kind == "initial weights" else allowed(self.dtype, after_steps=steps)


@dataclass(frozen=True)
class AsByOrder:
    """Allows some times what another order of summation makes.

    After the first step, weights that differ in their last bits may be rounded to other numbers of half precision, by
    chance, so that gradients differ by its eps.

    Attributes:
        largest: Largest differences that the other order has made, by kind; 1 for all kinds if it is empty.
        half: Dtype that arithmetic is rounded to.
    """

    largest: Mapping[str, float]
    half: torch.dtype = torch.bfloat16

    def __call__(self, kind: str, steps: int) -> float:
        """The largest allowed difference of a kind after some optimizer steps."""
        if not self.largest:
            return 1.0
        if kind == "initial weights":
            return 0.0
        least = TIMES_ROUNDED * torch.finfo(self.half).eps if steps else allowed(torch.float32, after_steps=0)
        return max(TIMES_ORDER * self.largest.get(kind, 0.0), least)


def allowed(dtype: torch.dtype, *, after_steps: int) -> float:
    """Largest relative difference that rounding explains.

    Args:
        dtype: Dtype of the trainings.
        after_steps: Number of optimizer steps before.
    """
    return (AFTER_STEPS if after_steps else BEFORE_STEPS) * torch.finfo(dtype).eps


def scales(tensors: Mapping[str, Tensor], kind: str) -> dict[str, float]:
    """What differences are relative to, by name.

    Args:
        tensors: Tensors of the reference by name: [any] each.
        kind: ``"gradients"`` or ``"states"``, compared with the model's largest; else ``"weights"``.
    """
    largest = {name: _largest(tensor) for name, tensor in tensors.items()}
    if kind == "weights":
        return {name: max(own, LEAST_WEIGHT) for name, own in largest.items()}
    groups: dict[str, float] = {}
    for name, own in largest.items():
        group = name.rpartition("/")[2] if kind == "states" else ""
        groups[group] = max(groups.get(group, 0.0), own)
    return {
        name: max(own, OF_LARGEST * groups[name.rpartition("/")[2] if kind == "states" else ""])
        for name, own in largest.items()
    }


def difference(ours: Tensor, reference: Tensor, *, scale: float) -> float:
    """Largest relative difference of two tensors.

    Args:
        ours: Tensor of the ranks: [any].
        reference: Tensor of the reference: [any].
        scale: Number that the difference is relative to.
    """
    if ours.shape != reference.shape:
        return math.inf
    if ours.numel() == 0 or torch.equal(ours, reference):
        return 0.0
    apart = (ours.double() - reference.double()).abs().max().item()
    if math.isnan(apart):
        same = torch.equal(ours.isnan(), reference.isnan())
        apart = (ours.double() - reference.double()).nan_to_num(0.0).abs().max().item() if same else math.inf
    return apart / scale if scale else math.inf


def factor(ours: Tensor, reference: Tensor, *, tolerance: float) -> float | None:
    """The number that one tensor is of the other, if that is all that differs.

    Args:
        ours: Tensor of the ranks: [any].
        reference: Tensor of the reference: [any].
        tolerance: Relative difference that may be left.
    """
    if ours.shape != reference.shape or not ours.is_floating_point():
        return None
    ours, reference = ours.double().flatten(), reference.double().flatten()
    squared = reference.dot(reference).item()
    if not squared or not math.isfinite(squared):
        return None
    found = ours.dot(reference).item() / squared
    left = (ours - found * reference).abs().max().item()
    return found if math.isfinite(found) and left <= tolerance * max(_largest(ours), _largest(reference)) else None


def _largest(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    return float(tensor.double().abs().nan_to_num(0.0, posinf=0.0).max())
