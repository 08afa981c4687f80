"""Initial weights of models on meta are set by what the program calls, and random numbers of shards are independent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics.policy.policy import Policy
from tests.support.beside_ddp import shard

WIDE = 64


class Uncalled(nn.Module):
    """Has an ``_init_weights`` that its class never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)  # type: ignore[no-any-return]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)


class Called(Uncalled):
    """Calls it when it is built, which on meta has no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.apply(self._init_weights)


class CalledByAnother(nn.Module):
    """Holds a model whose ``_init_weights`` it calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Uncalled()
        self.prepare(lambda: self.net.apply(self.net._init_weights))

    def prepare(self, what: Callable[[], Any]) -> None:
        what()


def with_own(model: nn.Module) -> nn.Module:
    """Put a ``reset_parameters`` on the modules themselves, as litgpt does."""

    def own(module: nn.Linear) -> None:
        nn.init.normal_(module.weight, std=0.5)
        nn.init.zeros_(module.bias)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters = partial(own, module)  # type: ignore[method-assign]
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], float, str]] = {
    "uncalled": (
        Uncalled,
        1 / (3 * WIDE) ** 0.5,
        "reset_parameters() of each module; not _init_weights of Uncalled, which its class does not call",
    ),
    "called": (Called, 0.02, "reset_parameters() of each module; then Called._init_weights"),
    "called by another": (CalledByAnother, 0.02, "reset_parameters() of each module; then Uncalled._init_weights"),
    "own": (lambda: with_own(Uncalled()), 0.5, "reset_parameters() of each module, 2 of which have one of their own"),
    "own and called": (lambda: with_own(Called()), 0.5, "of which have one of their own"),
}


def test_initial_weights_on_meta_are_those_the_program_would_have_set(run_shared):
    for result in run_shared(2, _initialize):
        assert {name: std for name, (std, _) in result.items()} == {
            name: pytest.approx(std, rel=0.1) for name, (_, std, _) in MODELS.items()
        }
        for name, (_, _, line) in MODELS.items():
            assert line in result[name][1]


def _initialize() -> dict[str, tuple[float, str]]:
    found = {}
    for name, (make, _, _) in MODELS.items():
        with torch.device("meta"):
            model = make()
        sharded = Policy().shard(model, precision="32-true", device=torch.device("cpu"), local_size=2)
        first: Any = next(model.parameters())
        (line,) = (row for row in sharded.report.splitlines() if row.strip().startswith("initial weights"))
        found[name] = (float(first.full_tensor().std()), line)
    return found


# -- random numbers in sharded weights ---------------------------------------------------------------------------------


def noise(weight: Tensor) -> None:
    weight.add_(torch.randn_like(weight), alpha=0.1)
    weight.mul_(1 + torch.rand_like(weight, dtype=torch.float32))


INITIALIZATIONS: dict[str, Callable[[Tensor], Any]] = {
    "normal": nn.init.normal_,
    "uniform": lambda weight: weight.uniform_(-1, 1),
    "xavier": nn.init.xavier_uniform_,
    "kaiming": nn.init.kaiming_normal_,
    "truncated": nn.init.trunc_normal_,
    "orthogonal": lambda weight: nn.init.orthogonal_(weight, gain=2),
    "identity": lambda weight: nn.init.eye_(weight),
    "sparse": lambda weight: nn.init.sparse_(weight, 0.3),
    "dropped rows": lambda weight: weight.bernoulli_(0.5),
    "exponential": lambda weight: weight.exponential_(),
    "noise": noise,
    "generator": lambda weight: weight.normal_(generator=torch.Generator().manual_seed(3)),
}


def test_random_changes_of_sharded_weights_are_those_of_one_process(run_shared):
    for differing in run_shared(4, _initialize_again):
        assert differing == []


def _initialize_again() -> list[str]:
    differing = []
    for name, change in INITIALIZATIONS.items():
        torch.manual_seed(0)
        plain, model = nn.Linear(9, 7), nn.Linear(9, 7)
        model.load_state_dict(plain.state_dict())
        shard(model, block_classes=[])
        for module in (plain, model):
            torch.manual_seed(5)
            with torch.no_grad():
                change(module.weight)
        weight: Any = model.weight
        if not torch.allclose(weight.full_tensor(), plain.weight, atol=1e-6):
            differing.append(name)
    return differing


def test_replicas_stay_equal_and_shards_independent(run_shared):
    shards = run_shared(4, _noise_of_shards)
    assert torch.equal(shards[0], shards[2])  # the replicas
    assert torch.equal(shards[1], shards[3])
    assert abs(float(torch.corrcoef(torch.stack([shards[0].flatten(), shards[1].flatten()]))[0, 1])) < 0.1


def _noise_of_shards() -> Tensor:
    model = nn.Linear(WIDE, WIDE)
    shard(model, block_classes=[])
    torch.manual_seed(1)
    weight: Any = model.weight
    with torch.no_grad():
        nn.init.normal_(weight)
    assert dist.get_world_size() == 4
    local: Tensor = weight.detach().to_local()
    return local
