"""Gradient hooks and attributes that users put on parameters act as under DDP, or as in one process."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.utils import parametrizations, prune

from tests.support.beside_ddp import OPTIONS, largest_gap, rank_inputs, shard, train


class Block(nn.Module):
    """A residual block of two layers, with uneven rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:  # [samples, 4] -> same
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Blocks between two layers of the root, one of which is tied to a third."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:  # [samples, 4] -> same
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


# -- hooks on gradients ------------------------------------------------------------------------------------------------


def mask_and_clip(net: nn.Module) -> Any:
    net.first.weight.register_hook(lambda grad: grad * torch.tensor([0.0, 1.0, 1.0, 1.0]))
    net.blocks[0].up.weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    net.blocks[0].up.weight.register_hook(lambda grad: grad * 2)
    net.blocks[1].down.bias.register_hook(lambda grad: grad.sign() * 0.1)
    return net


def remove_one(net: nn.Module) -> Any:
    kept = net.blocks[0].up.weight
    removed = kept.register_hook(lambda grad: grad * 0)
    kept.register_hook(lambda grad: grad * 3)
    net.remove = removed.remove
    return net


def with_hooks(change: Any) -> nn.Module:
    net: nn.Module = change(Net())
    return net


def on_meta() -> nn.Module:
    torch.manual_seed(1)
    with torch.device("meta"):
        return mask_and_clip(Net())


def count_all_gradients(net: Net) -> Any:
    """Scales the gradients of the next step by a norm over several parameters, which one hook sees together."""
    net.norms = []
    watched = [net.first.weight, net.blocks[0].up.weight, net.blocks[1].down.bias]
    register_multi_grad_hook(watched, lambda grads: net.norms.append(sum(g.square().sum() for g in grads)))
    watched[0].register_hook(lambda grad: grad * (1 + net.norms[-1]) if net.norms else grad)
    return net


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # by name: the model's maker, `prepare`, options of the loop
    "in the constructor": (partial(with_hooks, mask_and_clip), lambda net: None, {}),
    "accumulating": (partial(with_hooks, mask_and_clip), lambda net: None, {"accumulate": 2}),
    "after sharding": (Net, mask_and_clip, {}),
    "removed after sharding": (partial(with_hooks, remove_one), lambda net: net.remove(), {}),
    "of several parameters": (partial(with_hooks, count_all_gradients), lambda net: None, {}),
    "of several parameters, after sharding": (Net, count_all_gradients, {}),
}


def _gaps(case: str, modes: list[str]) -> dict[str, float]:
    make, prepare, options = CASES[case]
    options = {"prepare": prepare, "steps": 2, **options}  # the first may change what the second's hooks do
    by_ddp = train(make, "ddp", **options)
    return {mode: largest_gap(by_ddp, train(make, mode, **options)) for mode in modes}


@pytest.mark.parametrize("case", CASES)
def test_gradient_hooks_change_each_ranks_own_gradients_as_under_ddp(run_shared, case):
    modes = list(OPTIONS) if case == "accumulating" else ["every"]
    for gaps in run_shared(4 if case == "accumulating" else 2, _gaps, case, modes):
        assert gaps == dict.fromkeys(modes, pytest.approx(0, abs=1e-6))


def test_gradient_hooks_of_a_model_on_meta_run(run_shared):
    for changed in run_shared(2, _train_on_meta):
        assert changed["masked column"] == 0
        assert changed["other columns"] > 0


def _train_on_meta() -> dict[str, float]:
    before: dict[str, Tensor] = {}

    def note(net: Any) -> None:
        before["first"] = net.first.weight.full_tensor().clone()

    after = train(on_meta, "every", prepare=note, steps=1)["first.weight"]
    moved = (after - before["first"]).abs()
    return {"masked column": float(moved[:, 0].max()), "other columns": float(moved[:, 1:].max())}


def test_a_hook_registered_in_the_middle_of_training_runs_from_the_next_backward_on(run_shared):
    for counts in run_shared(2, _register_late):
        assert counts == [0, 1, 2, 3, 3]


def _register_late() -> list[int]:
    net = Net()
    shard(net)
    seen: list[int] = []
    counts = []
    for step in range(5):
        net(rank_inputs(step)).sum().backward()
        counts.append(len(seen))
        if step == 0:
            handle = net.blocks[0].up.weight.register_hook(lambda grad: seen.append(1))
        if step == 3:
            handle.remove()
    return counts


# -- hooks on accumulated gradients ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stepped_in_hooks(run_shared):
    return run_shared(4, _step_in_hooks)


@pytest.mark.parametrize("mode", OPTIONS)
def test_hooks_on_accumulated_gradients_run_once_per_window_with_the_mean_over_ranks(stepped_in_hooks, mode):
    for facts in stepped_in_hooks:
        assert facts[mode]["calls"] == 2 * len(list(Net().parameters()))
        assert facts[mode]["gap"] < 1e-6


def _step_in_hooks() -> dict[str, dict[str, Any]]:
    by_ddp = train(Net, "ddp", accumulate=2, steps=2)
    return {mode: _step_in_hooks_of(mode, by_ddp) for mode in OPTIONS}


