"""Pickling of sharded tensors: outside of a checkpoint's own saving, a rank would write its rows alone.

``torch.save(model.state_dict())`` on one rank pickles that rank's shard and says nothing. So a tensor that is sharded
over a job's partition groups raises when it is pickled; a checkpoint that is being saved replaces it by what it holds
instead. Copies by :mod:`copy`, which asks the same table, are not affected.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Reduced = tuple[Any, ...]

_replaced: ContextVar[Mapping[int, Reduced] | None] = ContextVar("_replaced", default=None)


@contextmanager
def replacing(reduced: Mapping[int, Reduced]) -> Iterator[None]:
    """Inside the context, pickle tensors as others.

    Args:
        reduced: What ``__reduce__`` is to return, by the ``id`` of the tensor.
    """
    token = _replaced.set(reduced)
    try:
        yield
    finally:
        _replaced.reset(token)


def refuse_shards(mesh: DeviceMesh) -> None:
    """From now on, let an error tell users who pickle a tensor that is sharded over ``mesh`` how to get whole ones.

    Args:
        mesh: Mesh of the job.
    """
    _meshes.add(mesh)
    copyreg.pickle(DTensor, _reduce)


_meshes: set[DeviceMesh] = set()


def _reduce(tensor: DTensor) -> Any:
    known = (_replaced.get() or {}).get(id(tensor))
    if known is not None:
        return known
    copied = sys._getframe(1).f_globals.get("__name__") == "copy"
    if copied or tensor.device_mesh not in _meshes:
        return tensor.__reduce_ex__(pickle.DEFAULT_PROTOCOL)  # type: ignore[no-untyped-call]
    if all(
        placement.is_replicate() or size == 1
        for placement, size in zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    ):
        return tensor.to_local().__reduce_ex__(pickle.DEFAULT_PROTOCOL)  # type: ignore[no-untyped-call]
    raise RuntimeError(
        f"a tensor of shape {tuple(tensor.shape)} is sharded, and this rank would save its own "
        f"{tuple(tensor.to_local().shape)} of it: call `state = lightning_mics.full_state_dict(module)` on every rank, "
        "and save that on rank 0 (`save_pretrained(folder, state_dict=state)`); for single tensors, `full_tensor()`"
    )


def tensors_inside(values: Any) -> list[Tensor]:
    """The tensors that pickling ``values`` would come to, in order, each once.

    Raises:
        Exception: Whatever an object raises that cannot be pickled.
    """
    finder = _Finder(io.BytesIO())
    finder.dump(values)
    return list(finder.found.values())


class _Finder(pickle.Pickler):
    """A pickler that notes tensors, and skips their values."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.found: dict[int, Tensor] = {}

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.found[id(value)] = value
            return dict, ()
        if isinstance(value, torch.UntypedStorage):
            return dict, ()
        return NotImplemented


def first_unpicklable(value: Any, name: str = "") -> tuple[str, str] | None:
    """The dotted name of an entry that cannot be pickled, and its class; None if all can.

    Args:
        value: Nested dicts, lists and tuples.
        name: Dotted name of ``value`` itself.
    """
    try:
        tensors_inside(value)
    except Exception:
        entries: Any = value.items() if isinstance(value, Mapping) else enumerate(value) if _is_list(value) else ()
        inner = (first_unpicklable(entry, f"{name}.{key}".lstrip(".")) for key, entry in entries)
        return next(filter(None, inner), (name, type(value).__name__))
    return None


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
