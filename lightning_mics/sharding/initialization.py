"""Initial weights: the same on every replica, and independent of the number of ranks.

One parameter group (a block's, or the root's) is placed on the device at a time, unsharded, just before it is sharded:

* modules on the meta device are allocated there, and every rank initializes them from the seed of rank 0;
* modules with values are moved there, and rank 0 sends its values to all ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics._torch.parameter_hooks import carry_over
from lightning_mics.collectives.control_plane import control_plane
from lightning_mics.sharding.blocks import group_modules
from lightning_mics.sharding.modules.initializers import init_weights_of, initialize


@contextmanager
def seeded_by_rank_0(device: torch.device) -> Iterator[None]:
    """Draw the same random numbers on every rank: those of rank 0's seed. Restores each rank's own state afterwards."""
    seed = torch.tensor(torch.initial_seed(), dtype=torch.uint64).view(torch.int64)
    dist.broadcast(seed, src=0, group=control_plane().group)
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(seed.view(torch.uint64).item()))
        yield


class InitialWeights:
    """Puts the parameter groups of a model on the device, one at a time, with their initial values.

    Args:
        model: The model, not sharded yet.
        blocks: Blocks of the model, each a parameter group.
        device: Device of this rank.
    """

    def __init__(self, model: nn.Module, blocks: Collection[nn.Module], device: torch.device) -> None:
        self._blocks = set(blocks)
        self._device = device
        self._initializers = init_weights_of(model)
        self._made: dict[Tensor, Tensor] = {}  # from meta tensors to allocated ones, so that shared ones stay shared

    @torch.no_grad()
    def place(self, owner: nn.Module) -> None:
        """Put the parameter group of ``owner``, a block or the model, on the device; every rank calls it.

        Raises:
            TypeError: If nothing initializes a tensor that was on the meta device.
        """
        modules = list(dict.fromkeys(group_modules(owner, self._blocks)))
        # groups share buffers only; a reference to a parameter would keep its unsharded memory after it is sharded
        self._made = {meta: real for meta, real in self._made.items() if not isinstance(real, nn.Parameter)}
        for tensor in dict.fromkeys(tensor for module in modules for _, tensor in _own_tensors(module)):
            if not tensor.is_meta:
                tensor.data = tensor.data.to(self._device).contiguous()
                dist.broadcast(tensor.data.view(-1).view(torch.uint8), src=0)  # bytes: not all dtypes can be sent
        _check_registered(modules)
        fresh = {module for module in modules if any(tensor.is_meta for _, tensor in _own_tensors(module))}
        made = [entry for module in modules if module in fresh for entry in self._materialize(module)]
        for module in modules:  # children first, as a parent may change what its children set
            inside = set(module.modules())
            if module in fresh or (inside & fresh and not inside & (self._blocks - {owner})):
                initialize(module, self._initializers)
        for module, name, tensor, version in made:
            _check_initialized(module, name, tensor, version)

    def _materialize(self, module: nn.Module) -> list[tuple[nn.Module, str, Tensor, int]]:
        """Allocate the meta tensors of ``module``, full of NaN; return (module, name, tensor, version) of each."""
        made = []
        for name, tensor in _own_tensors(module):
            if not tensor.is_meta:
                continue
            if tensor not in self._made:
                self._made[tensor] = _empty(tensor, self._device)
                made.append((module, name, self._made[tensor], self._made[tensor]._version))
            setattr(module, name, self._made[tensor])
        return made


def _empty(meta: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(meta, device=device, memory_format=torch.contiguous_format)
    if empty.is_floating_point():
        empty.fill_(torch.nan)  # so that a value that nothing sets is found
    if isinstance(meta, nn.Parameter):
        empty = nn.Parameter(empty, requires_grad=meta.requires_grad)
    carry_over(meta, empty)
    return empty


def _check_registered(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise TypeError(
                    f"{type(module).__name__}.{name} is a tensor on the meta device and neither a parameter nor a "
                    "buffer, so nothing would initialize it; register it as a buffer"
                )


def _check_initialized(module: nn.Module, name: str, made: Tensor, version: int) -> None:
    now = getattr(module, name)
    unset = bool(now.isnan().any()) if now.is_floating_point() else now is made and made._version == version
    if unset:
        raise TypeError(
            f"nothing initializes {type(module).__name__}.{name}, which was on the meta device: give the class a "
            "`reset_parameters()`, the model an `_init_weights(module)` that sets it, or build the model off the "
            "meta device"
        )


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors of ``module`` itself with their names; a shared one is listed under each of its names."""
    return [
        *module.named_parameters(recurse=False, remove_duplicate=False),
        *module.named_buffers(recurse=False, remove_duplicate=False),
    ]
