"""Changes that users make to unsharded parameters, carried over to the shards before FSDP2 drops them.

While a parameter group is unsharded its modules show FSDP2's unsharded parameters. FSDP2 keeps the shards only, so what
users set on the others would be lost at the next reshard::

    set while unsharded                     reaches the shard
    values, in place                        at the reshard: torch counts the changes
    values, through `.data` or to it        at the reshard
    `.grad`, `requires_grad`                at once

All ranks make the same changes, as replicas under DDP would have to, so each copies its own rows without communication.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lightning_mics._torch.dtensor_changes import accept_sharded_operands, know_parameter
from lightning_mics._torch.fsdp import _param_groups, own_grad

_data: Any = torch._C.TensorBase.data
_requires_grad: Any = torch._C.TensorBase.requires_grad


class UnshardedChanges:
    """Carries what users set on the unsharded parameters of a model over to its shards.

    Args:
        modules: FSDP modules of the model by FQN.
        root: Root FSDP module, whose parameters users see unsharded outside of its children's forwards.
    """

    def __init__(self, modules: Iterable[FSDPModule], *, root: FSDPModule) -> None:
        self._groups: list[_GroupChanges] = []
        self._of_root: list[FSDPParam] = []
        self._shown = False
        for module in modules:
            kind = _UnshardedRootParameter if module is root else _UnshardedParameter
            self._groups += [_GroupChanges(group, kind) for group in _param_groups(module)]
        for parameter in (p for group in _param_groups(root) for p in group.fsdp_params):
            free = partial(self._free_unless_shown, parameter, parameter.free_unsharded_param)
            parameter.free_unsharded_param = free  # type: ignore[method-assign]
            self._of_root.append(parameter)

    def write(self) -> None:
        """Write changes of parameters that are unsharded now to their shards; parameters stay unsharded."""
        for group in self._groups:
            if group.is_unsharded:
                group.write()

    def shown_in(self, values: Any) -> bool:
        """Whether tensors in ``values`` are unsharded parameters of the root itself, or views of them.

        Then their memory is not freed before the next call.
        """
        memory = {output.untyped_storage()._cdata for p in self._of_root for output in p.all_gather_outputs}
        tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
        self._shown = any(not isinstance(t, DTensor) and t.untyped_storage()._cdata in memory for t in tensors)
        return self._shown

    def _free_unless_shown(self, parameter: FSDPParam, free: Callable[[], None]) -> None:
        """Free an unsharded parameter, unless a step has returned it or a user has kept it, or a view of it."""
        if self._shown or any(
            torch._C._storage_Use_Count(output.untyped_storage()._cdata) > REFERENCES
            for output in parameter.all_gather_outputs
        ):
            return
        free()


REFERENCES = 3  # to the memory of an unsharded parameter, if no user has kept it: its two tensors, its storage


class _GroupChanges:
    """The changes of one parameter group."""

    def __init__(self, group: FSDPParamGroup, kind: type[_UnshardedParameter]) -> None:
        self._group = group
        self._kind = kind
        self._watched: list[tuple[_UnshardedParameter, _Origin]] = []
        for parameter in group.fsdp_params:
            know_parameter(parameter)
        group._to_unsharded = self._first_to_unsharded  # type: ignore[method-assign]
        group._to_sharded = self._to_sharded  # type: ignore[method-assign]

    @property
    def is_unsharded(self) -> bool:
        """Whether users see unsharded parameters now."""
        return self._group.is_unsharded

    def _first_to_unsharded(self) -> None:
        """FSDP2 makes the unsharded parameters once, at the first unshard, and keeps their Python objects."""
        group: Any = self._group
        for parameter in group.fsdp_params:
            unsharded = parameter._unsharded_param
            unsharded.__class__ = self._kind
            unsharded._origin = _Origin(parameter, group, version=unsharded._version)
            self._watched.append((unsharded, unsharded._origin))
        del group._to_unsharded
        group._to_unsharded()

    def _to_sharded(self) -> None:
        group: Any = self._group
        if not group.is_sharded:
            self.write()
            type(group)._to_sharded(group)

    def write(self) -> None:
        for unsharded, origin in self._watched:
            if (unsharded._version != origin.version or origin.touched) and origin.is_changed(unsharded):
                origin.write(unsharded)


class _Origin:
    """Where an unsharded parameter comes from, and whether users have touched it since its last write.

    Args:
        parameter: FSDP2's record of the parameter.
        group: Its parameter group.
        version: Version of the unsharded parameter when it equals the shards.

    Attributes:
        version: Version of the unsharded parameter when it last equalled the shards.
        touched: Whether its ``data`` was read or assigned since, which torch does not count.
    """

    def __init__(self, parameter: FSDPParam, group: FSDPParamGroup, *, version: int) -> None:
        self._parameter = weakref.ref(parameter)
        self._group = weakref.ref(group)
        self.version = version
        self.touched = False
        self.rounded = parameter.param_dtype is not None  # unsharded in a lower precision than the shard
        self._before: Tensor | None = None  # [any], the values before the first touch, if rounded

    def touch(self, values: Tensor) -> None:
        """Note that users may change ``values``, [any], in a way that torch does not count."""
        if self.rounded and self._before is None:
            self._before = values.clone()
        self.touched = True

    def is_changed(self, unsharded: Tensor) -> bool:
        """Whether the unsharded parameter, [any], has to be written; the same on all ranks."""
        before, self._before = self._before, None
        if before is None or unsharded._version != self.version or not torch.equal(_data.__get__(unsharded), before):
            return True
        self.touched = False
        return False

    @property
    def shard(self) -> Any:
        """The sharded parameter, a DTensor."""
        parameter = self._parameter()
        return None if parameter is None else parameter.sharded_param

    @property
    def name(self) -> str:
        parameter: Any = self._parameter()
        return str(parameter._param_fqn or parameter._module_info.param_name)

    @property
    def used_by_fsdp(self) -> bool:
        """Whether FSDP2 collects gradients of the group now, and must see its own only."""
        group = self._group()
        return group is None or group._training_state == TrainingState.POST_BACKWARD

    def own_rows(self, unsharded: Tensor) -> Tensor:
        """This rank's rows, [shard], of an unsharded tensor, [any]."""
        parameter: Any = self._parameter()
        rows = parameter.sharded_size[0]
        start = parameter.mesh_info.shard_mesh_rank * parameter.padded_sharded_param_size[0]
        return unsharded.narrow(0, min(start, unsharded.size(0) - rows), rows)

    @torch.no_grad()
    def write(self, unsharded: Tensor) -> None:
        """Write this rank's rows of the unsharded parameter, [any], to its shard."""
        parameter: Any = self._parameter()
        values = _data.__get__(unsharded)
        if self.rounded:
            self.version, self.touched = unsharded._version, False
            self.raise_rounded(values.dtype)
        self.shard._local_tensor.copy_(self.own_rows(values))
        torch.autograd.graph.increment_version(self.shard)
        gathered = parameter.all_gather_outputs[0]
        if values.data_ptr() != gathered.data_ptr():  # `.data` was assigned: back to the memory that FSDP2 fills
            gathered = gathered.as_strided(parameter._orig_size, parameter._contiguous_orig_stride, 0)
            with torch.autograd._unsafe_preserve_version_counter(gathered):  # type: ignore[attr-defined]
                gathered.copy_(values)
            _data.__set__(unsharded, gathered)
        group: Any = self._group()
        event = group.device_handle.Event()
        event.record()
        group._wait_all_gather_streams_on_event(event)
        self.version, self.touched = unsharded._version, False

    def raise_rounded(self, dtype: torch.dtype) -> NoReturn:
        """Raise the error for a change that cannot be exact."""
        raise RuntimeError(
            f"parameter {self.name} was changed while it was unsharded in {dtype}, in a step or between it and its "
            f"backward, so the change would be rounded, and its shard is in {self.shard.dtype}; make it where the "
            "parameter is sharded: in on_train_batch_start, on_train_batch_end or on_before_optimizer_step, or in a "
            "loop of one's own after the backward"
        )


