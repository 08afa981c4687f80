"""Sharded tensors among the entries of a checkpoint that are neither the model's nor an optimizer's.

A callback's moving averages, or what ``on_save_checkpoint`` adds, may be DTensors, in containers or inside of objects.
A sharded checkpoint holds them as it holds the model's tensors, all rows, and its entries are pickled with a call of
:func:`sharded_entry` in their place. A full file has unsharded tensors in containers, and says which were sharded.
When either is loaded, each becomes a DTensor again, on the mesh of the job; a single process gets unsharded tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_mics._torch.pickling import first_unpicklable, replacing, tensors_inside
from lightning_mics.checkpoint.content.placing import WHOLE, empty_placed, placed, settled, shard_dim
from lightning_mics.collectives.agreement import on_all_ranks

ENTRIES_KEY = "entries"  # of the tensors, in the shards

PLACES_KEY = "mics_placed"  # in a full file: of entries that were sharded


@dataclass
class ShardedEntries:
    """The sharded tensors of one checkpoint's entries.

    Attributes:
        found: The tensors, in order, each once.
    """

    found: list[DTensor]

    @classmethod
    def of(cls, meta: Any) -> ShardedEntries:
        """Find the tensors in ``meta``, in containers and inside of objects, without communication.

        Raises:
            RuntimeError: If an entry cannot be pickled; the message names it.
        """
        try:
            return cls([tensor for tensor in tensors_inside(meta) if isinstance(tensor, DTensor)])
        except Exception as error:
            name, kind = first_unpicklable(meta) or ("", "")
            raise RuntimeError(f"the entry {name!r}, a {kind}, cannot be pickled: {error}") from error

    def facts(self) -> list[tuple[Any, ...]]:
        """Shape, dtype and dimension of each tensor, to be compared between ranks."""
        return [(tuple(tensor.shape), str(tensor.dtype), shard_dim(tensor)) for tensor in self.found]

    def tensors(self) -> dict[str, Any]:
        """The tensors to save, by their names among the shards; every rank calls it."""
        return {_name(number): settled(tensor.detach()) for number, tensor in enumerate(self.found)}

    def whole(self) -> list[Tensor | None]:
        """The tensors, unsharded on rank 0, and nothing on the others; every rank calls it."""
        first = dist.get_rank() == 0
        whole = []
        for tensor in self.found:
            gathered = tensor.full_tensor().detach()
            whole.append(_like(tensor, gathered.to("cpu", copy=True)) if first else None)
        return whole

    def put_whole(self, meta: dict[str, Any], whole: list[Tensor | None], *, places: bool) -> dict[str, Any]:
        """``meta`` with an unsharded tensor for each one in its containers.

        Args:
            meta: The entries.
            whole: Tensors of :meth:`whole`, each [any].
            places: Whether to add an entry that says which they are.
        """
        unsharded = {id(tensor): each for tensor, each in zip(self.found, whole, strict=True)}
        dims: list[dict[str, Any]] = []
        put: dict[str, Any] = dict(_replaced(meta, unsharded, dims, ()))
        return {**put, PLACES_KEY: dims} if dims and places else put

    def as_calls(self, whole: list[Tensor | None] | None = None) -> Any:
        """A context in which tensors are pickled as calls of :func:`sharded_entry`.

        Args:
            whole: Tensors of :meth:`whole`, each [any], to pickle with them; None leaves them to the shards.
        """
        values = [()] * len(self.found) if whole is None else [(tensor,) for tensor in whole]
        return replacing(
            {
                id(tensor): (sharded_entry, (self._described(number), *value))
                for number, (tensor, value) in enumerate(zip(self.found, values, strict=True))
            }
        )

    def _described(self, number: int) -> dict[str, Any]:
        tensor = self.found[number]
        return {
            "number": number,
            "size": list(tensor.shape),
            "dtype": tensor.dtype,
            "dim": shard_dim(tensor),
            "parameter": isinstance(tensor, nn.Parameter),
            "requires_grad": tensor.requires_grad,
        }


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
    """The tensors that loaded entries call for: made when they are unpickled, and filled afterwards.

    Args:
        mesh: Function that returns the mesh of the job when it is needed; None makes unsharded tensors.
    """

    def __init__(self, mesh: Callable[[], DeviceMesh] | None) -> None:
        self._mesh = mesh
        self._made: dict[int, Any] = {}
        self._unread: dict[str, Tensor] = {}

    @contextmanager
    def unpickled(self) -> Iterator[None]:
        """A context in which unpickled entries get their tensors from here."""
        token = _loading.set(self)
        try:
            yield
        finally:
            _loading.reset(token)

    def make(self, described: Mapping[str, Any], whole: Tensor | None) -> Any:
        """A tensor; one object for all calls with one number.

        Args:
            described: Number, shape and sharding.
            whole: The values, [any]; None leaves them to be read.
        """
        number, size, dtype, dim = (described[key] for key in ("number", "size", "dtype", "dim"))
        if number not in self._made:
            if whole is not None:
                made = whole.detach() if self._mesh is None else placed(whole.detach(), self._mesh(), dim)
            elif self._mesh is None:
                made = torch.empty(size, dtype=dtype)
            else:
                made = empty_placed(torch.Size(size), dtype, self._mesh(), dim)
            if whole is None:
                own = made.to_local() if dim == WHOLE and isinstance(made, DTensor) else made
                self._unread[_name(number)] = own.detach()
            self._made[number] = _wrapped(made, described["parameter"], described["requires_grad"])
        return self._made[number]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to fill, by their names among the shards."""
        return dict(self._unread)

    def name_of(self, tensor: Any) -> str | None:
        """The name of a tensor among the shards; None if it is not one of those that were made.

        Args:
            tensor: Any value of the entries.
        """
        return next((_name(number) for number, made in self._made.items() if made is tensor), None)


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
                made[id(value)] = _wrapped(sharded, isinstance(value, nn.Parameter), value.requires_grad)
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


