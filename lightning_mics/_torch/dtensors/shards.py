"""DTensors of local values that stay on their device, also where it is not the mesh's."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta


def with_local(local: Tensor, *, like: DTensor) -> DTensor:
    """A tensor sharded as another one is. ``DTensor.from_local`` would move the values to the devices of the mesh.

    Args:
        local: Values of this rank: [own].
        like: Tensor of the same shape: [any].
    """
    meta = TensorMeta(like.shape, like.stride(), local.dtype)
    sharded: Any = DTensor
    made: DTensor = sharded(
        local, DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta), requires_grad=False
    )
    return made
