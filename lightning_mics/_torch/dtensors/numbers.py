"""Numbers of sharded tensors are those of the unsharded ones: ``float(t)``, ``t.item()``, ``bool(t)``, ``f"{t:.3f}"``.

A reduction of a DTensor, such as ``parameter.grad.norm()``, leaves each rank with its own part until somebody asks for
the whole. torch's ``item()`` does not ask: it returns the rank's part. Here it asks, by a reduction over the ranks that
share the tensor, so all of them call it.

A call on one rank alone, as in ``if rank == 0: log(parameter.grad.norm().item())``, would wait for ranks that do
something else. So the ranks meet in the store of the job when a line asks for a number for the first time, and if some
do not come, those that wait raise an error which names the line. Later calls of the line cost the reduction only.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

PATIENCE = timedelta(seconds=120)  # longest time that ranks may be apart when a line asks for the first time


TORCH, STANDARD_LIBRARY = str(Path(torch.__file__).parent), sysconfig.get_paths()["stdlib"]


def read_whole_numbers() -> None:
    """Make the numbers of all DTensors of this process those of the unsharded tensors, from now on."""
    handlers = _handlers()
    if isinstance(handlers.get(torch.ops.aten._local_scalar_dense.default), WholeNumbers):
        return
    numbers = WholeNumbers()
    handlers[torch.ops.aten._local_scalar_dense.default] = numbers
    of_class: Any = DTensor  # torch raises errors for these, or in the case of a format, has no answer
    of_class.__format__ = lambda tensor, specification: numbers.formatted(tensor, specification)
    of_class.tolist = lambda tensor: numbers.whole(tensor).tolist()
    of_class.numpy = lambda tensor, **options: numbers.whole(tensor).numpy(**options)
    of_class.__array__ = lambda tensor, dtype=None, copy=None: numpy.asarray(numbers.whole(tensor).numpy(), dtype)


def reduce_dot_products() -> None:
    """Reduce dot products of sharded vectors at once; torch adds up rank's parts of them, and cannot scale by these."""
    _handlers()[torch.ops.aten.dot.default] = _reduced_dot


def _reduced_dot(_operation: Any, args: tuple[Any, ...], _kwargs: Any) -> DTensor:
    one, other = args
    if not isinstance(one, DTensor):
        one, other = other, one
    placements, mesh = one.placements, one.device_mesh
    if isinstance(other, DTensor) and other.placements == placements:
        parts = torch.dot(one.to_local(), other.to_local())
        partial = [placement if placement.is_replicate() else Partial() for placement in placements]
        return DTensor.from_local(parts, mesh, partial, run_check=False).redistribute(placements=_replicated(mesh))
    product = torch.dot(*whole_values((one, other)))
    return DTensor.from_local(product, mesh, _replicated(mesh), run_check=False)


def _replicated(mesh: DeviceMesh) -> list[Placement]:
    return [Replicate()] * mesh.ndim


def whole_values(values: Any) -> Any:
    """The values with DTensors replaced by the unsharded tensors; all ranks that share them call it.

    Args:
        values: Tensors and other objects in any nest of lists, tuples and dictionaries.
    """
    if isinstance(values, DTensor):
        return values.full_tensor()
    if type(values) in (list, tuple):
        return type(values)(map(whole_values, values))
    return {key: whole_values(value) for key, value in values.items()} if type(values) is dict else values


def taking_whole_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, called with :func:`whole_values` of its arguments."""

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*whole_values(args), **whole_values(kwargs))

    return called


class WholeNumbers:
    """DTensor's handler of ``item()``.

    Args:
        patience: Longest time to wait for the other ranks when a line asks for the first time.
    """

    def __init__(self, patience: timedelta = PATIENCE) -> None:
        self.patience = patience
        self._met: set[tuple[str, str]] = set()

    def __call__(self, _operation: Any, args: tuple[Any, ...], _kwargs: Any) -> Any:
        return self.whole(args[0]).item()

    def whole(self, tensor: DTensor) -> Tensor:
        """The unsharded tensor: [any].

        Args:
            tensor: Sharded, partial or replicated tensor: [any].

        Raises:
            RuntimeError: If another rank that shares the tensor does not ask.
        """
        shared = [axis for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()]
        for axis in shared:
            self._meet(tensor.device_mesh.get_group(axis))
        return (tensor.full_tensor() if shared else tensor.to_local()).detach()

    def formatted(self, tensor: DTensor, specification: str) -> str:
        """The text of a number, as in ``f"{norm:.3f}"``; without a specification the description of the DTensor.

        Args:
            tensor: Number: [].
            specification: Python's format specification.
        """
        if not specification or tensor.dim():
            return object.__format__(tensor, specification)
        return str(format(tensor.item(), specification))

    def _meet(self, group: dist.ProcessGroup) -> None:
        place, ranks = _line(), dist.get_process_group_ranks(group)
        key = place, str(ranks)
        if key in self._met or dist.get_backend(group) == "fake":
            return
        store = dist.distributed_c10d._get_default_store()
        of_rank = {rank: f"lightning_mics/number/{place}/{ranks}/{rank}" for rank in ranks}
        store.set(of_rank[dist.get_rank()], "asks")
        try:
            store.wait(list(of_rank.values()), self.patience)
        except RuntimeError as error:
            away = [rank for rank, name in of_rank.items() if not store.check([name])]
            raise RuntimeError(
                f"{place} asks for the number of a sharded tensor, which ranks {ranks} hold together; in "
                f"{self.patience.total_seconds():.0f} s ranks {away} did not ask for it there: call `.item()`, "
                "`float()` or `full_tensor()` on all ranks, and use the number on one of them"
            ) from error
        self._met.add(key)


def _handlers() -> dict[Any, Any]:
    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    return handlers


def _line() -> str:
    """The innermost line of code that is neither torch's, nor Python's, nor this module's, as "file.py:12"."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename in (__file__, "<string>")
        or frame.f_code.co_filename.startswith(TORCH)
        or (frame.f_code.co_filename.startswith(STANDARD_LIBRARY) and "site-packages" not in frame.f_code.co_filename)
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
