"""The accelerator of this process, of whatever kind it is."""

from __future__ import annotations

import torch


def device_in_use() -> torch.device | None:
    """The device that this thread of the process computes on, with its index; None while torch has initialized none.

    Asking initializes nothing: a process that only reads a checkpoint takes no memory of a device.
    """
    device = torch.accelerator.current_accelerator()
    if device is None or not torch.get_device_module(device).is_initialized():
        return None
    return torch.device(device.type, torch.accelerator.current_device_index())


def use_no_accelerator() -> None:
    """Tell torch that this forked process has no accelerator: each seed would be kept for it, with a stack."""
    for kind in ("cuda", "mtia", "xpu"):
        torch.get_device_module(kind)._is_in_bad_fork = _is_true


def _is_true() -> bool:
    return True