@accept_sharded_operands
class _UnshardedParameter(nn.Parameter):
    """An unsharded parameter whose values and ``requires_grad`` reach its shard; operations are as fast as before."""

    _origin: _Origin

    @property
    def data(self) -> Tensor:
        values = _data.__get__(self)
        self._origin.touch(values)
        return _UnshardedData.of(values)

    @data.setter
    def data(self, value: Tensor) -> None:
        if self._origin.rounded:
            self._origin.raise_rounded(self.dtype)
        _check_assigned(self, value, self._origin.name)
        whole = value.full_tensor() if isinstance(value, DTensor) else value.detach()
        self._origin.touched = True
        _data.__set__(self, whole.as_subclass(Tensor))

    @property
    def requires_grad(self) -> bool:
        return bool(_requires_grad.__get__(self))

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> _UnshardedParameter:
        shard = self._origin.shard
        if shard is not None and shard.requires_grad != requires_grad:
            shard.requires_grad_(requires_grad)
        _requires_grad.__set__(self, requires_grad)
        return self


class _UnshardedRootParameter(_UnshardedParameter):
    """The same for the root's, whose gradients users see too: those of its shard, where FSDP2 does not look."""

    @property
    def grad(self) -> Tensor | None:
        own: Tensor | None = own_grad.__get__(self)
        if own is not None or self._origin.used_by_fsdp:
            return own
        shard = self._origin.shard
        return None if shard is None else shard.grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        origin = self._origin
        if origin.used_by_fsdp:
            own_grad.__set__(self, value)
            return
        parameter: Any = origin._parameter()
        parameter.unsharded_accumulated_grad = None
        own_grad.__set__(self, None)
        if value is None or isinstance(value, DTensor):
            origin.shard.grad = value
        else:
            _check_assigned(origin.shard, value, f"{origin.name}.grad")
            origin.shard.grad = parameter.to_sharded_dtensor(origin.own_rows(value.detach()).clone())

    @grad.deleter
    def grad(self) -> None:
        self.grad = None


@accept_sharded_operands
class _UnshardedData(Tensor):
    """What ``data`` of an unsharded parameter returns: a tensor with the same memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, tensor: Tensor) -> Tensor:
        return tensor.as_subclass(cls)


def _check_assigned(target: Tensor, value: Tensor, name: str) -> None:
    """Check that ``value`` can take the place of ``target``'s values.

    Raises:
        ValueError: If its shape, dtype or device differs.
    """
    for what, given, own in (
        ("shape", tuple(value.shape), tuple(target.shape)),
        ("dtype", value.dtype, target.dtype),
        ("device", value.device, target.device),
    ):
        if given != own:
            raise ValueError(f"{name} is sharded and keeps its {what} {own}; the tensor assigned to it has {given}")
