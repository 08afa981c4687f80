"""States that an optimizer keeps in codes and scales, as 8-bit optimizers do.

A sharded checkpoint holds their values by rows, for any layout. Beside them it holds the inner tensors of each shard as
they are, as bytes under the shard's position: blocks of one scale do not end where other shards end, and values that
are quantized again may get other codes. A shard that has the same inner tensors takes the bytes, any other the values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_mics._torch.fsdp import has_inner_tensors
from lightning_mics.checkpoint.content.placing import local_part, positional
from lightning_mics.checkpoint.content.trial_step import state_after_a_trial_step

QUANTIZED_KEY = "mics_quantized"  # in the state of an optimizer: bytes of shards by position, or that there were any

DIGEST_BYTES = hashlib.sha256().digest_size


def is_quantized(value: Any) -> bool:
    """Whether ``value`` is a tensor, [any], that, or whose shard, keeps its values in another form."""
    return isinstance(value, Tensor) and type(local_part(value)).dequantize is not Tensor.dequantize


def dequantized(value: Tensor) -> Tensor:
    """The values of such a tensor, [any], sharded as it is."""
    if not isinstance(value, DTensor):
        return value.dequantize()
    return DTensor.from_local(
        value.to_local().dequantize(),
        value.device_mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


def position(like: DTensor) -> str:
    """The position of this rank's shards among those of its mesh, as a key.

    Args:
        like: A tensor that is sharded over the last axis of the mesh.
    """
    axis = like.device_mesh.ndim - 1
    return f"{like.device_mesh.get_local_rank(axis)}_of_{like.device_mesh.size(axis)}"


def inner_bytes(states: Mapping[tuple[str, ...], Any]) -> dict[str, DTensor]:
    """The inner tensors of this rank's shards as one tensor, [bytes], by its position; nothing if there are none.

    Args:
        states: Quantized tensors of one optimizer, each [any], by path.
    """
    shards = _shards(states)
    if not shards:
        return {}
    like: DTensor = states[next(iter(shards))]
    inner = [_as_bytes(tensor) for shard in shards.values() for tensor in _inner(shard).values()]
    digest = torch.frombuffer(bytearray(_digest(shards)), dtype=torch.uint8).to(inner[0].device)
    return {position(like): positional(torch.cat([digest, *inner]), like.device_mesh)}


def restore_inner(states: Mapping[tuple[str, ...], Any], stored: Tensor) -> bool:
    """Fill this rank's shards from what :func:`inner_bytes` has returned, if they are what it was given.

    Args:
        states: Quantized tensors of one optimizer, each [any], by path, changed in place.
        stored: Bytes at this rank's position, [bytes].

    Returns:
        Whether they are: the same paths, classes, shapes and options. Otherwise nothing is changed.
    """
    shards = _shards(states)
    if bytes(stored[:DIGEST_BYTES].tolist()) != _digest(shards):
        return False
    first = DIGEST_BYTES
    for shard in shards.values():
        for tensor in _inner(shard).values():
            part = stored[first : first + tensor.nbytes].clone()  # aligned
            tensor.copy_(part.view(tensor.dtype).view(tensor.shape))
            first += tensor.nbytes
    return True


def requantize(
    optimizer: Optimizer,
    key: str,
    *,
    groups: Sequence[Mapping[str, Any]],
    shards: Mapping[str, nn.Parameter],
    own_bytes: Tensor | None,
) -> None:
    """Give loaded states the form in which the optimizer keeps them; every rank calls it.

    Args:
        optimizer: The optimizer, with values as states.
        key: Key of the optimizer in the checkpoint.
        groups: Options of its groups, with the names of their parameters.
        shards: Parameters of the optimizer by name.
        own_bytes: Codes and scales at this rank's position, [bytes], to be taken if they fit; None if there are none.

    Raises:
        RuntimeError: If the optimizer cannot step by itself, so that the form is unknown.
    """
    loaded = {name: shard for name, shard in shards.items() if optimizer.state.get(shard)}
    tried = state_after_a_trial_step(optimizer, groups, loaded)
    if loaded and not tried:
        raise RuntimeError(
            f"{key} has quantized states in the checkpoint, and {type(optimizer).__name__} makes no state in a step by "
            "itself, so the checkpoint's values cannot be put into it"
        )
    quantized: dict[tuple[str, ...], Any] = {
        ("state", name, slot): own
        for name, slots in tried.items()
        for slot, own in slots.items()
        if is_quantized(own) and slot in optimizer.state[shards[name]]
    }
    is_restored = own_bytes is not None and restore_inner(quantized, own_bytes)
    for (_, name, slot), own in quantized.items():
        state = optimizer.state[shards[name]]
        if not is_restored:
            local_part(own).copy_(local_part(state[slot]))
        state[slot] = own


def _shards(states: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
    """The shards that have inner tensors, in the order of their paths."""
    sharded = {path: states[path] for path in sorted(states) if isinstance(states[path], DTensor)}
    return {path: value.to_local() for path, value in sharded.items() if has_inner_tensors(value.to_local())}


def _inner(shard: Any) -> dict[str, Tensor]:
    names, _ = shard.__tensor_flatten__()
    return {name: getattr(shard, name).detach() for name in names}


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _digest(shards: Mapping[tuple[str, ...], Any]) -> bytes:
    """Digest of all that the bytes of inner tensors do not say: whose they are, and their shapes and options."""
    described = [
        (
            path,
            f"{type(shard).__module__}.{type(shard).__qualname__}",
            tuple(shard.shape),
            [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in _inner(shard).items()],
            repr(shard.__tensor_flatten__()[1]),
        )
        for path, shard in shards.items()
    ]
    return hashlib.sha256(repr(described).encode()).digest()