def _step_in_hooks_of(mode: str, by_ddp: dict[str, Tensor]) -> dict[str, Any]:
    calls: list[int] = []

    def step(parameter: Tensor) -> None:
        calls.append(1)
        with torch.no_grad():
            parameter.add_(parameter.grad, alpha=-0.1)  # type: ignore[arg-type]
        parameter.grad = None

    def make() -> nn.Module:
        net = Net()
        for parameter in net.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        return net

    gap = largest_gap(by_ddp, train(make, mode, accumulate=2, steps=2))
    return {"calls": len(calls), "gap": gap}


def test_a_model_whose_parameters_have_hooks_is_freed(run_shared):
    assert run_shared(2, _freed) == [["every", "rank", "alone"]] * 2


def _freed() -> list[str]:
    def hooked() -> nn.Module:
        net = Net()
        models.append(weakref.ref(net))
        for parameter in net.parameters():
            parameter.register_hook(lambda grad: grad)
            parameter.register_post_accumulate_grad_hook(lambda p: None)
        return net

    freed = []
    for mode in ("every", "rank", "alone"):
        models: list[Any] = []
        train(hooked, mode, accumulate=2)
        gc.collect()
        if models[0]() is None:
            freed.append(mode)
    return freed


# -- attributes --------------------------------------------------------------------------------------------------------


def test_attributes_of_parameters_stay_sharded_and_unsharded(run_shared):
    assert run_shared(2, _attributes) == [["norms", "norms", "norms", "norms", True]] * 2


def _attributes() -> list[Any]:
    with torch.device("meta"):
        net = Net()
    net.first.weight.optim_group = net.blocks[0].up.bias.optim_group = "norms"
    net.blocks[1].up.weight._no_weight_decay = True
    shard(net)
    net.to("cpu")  # as integrations do, for state besides parameters
    sharded = [net.last.weight.optim_group, net.blocks[0].up.bias.optim_group]
    net(rank_inputs(0)).sum()  # the root stays unsharded
    net.blocks[0].unshard()
    unsharded = [net.last.weight.optim_group, net.blocks[0].up.bias.optim_group]
    return [*sharded, *unsharded, net.blocks[1].up.weight._no_weight_decay]


class Scale(nn.Parameter):
    """A class of parameters that a program tells from others."""


def test_classes_of_parameters_are_still_told_apart(run_shared):
    assert run_shared(2, _told_apart) == [[True, False, True, True, True]] * 2


def _told_apart() -> list[bool]:
    net = Net()
    net.blocks[0].up.bias = Scale(net.blocks[0].up.bias.detach())
    net.last.bias = Scale(net.last.bias.detach())
    schedule = shard(net)
    net.to("cpu")
    sharded = [isinstance(net.blocks[0].up.bias, Scale), isinstance(net.blocks[0].up.weight, Scale)]
    with schedule.micro_step(boundary=True):
        net(rank_inputs(0)).sum().backward()
    net(rank_inputs(0)).sum()  # the root stays unsharded
    return [
        *sharded,
        isinstance(net.last.bias, Scale),
        isinstance(net.last.bias, nn.Parameter),
        net.first.bias.requires_grad,
    ]


def test_a_hook_registered_between_forward_and_backward_runs_in_this_backward(run_shared):
    assert run_shared(2, _register_before_backward) == [[0.0, 0.0, 1.0]] * 2


def _register_before_backward() -> list[float]:
    net = Net()
    schedule = shard(net)
    reduced: list[Tensor] = []
    with schedule.micro_step(boundary=False):
        loss = net(rank_inputs(0)).sum()
        net.blocks[1].up.weight.register_hook(lambda grad: grad * 0)
        net.last.bias.register_hook(lambda grad: grad * 0)
        net.blocks[0].up.bias.register_post_accumulate_grad_hook(reduced.append)
        loss.backward()
    with schedule.micro_step(boundary=True):
        net(rank_inputs(1)).sum().backward()
    masked: list[Any] = [net.blocks[1].up.weight.grad, net.last.bias.grad]
    return [*(float(grad.full_tensor().abs().max()) for grad in masked), float(len(reduced))]


# -- modules whose weights are computed --------------------------------------------------------------------------------


def _reparametrized(change: Any) -> nn.Module:
    net = Net()
    for layer in (net.blocks[0].up, net.blocks[1].down):
        change(layer)
    return net


CHANGES = {
    "prune, by magnitude": partial(prune.l1_unstructured, name="weight", amount=0.5),
    "prune, at random": partial(prune.random_structured, name="weight", amount=1, dim=0),
    "weight_norm": parametrizations.weight_norm,
    "weight_norm, old": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm, old": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_pruned_and_reparametrized_layers_train_as_under_ddp(run_shared):
    for gaps in run_shared(2, _reparametrized_gaps):
        assert gaps == dict.fromkeys(CHANGES, pytest.approx(0, abs=1e-5))


def _reparametrized_gaps() -> dict[str, float]:
    gaps = {}
    for name, change in CHANGES.items():
        make = partial(_reparametrized, change)
        gaps[name] = largest_gap(train(make, "ddp", steps=1), train(make, "every", steps=1))
    return gaps
