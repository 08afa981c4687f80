"""Fake tensors and fake process groups: the private names of torch that a rehearsal needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.tensor.debug
from torch import Tensor, nn
from torch._subclasses import fake_tensor

# FSDP2's communication interface has no public path yet (https://github.com/pytorch/pytorch/pull/155189).
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import _sharding_prop
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _python_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

# errors of operations whose results depend on values
NEEDS_VALUES = (fake_tensor.DynamicOutputShapeException, fake_tensor.DataDependentOutputException)


DEVICE_OF = torch.ops.prim.device.default  # what `tensor.device` is for a fake tensor


__all__ = ["DEVICE_OF", "NEEDS_VALUES", "FakeTensorMode", "TorchDispatchMode", "tree_leaves", "tree_map_only"]


class TorchDispatchMode(_python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """torch's mode, without the wrapper of each operation that keeps the compiler out: nothing is compiled inside."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class FakeTensorMode(fake_tensor.FakeTensorMode):  # type: ignore[no-untyped-call]
    """torch's mode, deep copies of which are itself: `nn.Transformer` makes deep copies of a block."""

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeTensorMode:
        return self


@contextmanager
def moving_modules() -> Iterator[None]:
    """Let ``module.to()`` and the like move modules of fake tensors, of which torch can swap none that is known.

    For the construction of models, as of those with adapters, which move these to the device of the base layer.
    """
    apply = nn.Module._apply
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # by id of a parameter: tied ones stay tied

    def move(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            move(child, function)
        for name, parameter in module._parameters.items():
            moved = parameter if parameter is None else function(parameter.detach())
            if moved is None or parameter is None or (moved.dtype, moved.device) == (parameter.dtype, parameter.device):
                continue
            _, module._parameters[name] = made.setdefault(
                id(parameter), (parameter, nn.Parameter(moved, parameter.requires_grad))
            )
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else function(buffer)
        return module

    nn.Module._apply = move  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]


@contextmanager
def rehearsed_job(*, world_size: int, rank: int) -> Iterator[None]:
    """Make this process ``rank`` of a job whose other ranks do not exist: collectives return at once.

    Args:
        world_size: Number of ranks in the job.
        rank: Rank that this process plays.

    Raises:
        RuntimeError: If this process is part of a real job.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "a job is rehearsed in a process that is not part of another one: torch.distributed is in use"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    fsdp_param: Any = _fsdp_param
    chunk_with_empty, fsdp_param._chunk_with_empty = fsdp_param._chunk_with_empty, _Chunks
    try:
        with _no_strided_shards():
            yield
    finally:
        fsdp_param._chunk_with_empty = chunk_with_empty
        dist.destroy_process_group()
        _forget_meshes()


@contextmanager
def _no_strided_shards() -> Iterator[None]:
    """Spare DTensor its search for strided shards, which tensor parallelism makes and FSDP2 alone does not.

    torch 2.13 looks at all tensors of an operation on a list for each of them: with the thousand parameters of a large
    model it takes as long as the rest of an optimizer step.
    """
    module: Any = _sharding_prop
    search = getattr(module, "_propagate_use_strided_shard_flag", None)
    if search is None:  # older torch does not
        yield
        return
    module._propagate_use_strided_shard_flag = lambda strategy, schema: None
    try:
        yield
    finally:
        module._propagate_use_strided_shard_flag = search


@contextmanager
def watched_resizes(resized: Callable[[torch.UntypedStorage, int], None]) -> Iterator[None]:
    """Call ``resized(storage, bytes_before)`` after each change of a storage's size; FSDP2 frees memory so."""
    resize = torch.UntypedStorage.resize_

    def watched(storage: Any, size: int) -> Any:
        before = storage.nbytes()
        result = resize(storage, size)
        resized(storage, before)
        return result

    torch.UntypedStorage.resize_ = watched  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


class _Chunks:
    """The shards of a parameter along ``dim``, each made when it is indexed. FSDP2 makes the shards of all ranks and
    takes its own, which dominates a rehearsal of hundreds of ranks.
    """

    def __init__(self, tensor: Tensor, num_chunks: int, dim: int) -> None:
        self._tensor, self._dim = tensor, dim
        self._size = -(-tensor.shape[dim] // num_chunks)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self._size
        left = self._tensor.shape[self._dim] - start
        return self._tensor.narrow(self._dim, start, min(self._size, left)) if left > 0 else self._tensor.new_empty(0)


def _forget_meshes() -> None:
    """Clear DTensor's caches, which hold meshes of this job, whose groups are gone, and find them for equal ones."""
    forget = getattr(dist.tensor.debug, "_clear_sharding_prop_cache", None)  # torch >= 2.13
    if forget is not None:
        forget()
