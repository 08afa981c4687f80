"""Changes that users make to unsharded parameters, carried over to the shards before FSDP2 drops them.

While a parameter group is unsharded its modules show FSDP2's unsharded parameters. FSDP2 keeps the shards only, so what
users set on the others would be lost at the next reshard::

    set while unsharded                     reaches the shard
    values, in place                        at the reshard: torch counts the changes
    values, through `.data` or to it        at the reshard
    `.grad`, `requires_grad`                at once

All ranks make the same changes, as replicas under DDP would have to, so each copies its own part without communication.

Unsharded parameters are of class ``nn.Parameter`` itself, which compilers and other libraries compare with. So it is
the attributes of that class that look up where a parameter comes from; other parameters behave as ever.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from functools import partial
from operator import gt
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lightning_mics._torch.dtensors.changes import accept_sharded_operands, know_parameter
from lightning_mics._torch.fsdp import _param_groups, own_grad
from lightning_mics._torch.units.shards import own_shard

_data: Any = torch._C.TensorBase.data
_requires_grad: Any = torch._C.TensorBase.requires_grad
_use_count: Any = torch._C._storage_Use_Count

_origins: dict[int, _Origin] = {}  # by id of the unsharded parameter


class UnshardedChanges:
    """Carries what users set on the unsharded parameters of a model over to its shards.

    Args:
        modules: FSDP modules of the model by FQN.
        root: Root FSDP module, whose parameters users see unsharded outside of its children's forwards.
    """

    def __init__(self, modules: Iterable[FSDPModule], *, root: FSDPModule) -> None:
        _watch_parameters()
        self._groups: list[_GroupChanges] = []
        self._of_root: list[_Memory] = []
        self._addresses: set[int] = set()
        for module in modules:
            self._groups += [_GroupChanges(group, of_root=module is root) for group in _param_groups(module)]
            memory = [_Memory(p, of_root=module is root) for group in _param_groups(module) for p in group.fsdp_params]
            self._of_root += memory if module is root else []

    def write(self) -> None:
        """Write changes of parameters that are unsharded now to their shards; parameters stay unsharded."""
        for group in self._groups:
            if group.is_unsharded:
                group.write()

    def before_step(self, _optimizer: Any) -> None:
        """Write changes before the step of any optimizer."""
        self.write()

    def shown_in(self, values: Any) -> bool:
        """Whether tensors in ``values`` are unsharded parameters of the root itself, or views of them."""
        if not self._addresses:
            self._addresses = {address for memory in self._of_root for address in memory.addresses()}
        tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
        return any(not isinstance(t, DTensor) and t.untyped_storage()._cdata in self._addresses for t in tensors)


class _Memory:
    """The memory of an unsharded parameter, which stays while users hold the parameter, or a view of one of the root's.

    A forward may return a parameter, or keep it. FSDP2 would free the memory under the user's tensor. The next
    all-gather fills the same memory, so the tensor shows the weights of that moment. Views of a block's parameters are
    not looked for: autograd holds them from the block's forward until its backward.

    Args:
        parameter: FSDP2's record of the parameter.
        of_root: Whether the parameter is the root's own, which no backward holds when it is freed.
    """

    def __init__(self, parameter: FSDPParam, *, of_root: bool) -> None:
        self._views = of_root
        self._parameter = weakref.ref(parameter)
        self._storages: list[Any] = []  # of the parameter: none before the first all-gather
        self._own: list[int] = []  # references if no user holds the parameter
        self._free = parameter.free_unsharded_param
        parameter.free_unsharded_param = self._free_unless_held  # type: ignore[method-assign]
        parameter.init_unsharded_param = self._first_init  # type: ignore[method-assign]

    def addresses(self) -> list[int]:
        """Identities of the memory, as torch's storages have them."""
        return [storage._cdata for storage in self._storages]

    def _first_init(self) -> None:
        parameter: Any = self._parameter()
        del parameter.init_unsharded_param
        parameter.init_unsharded_param()
        self._storages = [output.untyped_storage() for output in parameter.all_gather_outputs]
        self._own = self._references(parameter)

    def _references(self, parameter: Any) -> list[int]:
        """References of users to the Python object of the parameter, and all to the memory of each tensor."""
        references = [sys.getrefcount(parameter._unsharded_param) - _held_by_torch(parameter._unsharded_param)]
        return references + [_use_count(storage._cdata) for storage in self._storages] if self._views else references

    def _free_unless_held(self) -> None:
        parameter: Any = self._parameter()
        if self._storages and any(map(gt, self._references(parameter), self._own)):
            return
        self._free()


