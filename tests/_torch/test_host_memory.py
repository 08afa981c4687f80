"""Saved tensors on the host: what goes there, when it is fetched, and what bounds it."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mics._torch import host_memory
from lightning_mics._torch.host_memory import HostMemoryError, SavedOnHost, host_memory_bytes
from lightning_mics.sharding.activation_checkpointing import inputs_on_host, recompute_in_backward

BLOCKS, SHAPE = 4, (3, 8)


class Block(nn.Module):
    """A block that takes its hidden states by position, or by name, beside a mask that all blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SHAPE[1], SHAPE[1])

    def forward(self, hidden: Tensor, *, mask: Tensor, scale: float = 1.0) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden * mask)) * scale


class Blocks(nn.Module):
    def __init__(self, *, by_name: bool) -> None:
        super().__init__()
        self.first = nn.Linear(SHAPE[1], SHAPE[1])
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.by_name = by_name

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = block(hidden=hidden, mask=mask) if self.by_name else block(hidden, mask=mask, scale=1.0)
        return hidden.square().mean()


def made(on_host: SavedOnHost | None, *, by_name: bool = False) -> Blocks:
    torch.manual_seed(0)
    model = Blocks(by_name=by_name)
    recompute_in_backward(model.blocks, on_host=on_host)
    return model


def batch() -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, 24).view(SHAPE), torch.tensor([1.0, 0.0] * 4)


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to inputs of blocks, in order; they are numbered as they are saved."""
    happened: list[str] = []
    numbers: dict[int, int] = {}
    of_class = host_memory._OnHost
    init, fetch, take = of_class.__init__, of_class.fetch, of_class.take

    def saved(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        numbers[id(self)] = len(numbers)
        happened.append(f"save {numbers[id(self)]}")

    def fetched(self: Any) -> None:
        if self._fetched is None:
            happened.append(f"fetch {numbers[id(self)]}")
        fetch(self)

    def taken(self: Any) -> Tensor:
        values = take(self)
        happened.append(f"take {numbers[id(self)]}")
        return values

    monkeypatch.setattr(of_class, "__init__", saved)
    monkeypatch.setattr(of_class, "fetch", fetched)
    monkeypatch.setattr(of_class, "take", taken)
    return happened


@pytest.mark.parametrize("by_name", [False, True], ids=["by position", "by name"])
def test_each_input_is_fetched_while_the_block_after_it_is_recomputed(by_name: bool, moves: list[str]) -> None:
    made(SavedOnHost(), by_name=by_name)(*batch()).backward()
    backward = ["fetch 3", "fetch 2", "take 3", "fetch 1", "take 2", "fetch 0", "take 1", "take 0"]
    assert moves == [*(f"save {number}" for number in range(BLOCKS)), *backward]


@pytest.mark.parametrize("by_name", [False, True], ids=["by position", "by name"])
def test_losses_and_gradients_are_the_same_bits(by_name: bool) -> None:
    found = []
    for on_host in (None, SavedOnHost()):
        model = made(on_host, by_name=by_name)
        losses = []
        for _ in range(2):
            losses.append(model(*batch()))
            losses[-1].backward()
        found.append([*losses, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_two_forwards_before_their_backwards_and_a_backward_that_runs_twice_are_right(moves: list[str]) -> None:
    plain, moved = made(None), made(SavedOnHost())
    for model in (plain, moved):
        one, other = model(*batch()), model(-batch()[0], batch()[1])
        one.backward(retain_graph=True)
        one.backward()
        other.backward()
    assert moves.count("take 0") == 2
    for one, other in zip(plain.parameters(), moved.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_the_layout_of_an_input_is_kept() -> None:
    values = torch.arange(24.0).view(2, 3, 4).transpose(0, 2).requires_grad_()
    seen = []
    with SavedOnHost().saving([values]):
        product = values * values
    product.grad_fn.register_prehook(lambda _: seen.append(product.grad_fn._saved_self.stride()))
    product.sum().backward()
    assert seen == [values.stride()]
    assert torch.equal(values.grad, 2 * values)


class InPlace(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.mul_(2).tanh()


def test_a_block_that_changes_its_input_in_place_is_rejected_as_it_is_without_the_host() -> None:
    for on_host in (None, SavedOnHost(what="activation_offload=True: inputs")):
        block = InPlace()
        recompute_in_backward([block], on_host=on_host)
        with pytest.raises(RuntimeError, match=r"changes its input in place|modified by an inplace operation"):
            block(torch.ones(3, requires_grad=True) * 1).sum().backward()


def test_a_forward_without_gradients_moves_nothing(moves: list[str]) -> None:
    with torch.no_grad():
        made(SavedOnHost())(*batch())
    assert moves == []


def test_what_is_too_large_for_the_host_is_an_error_that_names_the_option() -> None:
    size = 4 * SHAPE[0] * SHAPE[1]
    made(SavedOnHost(limit_bytes=BLOCKS * size))(*batch()).backward()
    on_host = SavedOnHost(limit_bytes=BLOCKS * size - 1, what="activation_offload=True: inputs")
    with pytest.raises(HostMemoryError, match=r"activation_offload=True: inputs take more than .* smaller micro-batch"):
        made(on_host)(*batch())
    gc.collect()
    assert on_host._size_bytes == 0  # what a failed forward has saved is given back


def test_the_limit_holds_for_each_micro_step_and_not_for_their_sum() -> None:
    model = made(SavedOnHost(limit_bytes=BLOCKS * 4 * SHAPE[0] * SHAPE[1]))
    for _ in range(3):
        model(*batch()).backward()


def test_offloading_without_recomputation_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"no block is recomputed: set activation_checkpointing=True"):
        inputs_on_host([])


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/job/task", {"job/task/memory.max": "1000", "job/memory.max": "max"}, 1000),
        ("0::/job/task", {"job/task/memory.max": "max", "job/memory.max": "2000"}, 2000),
        ("0::/elsewhere", {"memory.max": "3000"}, 3000),
        ("4:memory:/job", {"memory/job/memory.limit_in_bytes": "4000"}, 4000),
        ("4:cpu,cpuacct:/job", {"cpu/job/memory.limit_in_bytes": "5000"}, None),
        ("0::/job", {"job/memory.max": "max"}, None),
    ],
    ids=["its own limit", "its parent's", "a container's root", "version 1", "another controller", "none"],
)
def test_limits_of_control_groups_are_honored(
    lines: str, files: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    read_text = Path.read_text

    def read(path: Path, *args: Any) -> str:
        return lines + "\n" if str(path) == "/proc/self/cgroup" else read_text(path, *args)

    monkeypatch.setattr(Path, "read_text", read)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host_memory_bytes(tmp_path) == (expected or machine)
