"""Changes of weights, gradients and ``requires_grad`` that users make anywhere: on shards, and while unsharded."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch.dtensors.changes import accept_changes, calling_before_gradients
from lightning_mics._torch.fsdp import fsdp_modules
from lightning_mics._torch.optimizers.steps import call_before_steps
from lightning_mics._torch.unsharded import UnshardedChanges
from lightning_mics.sharding.accumulation_window import AccumulationWindow


def keep_changes(root: FSDPModule, mesh: DeviceMesh, window: AccumulationWindow) -> None:
    """Keep what users change on parameters of ``root``, sharded or not at that moment.

    A step of an optimizer changes shards, so what was changed on unsharded parameters is written to them before it. The
    model's ``zero_grad()`` drops pending gradients as well.

    Args:
        root: The sharded model.
        mesh: Device mesh of its parameters.
        window: Accumulation window of the model.
    """
    accept_changes(mesh)
    changes = vars(root)["_unsharded_changes"] = UnshardedChanges(fsdp_modules(root).values(), root=root)
    vars(root)["zero_grad"] = partial(_zero_grad, weakref.ref(root), weakref.ref(window))
    call_before_steps(changes.before_step)


def write_changes(root: FSDPModule) -> None:
    """Write changes of unsharded parameters of ``root`` to their shards now.

    Raises:
        RuntimeError: If they were changed in a lower precision than that of their shards.
    """
    changes: UnshardedChanges = vars(root)["_unsharded_changes"]
    changes.write()


def shows_unsharded(root: FSDPModule, outputs: Any) -> bool:
    """Whether tensors in ``outputs`` are unsharded parameters of the root itself, or views of them.

    Args:
        root: The sharded model.
        outputs: Tensors and other objects in any nest of lists, tuples and dictionaries.
    """
    changes: UnshardedChanges = vars(root)["_unsharded_changes"]
    return changes.shown_in(outputs)


@contextmanager
def reducing_when_read(window: AccumulationWindow) -> Iterator[None]:
    """Inside, reduce pending gradients when a ``.grad`` is read or set; every rank does so, or none.

    For code that runs after each backward, and changes the gradients so far. Before the boundary they are pending, and
    ``.grad`` is None. Runs that do not read it there reduce as ever.

    Args:
        window: Accumulation window of the model.
    """
    if window.at_boundary:
        yield
        return
    with calling_before_gradients(window.reduce_pending_gradients):
        yield


def _zero_grad(
    known: weakref.ref[Any], known_window: weakref.ref[AccumulationWindow], set_to_none: bool = True
) -> None:
    root, window = known(), known_window()
    if root is not None:
        type(root).zero_grad(root, set_to_none)
    if window is not None:
        window.drop_pending_gradients()
