"""Private names of torch that checkpoints need."""

from __future__ import annotations

from typing import IO

import torch
import torch.distributed.tensor.debug
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.tensor import DTensor

from lightning_mics._torch.fake import FakeTensorMode

__all__ = ["locate_values", "own_slices", "unflatten_state_dict"]


def own_slices(tensor: DTensor) -> tuple[slice, ...]:
    """Where this rank's part is in the whole ``tensor``: a slice for each of its dimensions."""
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]  # as its own checkpoints have it
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


def locate_values(stored: IO[bytes]) -> tuple[Tensor, int]:
    """A tensor that ``torch.save`` has written, without its values, and the byte at which they begin."""
    with FakeTensorMode():
        tensor: Tensor = torch.load(stored, weights_only=True)
    begin = tensor.untyped_storage()._checkpoint_offset
    assert begin is not None  # which it is for what comes from a file
    return tensor, int(begin + tensor.storage_offset() * tensor.itemsize)