def _held_by_torch(tensor: Any) -> bool:
    """Whether torch itself has a reference to the Python object of a tensor, [any]; newer torch does in a graph."""
    return hasattr(tensor, "_use_count") and tensor._use_count() > 1


class _GroupChanges:
    """The changes of one parameter group."""

    def __init__(self, group: FSDPParamGroup, *, of_root: bool) -> None:
        self._group = group
        self._of_root = of_root
        self._watched: list[tuple[FSDPParam, _Origin]] = []
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
            if type(unsharded) is nn.Parameter:  # no fake tensor of a rehearsal
                origin = _origins[id(unsharded)] = _Origin(parameter, group, unsharded, of_root=self._of_root)
                weakref.finalize(unsharded, _origins.pop, id(unsharded), None)
                self._watched.append((parameter, origin))
        del group._to_unsharded
        group._to_unsharded()

    def _to_sharded(self) -> None:
        group: Any = self._group
        if not group.is_sharded:
            self.write()
            for _, origin in self._watched:
                origin.before = None
            type(group)._to_sharded(group)

    def write(self) -> None:
        for parameter, origin in self._watched:
            unsharded = parameter._unsharded_param
            if unsharded._version != origin.version or origin.before is not None:
                origin.write_if_changed(unsharded)


class _Origin:
    """Where an unsharded parameter comes from, and whether users have touched it since its last write.

    Args:
        parameter: FSDP2's record of the parameter.
        group: Parameter group of it.
        unsharded: The unsharded parameter, equal to the shards now: [any].
        of_root: Whether the parameter is the root's own, whose gradients users see too.

    Attributes:
        version: Version of the unsharded parameter when it last equalled the shards.
        before: Values that it had then, [any], if its ``data`` was read or assigned since, which torch does not count.
    """

    def __init__(self, parameter: FSDPParam, group: FSDPParamGroup, unsharded: Tensor, *, of_root: bool) -> None:
        self._parameter = weakref.ref(parameter)
        self._group = weakref.ref(group)
        self.version = unsharded._version
        self.before: Tensor | None = None
        self.rounded = parameter.param_dtype is not None  # unsharded in a lower precision than the shard
        self._shows_grad = of_root

    def touch(self, values: Tensor) -> None:
        """Note that users may change ``values``, [any], in a way that torch does not count."""
        if self.before is None:
            self.before = values.clone()

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
    def shows_grad(self) -> bool:
        """Whether users see the gradient of the shard: not where FSDP2 collects gradients, and must see its own."""
        if not self._shows_grad:
            return False
        group = self._group()
        return group is not None and group._training_state != TrainingState.POST_BACKWARD

    def own_part(self, unsharded: Tensor) -> Tensor:
        """This rank's part, [shard], of an unsharded tensor, [any]."""
        parameter: Any = self._parameter()
        return own_shard(unsharded, parameter)

    @torch.no_grad()
    def write_if_changed(self, unsharded: Tensor) -> None:
        """Write the unsharded parameter, [any], to its shard if it has changed, which is the same on all ranks."""
        values, before = _data.__get__(unsharded), self.before
        changed = unsharded._version != self.version or not (before is None or torch.equal(values, before))
        self.version = unsharded._version
        if changed and self.rounded:
            self.before = None
            self.raise_rounded(values.dtype)
        if changed:
            self.shard._local_tensor.copy_(self.own_part(values))
            torch.autograd.graph.increment_version(self.shard)
        if before is not None:
            self._show_gathered(unsharded, values)
            before.copy_(values)
        if changed:
            self._let_gathers_wait()

    def _show_gathered(self, unsharded: Tensor, values: Tensor) -> None:
        """Go back to the memory that FSDP2 fills, if ``.data`` was assigned: ``values``, [any], stay the same."""
        parameter: Any = self._parameter()
        gathered = parameter.all_gather_outputs[0]
        if values.data_ptr() != gathered.data_ptr():
            gathered = gathered.as_strided(parameter._orig_size, parameter._contiguous_orig_stride, 0)
            with torch.autograd._unsafe_preserve_version_counter(gathered):  # type: ignore[attr-defined]
                gathered.copy_(values)
            _data.__set__(unsharded, gathered)

    def _let_gathers_wait(self) -> None:
        """Let the streams of FSDP2's all-gathers wait for what was written on this one."""
        group: Any = self._group()
        event = group.device_handle.Event()
        event.record()
        group._wait_all_gather_streams_on_event(event)

    def raise_rounded(self, dtype: torch.dtype) -> NoReturn:
        """Raise the error for a change that cannot be exact."""
        raise RuntimeError(
            f"parameter {self.name} was changed while it was unsharded in {dtype}, in a step or between it and its "
            f"backward, so the change would be rounded, and its shard is in {self.shard.dtype}; make it where the "
            "parameter is sharded: in on_train_batch_start, on_train_batch_end or on_before_optimizer_step, or in a "
            "loop of one's own after the backward"
        )


