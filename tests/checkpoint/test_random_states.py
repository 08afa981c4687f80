"""The states of random number generators as tensors."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mics.checkpoint import random_states


def draws() -> list[Any]:
    """Of every generator, and twice from those that keep a second Gaussian for the next call."""
    return [
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
        random.random(),
        random.gauss(0, 1),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.randn(),
        np.random.randn(),
        random.gauss(0, 1),
        np.random.randn(),
    ]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)


def test_every_generator_goes_on_where_it_was() -> None:
    draws()  # leaves a kept Gaussian behind in Python's and in NumPy's
    states = random_states.capture()
    expected = draws()
    assert draws() != expected
    random_states.restore(states)
    assert draws() == expected


def test_capturing_draws_nothing() -> None:
    states = random_states.capture()
    random_states.capture()
    expected = draws()
    random_states.restore(states)
    assert draws() == expected


def test_states_are_read_without_running_anything() -> None:
    states, file = random_states.capture(), io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert states.keys() == read.keys()
    expected = draws()
    random_states.restore(read)
    assert draws() == expected


def test_branches_differ_by_rank_and_by_number_of_ranks_and_come_again() -> None:
    states = random_states.capture()
    found = {}
    for rank, world_size in ((0, 2), (1, 2), (0, 8), (1, 8)):
        random_states.branch(states, rank=rank, world_size=world_size)
        found[rank, world_size] = draws()
    for index in range(len(draws())):
        assert len({str(each[index]) for each in found.values()}) == len(found)
    random_states.branch(states, rank=1, world_size=8)
    assert draws() == found[1, 8]
    draws()
    random_states.branch(random_states.capture(), rank=1, world_size=8)
    assert draws() != found[1, 8]


class _Accelerator:
    """A kind of device that is not CUDA, with a generator of its own."""

    def __init__(self) -> None:
        self.state = torch.arange(16, dtype=torch.uint8)

    def is_initialized(self) -> bool:
        return True

    def get_rng_state(self, _device: torch.device) -> torch.Tensor:
        return self.state.clone()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.state = state


def test_the_generator_of_any_kind_of_device_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Accelerator()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch, "get_device_module", lambda _device: device)
    states = random_states.capture()
    assert set(states) == {"torch", "python", "numpy", "xpu"}
    device.state = torch.zeros(16, dtype=torch.uint8)
    random_states.restore(states)
    assert device.state.tolist() == list(range(16))


def test_states_of_a_job_on_gpus_are_restored_without_one() -> None:
    states = {**random_states.capture(), "cuda": torch.zeros(16, dtype=torch.uint8)}
    expected = draws()
    random_states.restore(states)
    assert draws() == expected
