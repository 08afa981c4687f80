"""The states of a rank's random number generators: torch on the CPU and on the rank's GPU, Python's and NumPy's.

They are tensors, one per generator, so that a checkpoint that holds them is read without running anything.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch
from torch import Tensor


def capture() -> dict[str, Tensor]:
    """The states of this rank's generators; that of the GPU only where CUDA is in use."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),  # uint8
        "python": torch.tensor([*words, torch.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position, has_gauss, cached], dtype=torch.float64),
    }  # a double holds each 32-bit word exactly
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: dict[str, Tensor]) -> None:
    """Go on drawing what :func:`capture` would have been followed by."""
    torch.set_rng_state(states["torch"])
    *words, gauss = states["python"].tolist()
    random.setstate((random.getstate()[0], tuple(map(int, words)), None if gauss != gauss else gauss))
    *keys, position, has_gauss, cached = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def branch(states: dict[str, Tensor], *, rank: int, world_size: int) -> None:
    """Seed this rank's generators from one rank's states, for a run that goes on with other ranks than it had.

    The seed is the SHA-256 of the states, the rank and the number of ranks: the same whenever the same checkpoint
    goes on at the same size, another on each rank.
    """
    digest = hashlib.sha256(f"{rank} of {world_size}".encode())
    for name in ("torch", "python", "numpy"):  # those that every machine has
        digest.update(states[name].numpy().tobytes())
    seed = digest.digest()
    torch.manual_seed(int.from_bytes(seed[:7], "big"))  # the GPU's too
    random.seed(seed)
    np.random.seed(np.frombuffer(seed, dtype=np.uint32))