def _watch_parameters() -> None:
    """Let the attributes of ``nn.Parameter`` carry changes of unsharded parameters over to the shards."""
    if "data" in vars(nn.Parameter):
        return
    kind: Any = nn.Parameter
    kind.data = property(_get_data, _set_data)
    kind.grad = property(_get_grad, _set_grad, partial(_set_grad, value=None))
    kind.requires_grad = property(_requires_grad.__get__, _set_requires_grad)
    kind.requires_grad_ = _requires_grad_
    accept_sharded_operands(nn.Parameter)


def _get_data(parameter: nn.Parameter) -> Tensor:
    values: Tensor = _data.__get__(parameter)
    origin = _origins.get(id(parameter))
    if origin is None:
        return values
    origin.touch(values)
    reader = sys._getframe(1).f_globals.get("__name__", "")
    return values if reader.startswith("torch.") else values.as_subclass(_UnshardedData)  # torch compares classes


def _set_data(parameter: nn.Parameter, value: Tensor) -> None:
    origin = _origins.get(id(parameter))
    if origin is not None:
        if origin.rounded:
            origin.raise_rounded(parameter.dtype)
        _check_assigned(parameter, value, origin.name)
        origin.touch(_data.__get__(parameter))
        value = (value.full_tensor() if isinstance(value, DTensor) else value.detach()).as_subclass(Tensor)
    _data.__set__(parameter, value)


def _set_requires_grad(parameter: nn.Parameter, value: bool) -> None:
    _requires_grad.__set__(parameter, value)
    origin = _origins.get(id(parameter))
    if origin is not None and origin.shard is not None and origin.shard.requires_grad != value:
        origin.shard.requires_grad_(value)


def _requires_grad_(parameter: nn.Parameter, requires_grad: bool = True) -> nn.Parameter:
    _set_requires_grad(parameter, requires_grad)
    return parameter


def _get_grad(parameter: nn.Parameter) -> Tensor | None:
    own: Tensor | None = own_grad.__get__(parameter)
    if own is not None:
        return own
    origin = _origins.get(id(parameter))
    return origin.shard.grad if origin is not None and origin.shows_grad else None


def _set_grad(parameter: nn.Parameter, value: Tensor | None) -> None:
    origin = _origins.get(id(parameter))
    if origin is None or not origin.shows_grad:
        own_grad.__set__(parameter, value)
        return
    record: Any = origin._parameter()
    record.unsharded_accumulated_grad = None
    own_grad.__set__(parameter, None)
    if value is not None and not isinstance(value, DTensor):
        _check_assigned(origin.shard, value, f"{origin.name}.grad")
        value = record.to_sharded_dtensor(origin.own_part(value.detach()).clone())
    origin.shard.grad = value


@accept_sharded_operands
class _UnshardedData(Tensor):
    """What ``data`` of an unsharded parameter returns: a tensor with the same memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


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
