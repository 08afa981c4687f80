"""Copies of a sharded model, which ``copy.deepcopy`` cannot make."""

from __future__ import annotations

from typing import Any, NoReturn

from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch.fsdp import fsdp_modules


def reject_copies(root: FSDPModule) -> None:
    """Make ``copy.deepcopy`` of ``root``, or of a block, raise an error that says what to do instead."""
    for module in fsdp_modules(root).values():
        type(module).__deepcopy__ = _reject  # type: ignore[attr-defined]


def _reject(module: Any, _memo: Any) -> NoReturn:
    raise TypeError(
        f"{type(module).__name__.removeprefix('FSDP')} is sharded, and its hooks and process groups cannot be copied: "
        "copy it before it is sharded, in `__init__` or before `setup` or `prepare`, so that the copy is sharded too; "
        "or make a second model, shard it, and load it with `load_state_dict(model.state_dict())`"
    )
