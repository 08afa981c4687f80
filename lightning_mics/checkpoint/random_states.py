"""The states of a rank's random number generators: torch's on the CPU and on the rank's device, Python's and NumPy's.

They are captured as tensors, one per generator, so that a checkpoint with them is read without running code.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch
from torch import Tensor

from lightning_mics._torch.accelerator import device_in_use

EVERYWHERE = ("torch", "python", "numpy")  # the generators that every machine has


def capture() -> dict[str, Tensor]:
    """The states of this rank's generators by name, each [values], uint8 or float64.

    The generator of a device, such as a GPU, has the name of the device's type; it is there if the device is in use.
    """
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),  # uint8
        "python": torch.tensor([*words, torch.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position, has_gauss, cached], dtype=torch.float64),
    }  # a double holds each 32-bit word exactly
    if device := device_in_use():
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def restore(states: dict[str, Tensor]) -> None:
    """Set this rank's generators to the states that :func:`capture` has returned."""
    torch.set_rng_state(states["torch"])
    *words, gauss = states["python"].tolist()
    random.setstate((random.getstate()[0], tuple(map(int, words)), None if gauss != gauss else gauss))
    *keys, position, has_gauss, cached = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type in states:
        torch.get_device_module(accelerator).set_rng_state(states[accelerator.type])


def branch(states: dict[str, Tensor], *, rank: int, world_size: int) -> None:
    """Seed this rank's generators from one rank's states, for a run that resumes on another number of ranks.

    The seed is the SHA-256 of the states, the rank and the number of ranks: the same whenever the same checkpoint
    resumes on the same number of ranks, and different on each rank.

    Args:
        states: States of one rank, from :func:`capture`.
        rank: This rank.
        world_size: Number of ranks that resume.
    """
    digest = hashlib.sha256(f"{rank} of {world_size}".encode())
    for name in EVERYWHERE:
        digest.update(states[name].numpy().tobytes())
    seed = digest.digest()
    torch.manual_seed(int.from_bytes(seed[:7], "big"))  # on the GPU as well
    random.seed(seed)
    np.random.seed(np.frombuffer(seed, dtype=np.uint32))
