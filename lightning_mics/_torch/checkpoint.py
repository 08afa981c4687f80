"""Private names of torch that checkpoints need."""

from __future__ import annotations

from typing import IO

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict

from lightning_mics._torch.fake import FakeTensorMode

__all__ = ["locate_values", "unflatten_state_dict"]


def locate_values(stored: IO[bytes]) -> tuple[Tensor, int]:
    """Find the values of a tensor in a stream that ``torch.save`` has written, without reading them.

    Returns:
        A fake tensor of the stored shape, strides and dtype; and the byte of the stream at which its values begin.
    """
    with FakeTensorMode():
        tensor: Tensor = torch.load(stored, weights_only=True)
    begin = tensor.untyped_storage()._checkpoint_offset
    assert begin is not None  # it is set for tensors that come from a file
    return tensor, int(begin + tensor.storage_offset() * tensor.itemsize)
