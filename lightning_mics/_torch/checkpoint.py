"""Private names of torch that checkpoints need."""

from __future__ import annotations

from typing import IO

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict

from lightning_mics._torch.fake import FakeTensorMode

__all__ = ["locate_values", "unflatten_state_dict"]


def locate_values(stored: IO[bytes]) -> tuple[Tensor, int]:
    """A tensor that ``torch.save`` has written, without its values, and the byte at which they begin."""
    with FakeTensorMode():
        tensor: Tensor = torch.load(stored, weights_only=True)
    begin = tensor.untyped_storage()._checkpoint_offset
    assert begin is not None  # which it is for what comes from a file
    return tensor, int(begin + tensor.storage_offset() * tensor.itemsize)
