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
from torch.distributed.tensor import DTensor

from lightning_mics._torch.parameter_hooks import carry_over
from lightning_mics.collectives.control_plane import control_plane
from lightning_mics.sharding.blocks import group_modules
from lightning_mics.sharding.modules.initializers import init_weights_of, initialize
from lightning_mics.techniques.partition_groups import PartitionGroups

SUMMED_AT_ONCE = 2**22  # elements, as 64-bit integers, which take several times the parameter's memory
SUMMED_AT_ONCE_ON_CPU = 2**15  # what stays in a cache


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


@torch.no_grad()
def verify_replicas(model: nn.Module, groups: PartitionGroups) -> None:
    """Check that all replicas hold the same parameters, bit for bit; every rank calls it.

    Compares a checksum per parameter over the replication group.

    Args:
        model: The sharded model.
        groups: Process groups of this rank.

    Raises:
        RuntimeError: If they differ; the message names the first parameters that do.
    """
    if groups.topology.replicas == 1 or next(model.parameters(), None) is None:
        return
    names, shards = zip(*((name, _local(parameter)) for name, parameter in model.named_parameters()), strict=True)
    checksums = torch.stack([checksum(shard) for shard in shards])  # [parameters]
    of_replicas = [torch.empty_like(checksums) for _ in range(groups.topology.replicas)]
    dist.all_gather(of_replicas, checksums, group=groups.replication)
    same = (torch.stack(of_replicas) == checksums).all(dim=0)  # [parameters]
    # a rank whose own part agrees must raise with the others
    if groups.control.largest((~same.all()).int().cpu(), "compares replicas"):
        differing = [name for name, ok in zip(names, same.tolist(), strict=True) if not ok]
        raise RuntimeError(
            f"the replicas of the model differ in {len(differing)} of {len(names)} parameters that rank "
            f"{dist.get_rank()} holds a part of, for instance {differing[:3]}; they must be equal at all times"
        )


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


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def checksum(tensor: Tensor) -> Tensor:
    """The sum of all bit patterns, each weighted by its position: integers, so exact in any order of addition: [].

    Args:
        tensor: Tensor of any dtype: [any].
    """
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    bits = tensor.detach().contiguous().flatten().view(integer)
    at_once = SUMMED_AT_ONCE_ON_CPU if bits.device.type == "cpu" else SUMMED_AT_ONCE
    positions = torch.arange(1, min(at_once, bits.numel()) + 1, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), at_once):
        part = bits[start : start + at_once]
        total += (part * positions[: part.numel()]).sum() + start * part.sum()
    return total
