"""The names and shards of a sharded model's parameters, by private names of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import _get_fqns
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_mics._torch.fsdp import _param_groups, fsdp_modules


def sharded_names(model: nn.Module) -> dict[int, str]:
    """The FQN of each sharded parameter by its ``id``, also while a module is unsharded, with all spellings of it.

    A tied parameter has its first name. Parameters of modules that are not sharded have theirs.
    """
    shards = {
        id(parameter._unsharded_param): parameter.sharded_param
        for parameter in _parameters(model)
        if hasattr(parameter, "_unsharded_param")
    }
    names: dict[int, str] = {}
    for spelled, parameter in model.named_parameters():
        (name,) = _get_fqns(model, spelled)
        for known in (parameter, shards.get(id(parameter), parameter)):
            names.setdefault(id(known), name)
    return names


def named_shards(model: nn.Module) -> dict[str, nn.Parameter]:
    """The sharded parameters by FQN, each [any], also while a module is unsharded."""
    shards = {
        id(parameter._unsharded_param): parameter.sharded_param
        for parameter in _parameters(model)
        if hasattr(parameter, "_unsharded_param")
    }
    found = {}
    for spelled, parameter in model.named_parameters():
        (name,) = _get_fqns(model, spelled)
        found[name] = shards.get(id(parameter), parameter)
    return found


def frozen_names(model: nn.Module) -> set[str]:
    """The FQNs of parameters that do not require gradients; tied ones under each name."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for spelled, p in named if not p.requires_grad for name in _get_fqns(model, spelled)}


def accept_whole_tensors(model: nn.Module) -> None:
    """Let ``load_state_dict`` of ``model``, and of any module in it, take unsharded tensors too.

    Each rank copies its own rows of a parameter; the tensor must be the same on all ranks. A module that renames
    entries as it loads has done so by then.

    Args:
        model: The sharded model.
    """
    for group, owner in _groups_with_owners(model):
        owner.register_load_state_dict_pre_hook(_Hook(_shard_entries, group))  # type: ignore[no-untyped-call]


def keep_unsharded_in_steps(model: nn.Module) -> None:
    """Let ``state_dict()`` inside of a forward show shards and leave the parameters unsharded for the rest of it.

    FSDP2 reshards a module whose ``state_dict`` is taken, also where its forward still needs the parameters. It does so
    by hooks, of the first forward and later, so those registered here run before.

    Args:
        model: The sharded model.
    """
    for group, owner in _groups_with_owners(model):
        owner.register_state_dict_pre_hook(_Hook(_show_shards, group))  # type: ignore[no-untyped-call]
        owner.register_state_dict_post_hook(_Hook(_show_parameters_again, group))  # type: ignore[no-untyped-call]


def _groups_with_owners(model: nn.Module) -> Iterator[tuple[Any, nn.Module]]:
    for module in fsdp_modules(model).values():
        for group in _param_groups(module):
            yield from ((group, owner) for owner in _owners_in(group))


class _Hook:
    """A hook of a module that knows the parameter group of the module; copies of the module keep it."""

    def __init__(self, function: Callable[..., None], group: Any) -> None:
        self._function, self._group = function, group

    def __call__(self, module: nn.Module, *args: Any) -> None:
        self._function(self._group, module, *args)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return self


def _show_shards(group: Any, module: nn.Module, *_: Any) -> None:
    if group._training_state != TrainingState.FORWARD:
        return
    for parameter in group.fsdp_params:
        if parameter.sharded_state == ShardedState.UNSHARDED and module in _owners(parameter):
            parameter._setattr_on_modules(parameter.sharded_param)
            group._sharded_state = ShardedState.SHARDED  # so that FSDP2's hook has nothing to do


def _show_parameters_again(group: Any, module: nn.Module, *_: Any) -> None:
    if group._training_state != TrainingState.FORWARD:
        return
    for parameter in group.fsdp_params:
        if parameter.sharded_state == ShardedState.UNSHARDED and module in _owners(parameter):
            parameter._setattr_on_modules(parameter._unsharded_param)
            group._sharded_state = ShardedState.UNSHARDED


def _owners_in(group: Any) -> list[nn.Module]:
    return list({id(owner): owner for parameter in group.fsdp_params for owner in _owners(parameter)}.values())


def _owners(parameter: Any) -> Iterator[nn.Module]:
    yield parameter._module_info.module
    yield from parameter._module_info.shared_modules


def _shard_entries(group: Any, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Shard the plain tensors in ``state`` that ``module`` itself takes for its parameters."""
    group._to_sharded()
    for name, parameter in module.named_parameters(recurse=False):
        value = state.get(prefix + name)
        if not isinstance(value, Tensor) or isinstance(value, DTensor):
            continue
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            state[prefix + name] = distribute_tensor(
                value.detach().to(parameter.device),
                parameter.device_mesh,
                parameter.placements,
                src_data_rank=None,
            )


def _parameters(model: nn.Module) -> Iterator[Any]:
    for module in fsdp_modules(model).values():
        assert isinstance(module, FSDPModule)
        for group in _param_groups(module):
            yield from group.fsdp_params
