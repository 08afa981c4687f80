"""Sharded tensors among the entries of a checkpoint that are neither the model's nor an optimizer's.

A callback's moving averages, or what ``on_save_checkpoint`` adds, may be DTensors. Each is saved as the model's tensors
are, all rows, and a marker takes its place among the entries. When they are loaded, each becomes a DTensor again, on
the mesh of the job and placed like the model's parameters; a single process gets unsharded tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_mics._torch.pickling import Reduced, first_unpicklable, replacing, tensors_inside
from lightning_mics.checkpoint.content.placing import WHOLE, empty_placed, placed, settled, shard_dim
from lightning_mics.collectives.agreement import on_all_ranks

ENTRIES_KEY = "entries"  # of the tensors, in the shards

PLACES_KEY = "mics_placed"  # in a full file: of entries that were sharded

_MARK = "mics_tensor"
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


@dataclass
class ShardedEntries:
    """The sharded tensors of one checkpoint's entries.

    Attributes:
        found: The tensors, in order, each once.
    """

    found: list[DTensor] = field(default_factory=list)
    _number: dict[int, int] = field(default_factory=dict)  # by id of the tensor

    @classmethod
    def of(cls, meta: Any) -> ShardedEntries:
        """Find the tensors in ``meta``, in containers and inside of objects, without communication.

        Raises:
            RuntimeError: If an entry cannot be pickled; the message names it.
        """
        entries, objects = cls(), []
        for value in _values(meta):
            if isinstance(value, DTensor):
                entries._add(value)
            elif not isinstance(value, (*_PLAIN, Tensor)):
                objects.append(value)
        try:
            for tensor in tensors_inside(objects):
                if isinstance(tensor, DTensor):
                    entries._add(tensor)
        except Exception as error:
            name, kind = first_unpicklable(meta) or ("", "")
            raise RuntimeError(f"the entry {name!r}, a {kind}, cannot be pickled: {error}") from error
        return entries

    def facts(self) -> list[tuple[Any, ...]]:
        """Shape, dtype and dimension of each tensor, to be compared between ranks."""
        return [(tuple(tensor.shape), str(tensor.dtype), shard_dim(tensor)) for tensor in self.found]

    def tensors(self) -> dict[str, Any]:
        """The tensors to save, by their names among the shards; every rank calls it."""
        return {_name(number): settled(tensor.detach()) for number, tensor in enumerate(self.found)}

    def whole(self) -> list[Tensor | None]:
        """The tensors, unsharded on rank 0, and nothing on the others; every rank calls it."""
        gathered = (tensor.detach().full_tensor() for tensor in self.found)
        first = dist.get_rank() == 0
        return [tensor.to("cpu", copy=True) if first else None for tensor in gathered]

    def marked(self, meta: Any) -> Any:
        """``meta`` with a marker for each tensor in its containers; containers without one are the same objects."""
        return self._replaced(meta, self._mark)

    def put_whole(self, meta: dict[str, Any], whole: list[Tensor | None], *, places: bool) -> dict[str, Any]:
        """``meta`` with an unsharded tensor for each one in its containers.

        Args:
            meta: The entries.
            whole: Tensors of :meth:`whole`.
            places: Whether to add an entry that says which they are.
        """
        found = [
            {"path": list(path), "dim": shard_dim(value)}
            for path, value in _paths(meta)
            if isinstance(value, DTensor) and id(value) in self._number
        ]
        put = self._replaced(meta, lambda tensor: _like(tensor, whole[self._number[id(tensor)]]))
        return {**put, PLACES_KEY: found} if found and places else dict(put)

    def marked_inside_objects(self) -> Any:
        """A context in which objects are pickled with a marker for each tensor inside of them."""
        return replacing({id(tensor): (_placed_now, (self._mark(tensor),)) for tensor in self.found})

    def whole_inside_objects(self, whole: list[Tensor | None]) -> Any:
        """A context in which objects are pickled with unsharded tensors.

        Args:
            whole: Tensors of :meth:`whole`.
        """
        reduced: dict[int, Reduced] = {}
        for tensor, unsharded in zip(self.found, whole, strict=True):
            if unsharded is not None:
                reduced[id(tensor)] = _like(tensor, unsharded).__reduce_ex__(2)
        return replacing(reduced)

    def _add(self, tensor: DTensor) -> None:
        if id(tensor) not in self._number:
            self._number[id(tensor)] = len(self.found)
            self.found.append(tensor)

    def _mark(self, tensor: DTensor) -> dict[str, Any]:
        return {
            _MARK: self._number[id(tensor)],
            "size": list(tensor.shape),
            "dtype": tensor.dtype,
            "dim": shard_dim(tensor),
            "parameter": isinstance(tensor, nn.Parameter),
            "requires_grad": tensor.requires_grad,
        }

    def _replaced(self, value: Any, replacement: Callable[[DTensor], Any]) -> Any:
        if isinstance(value, DTensor):
            return replacement(value) if id(value) in self._number else value
        if isinstance(value, dict):
            changed = {key: self._replaced(entry, replacement) for key, entry in value.items()}
            if all(changed[key] is value[key] for key in value):
                return value
            again = copy(value)  # the same class
            for key, entry in changed.items():
                again[key] = entry
            return again
        if type(value) in (list, tuple):
            entries = [self._replaced(entry, replacement) for entry in value]
            same = all(new is old for new, old in zip(entries, value, strict=True))
            return value if same else type(value)(entries)
        return value


def entries_of_all_ranks(meta: dict[str, Any]) -> ShardedEntries:
    """The sharded tensors in ``meta``, which must be the same on all ranks, since each has a part of them.

    Raises:
        RuntimeError: On all ranks, if an entry cannot be pickled, or the tensors differ between ranks.
    """
    own: list[ShardedEntries] = []

    def find() -> list[tuple[Any, ...]]:
        own.append(ShardedEntries.of(meta))
        return own[0].facts()

    found = on_all_ranks(find)
    for rank, facts in enumerate(found):
        if facts != found[0]:
            raise RuntimeError(
                f"rank {rank} has {len(facts)} sharded tensors among its entries, rank 0 {len(found[0])}, or others: "
                "the states of callbacks and hooks must hold the same ones on all ranks"
            )
    return own[0]


class LoadedEntries:
    """The tensors that markers among loaded entries stand for: made empty, and filled afterwards.

    Args:
        mesh: Function that returns the mesh of the job when it is needed; None makes unsharded tensors.
    """

    def __init__(self, mesh: Callable[[], DeviceMesh] | None) -> None:
        self._mesh = mesh
        self._made: dict[int, Any] = {}

    @contextmanager
    def inside_objects(self) -> Iterator[None]:
        """A context in which markers inside of objects are replaced while these are unpickled."""
        token = _loading.set(self)
        try:
            yield
        finally:
            _loading.reset(token)

    def put(self, meta: Any) -> Any:
        """``meta`` with a tensor in the place of each marker."""
        if isinstance(meta, dict) and _MARK in meta:
            return self.make(meta)
        if isinstance(meta, dict):
            for key, entry in meta.items():
                meta[key] = self.put(entry)
            return meta
        if type(meta) in (list, tuple):
            return type(meta)(map(self.put, meta))
        return meta

    def make(self, marker: Mapping[str, Any]) -> Any:
        """The tensor of a marker; one object for all markers of one number."""
        number, size, dtype = marker[_MARK], torch.Size(marker["size"]), marker["dtype"]
        if number not in self._made:
            empty = (
                torch.empty(size, dtype=dtype)
                if self._mesh is None
                else empty_placed(size, dtype, self._mesh(), marker["dim"])
            )
            wraps = nn.Parameter if marker["parameter"] else Tensor.requires_grad_
            self._made[number] = wraps(empty, marker["requires_grad"])
        return self._made[number]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to fill, by their names among the shards."""
        return {
            _name(number): tensor.detach() if _is_sharded(tensor) else _local(tensor.detach())
            for number, tensor in self._made.items()
        }