def sharded_entry(described: Mapping[str, Any], whole: Tensor | None = None) -> Any:
    """A tensor among the entries of a checkpoint; unpicklers call it.

    Args:
        described: Number, shape and sharding of the tensor.
        whole: Values of the tensor, [any], if they are pickled with it.

    Returns:
        The tensor of the checkpoint that is being loaded; for a file that is read by itself its values, on the meta
        device if they are elsewhere.
    """
    loading = _loading.get()
    if loading is not None:
        return loading.make(described, whole)
    return torch.empty(described["size"], dtype=described["dtype"], device="meta") if whole is None else whole


torch.serialization.add_safe_globals([sharded_entry])


def _name(number: int) -> str:
    return f"{ENTRIES_KEY}.{number}"


def _like(tensor: Tensor, unsharded: Tensor) -> Any:
    return _wrapped(unsharded, isinstance(tensor, nn.Parameter), tensor.requires_grad)


def _wrapped(tensor: Tensor, parameter: bool, requires_grad: bool) -> Tensor:
    return nn.Parameter(tensor, requires_grad) if parameter else tensor.requires_grad_(requires_grad)


def _replaced(
    value: Any, unsharded: Mapping[int, Tensor | None], dims: list[dict[str, Any]], path: tuple[Any, ...]
) -> Any:
    """The same nested containers with other tensors, whose places are noted; those without one are the same objects."""
    if isinstance(value, DTensor) and id(value) in unsharded:
        dims.append({"path": list(path), "dim": shard_dim(value)})
        return unsharded[id(value)]
    if isinstance(value, dict):
        changed = {key: _replaced(entry, unsharded, dims, (*path, key)) for key, entry in value.items()}
        if all(changed[key] is value[key] for key in value):
            return value
        again = copy(value)  # the same class
        for key, entry in changed.items():
            again[key] = entry
        return again
    if type(value) in (list, tuple):
        entries = [_replaced(entry, unsharded, dims, (*path, index)) for index, entry in enumerate(value)]
        same = all(new is old for new, old in zip(entries, value, strict=True))
        return value if same else type(value)(entries)
    return value
