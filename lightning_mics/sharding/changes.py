"""Changes of weights, gradients and ``requires_grad`` that users make anywhere: on shards, and while unsharded."""

from __future__ import annotations

import weakref
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_mics._torch.dtensor import accept_changes
from lightning_mics._torch.fsdp import fsdp_modules
from lightning_mics._torch.unsharded import UnshardedChanges


def keep_changes(root: FSDPModule, mesh: DeviceMesh) -> None:
    """Keep what users change on parameters of ``root``, sharded or not at that moment.

    A step of an optimizer changes shards, so what was changed on unsharded parameters is written to them before it.

    Args:
        root: The sharded model.
        mesh: Device mesh of its parameters.
    """
    accept_changes(mesh)
    changes = UnshardedChanges(fsdp_modules(root).values(), root=root)
    known = weakref.ref(changes)

    def before_step(*_: Any) -> None:
        if (alive := known()) is not None:
            alive.write()

    weakref.finalize(changes, register_optimizer_step_pre_hook(before_step).remove)