def place_whole(content: dict[str, Any], mesh: Callable[[], DeviceMesh]) -> None:
    """Shard the entries of a full file that were sharded when it was saved; without communication.

    Args:
        content: Content of the file, changed in place.
        mesh: Function that returns the mesh of the job.
    """
    dims = {tuple(place["path"]): place["dim"] for place in content.pop(PLACES_KEY, ())}
    made: dict[int, Any] = {}  # by id of the unsharded tensor: one that is in several places stays one

    def put(value: Any, path: tuple[Any, ...]) -> Any:
        if path in dims:
            if id(value) not in made:
                sharded = placed(value.detach(), mesh(), dims[path])
                wraps = nn.Parameter if isinstance(value, nn.Parameter) else Tensor.requires_grad_
                made[id(value)] = wraps(sharded, value.requires_grad)
            return made[id(value)]
        if not any(known[: len(path)] == path for known in dims):
            return value
        if type(value) in (list, tuple):
            return type(value)(put(entry, (*path, index)) for index, entry in enumerate(value))
        for key in value:
            value[key] = put(value[key], (*path, key))
        return value

    if dims:
        put(content, ())


_loading: ContextVar[LoadedEntries | None] = ContextVar("_loading", default=None)


def _placed_now(marker: Mapping[str, Any]) -> Any:
    """Called by unpicklers of objects that a checkpoint was saved with."""
    loading = _loading.get()
    if loading is None:  # the file was read by itself, and holds no values
        return torch.empty(marker["size"], dtype=marker["dtype"], device="meta")
    return loading.make(marker)


def _is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) and shard_dim(tensor) != WHOLE


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _name(number: int) -> str:
    return f"{ENTRIES_KEY}.{number}"


def _like(tensor: Tensor, unsharded: Tensor | None) -> Any:
    if unsharded is None:
        return None
    wraps = nn.Parameter if isinstance(tensor, nn.Parameter) else Tensor.requires_grad_
    return wraps(unsharded, tensor.requires_grad)


def _values(value: Any) -> Iterator[Any]:
    """Everything in nested containers that is no container."""
    if isinstance(value, dict):
        for entry in value.values():
            yield from _values(entry)
        if type(value) is not dict:
            yield type(value)
    elif type(value) in (list, tuple):
        for entry in value:
            yield from _values(entry)
    else:
        yield value


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The same with the keys that lead to each."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _paths(entry, (*path, key))
    elif type(value) in (list, tuple):
        for index, entry in enumerate(value):
            yield from _paths(entry, (*path, index))
    else:
        yield path, value
