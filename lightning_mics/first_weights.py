"""The first weights: the same on every replica, and never dependent on the number of ranks.

One unit (a block, or what is left for the root) is placed on the device at a time, whole, just before it is sharded:

* on the meta device: it is made there and initialised from the seed of rank 0, on every rank alike;
* built by the user: it is moved there, and the values of rank 0 are sent to all ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics.blocks import unit_modules
from lightning_mics.partition_groups import PartitionGroups

Initializer = Callable[[nn.Module], None]

CHECKSUM_CHUNK = 2**22  # elements at a time: the 64-bit integers take several times the parameter's memory


@contextmanager
def seeded_by_rank_0(device: torch.device) -> Iterator[None]:
    """Draw the same random numbers on every rank: those of rank 0's seed. Restores each rank's own state after."""
    seed = torch.tensor(torch.initial_seed(), dtype=torch.uint64).view(torch.int64).to(device)
    dist.broadcast(seed, src=0)
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(int(seed.cpu().view(torch.uint64).item()))
        yield


def initializers(model: nn.Module) -> dict[nn.Module, Initializer]:
    """For each module the ``_init_weights(module)`` of the nearest module around it, as in ``transformers``."""
    found: dict[nn.Module, Initializer] = {}

    def visit(module: nn.Module, inherited: Initializer | None) -> None:
        own = getattr(module, "_init_weights", None)
        nearest = own if _takes_one_module(own) else inherited
        if nearest is not None:
            found[module] = nearest
        for child in module.children():
            visit(child, nearest)

    visit(model, None)
    return found


@torch.no_grad()
def place_unit(unit: nn.Module, device: torch.device, initialize: dict[nn.Module, Initializer]) -> None:
    """Put the tensors of ``unit`` on ``device`` with their first values; every rank calls it.

    Args:
        unit: A block, or the root after its blocks were sharded.
        device: Where to.
        initialize: What :func:`initializers` found in the whole model.

    Raises:
        TypeError: If nothing initialises a tensor that was on the meta device.
    """
    modules = list(dict.fromkeys(unit_modules(unit)))
    fresh = [module for module in modules if any(tensor.is_meta for _, tensor in _own_tensors(module))]
    built = [tensor for module in modules for _, tensor in _own_tensors(module) if not tensor.is_meta]
    for tensor in dict.fromkeys(built):
        tensor.data = tensor.data.to(device).contiguous()
        dist.broadcast(tensor.data, src=0)
    _materialize(fresh, device)
    for module in fresh:
        _initialize(module, initialize.get(module))


@torch.no_grad()
def verify_replicas(model: nn.Module, groups: PartitionGroups) -> None:
    """Check that all replicas hold the same parameters, bit for bit; every rank calls it.

    Compares one 64-bit checksum per parameter over the replication group.

    Raises:
        RuntimeError: If they differ; the message names the first parameters that do.
    """
    if groups.topology.replicas == 1:
        return
    names, shards = zip(*((name, _local(parameter)) for name, parameter in model.named_parameters()), strict=True)
    checksums = torch.stack([_checksum(shard) for shard in shards])  # [parameters]
    of_replicas = [torch.empty_like(checksums) for _ in range(groups.topology.replicas)]
    dist.all_gather(of_replicas, checksums, group=groups.replication)
    same = (torch.stack(of_replicas) == checksums).all(dim=0)  # [parameters]
    # a rank whose own part agrees must raise with the others
    dist.all_reduce(agreed := same.all().int(), op=dist.ReduceOp.MIN)
    if not agreed:
        differing = [name for name, ok in zip(names, same.tolist(), strict=True) if not ok]
        raise RuntimeError(
            f"the replicas of the model differ in {len(differing)} of {len(names)} parameters that rank "
            f"{dist.get_rank()} holds a part of, for instance {differing[:3]}; they must be equal at all times"
        )


def _materialize(modules: list[nn.Module], device: torch.device) -> None:
    """Replace meta tensors by real ones full of NaN, tied ones by one."""
    made: dict[Tensor, Tensor] = {}
    for module in modules:
        for name, tensor in _own_tensors(module):
            if tensor.is_meta:
                made[tensor] = made[tensor] if tensor in made else _empty(tensor, device)
                setattr(module, name, made[tensor])


def _empty(meta: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(meta, device=device)
    if empty.is_floating_point():
        empty.fill_(torch.nan)  # so that a value that nothing sets is found
    if isinstance(meta, nn.Parameter):
        empty = nn.Parameter(empty, requires_grad=meta.requires_grad)
    empty.__dict__.update(meta.__dict__)
    return empty


def _initialize(module: nn.Module, owner: Initializer | None) -> None:
    before = {name: tensor._version for name, tensor in _own_tensors(module)}
    for method in ("reset_parameters", "_reset_parameters"):
        if callable(reset := getattr(module, method, None)):
            reset()
    if owner is not None:
        owner(module)
    for name, tensor in _own_tensors(module):
        untouched = bool(tensor.isnan().any()) if tensor.is_floating_point() else tensor._version == before.get(name)
        if untouched:
            raise TypeError(
                f"nothing initialises {type(module).__name__}.{name}, which was on the meta device: give the class a "
                "`reset_parameters()`, the model an `_init_weights(module)` that sets it, or build the model off the "
                "meta device"
            )


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _takes_one_module(method: object) -> bool:
    if not callable(method):
        return False
    try:
        inspect.signature(method).bind(object())
    except TypeError:
        return False
    return True


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _checksum(tensor: Tensor) -> Tensor:
    """A sum of all bit patterns, each weighted by its place: integers, so exact in any order of addition. []"""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(integer).flatten()
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), CHECKSUM_CHUNK):
        part = bits[start : start + CHECKSUM_CHUNK].long()
        total += (part * torch.arange(start + 1, start + 1 + part.numel(), device=bits.device)).sum()
    return total
