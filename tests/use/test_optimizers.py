"""Optimizers on sharded parameters: the weights of one process, or an error before training that says what to use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from lightning_mics._torch.collective_operations import collective_of
from lightning_mics.collectives.traffic import sent_by
from tests.support.accelerators import start as start_accelerate
from tests.support.fits import refusal, whole_weights
from tests.support.loops import network, start
from tests.support.models import OneBlock, TinyModule, loader_of_tokens, tokens
from tests.support.trainers import cases_on_ranks, make_trainer, mics

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"
RANKS, STEPS = 2, 2


class Own(Optimizer):
    """Scales the columns of its momentum, which needs all rows."""

    needs_whole_parameters = True

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["momentum"] = state.get("momentum", torch.zeros_like(p)) * 0.9 + p.grad
                rows = state["momentum"].reshape(p.shape[0], -1)
                p.sub_((rows / (rows.norm(dim=0) + 0.1)).view_as(p), alpha=group["lr"])


class Parts:
    """Of an update that scales the columns of its momentum."""

    def of_rows(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        state["steps"] = state.get("steps", 0) + 1
        state["momentum"] = state.get("momentum", torch.zeros_like(gradient)) * 0.9 + gradient / state["steps"]
        return state["momentum"]

    def of_matrix(self, update: Tensor, group: dict[str, Any]) -> Tensor:
        assert update.shape in {p.shape for p in network().parameters()}  # it sees matrices of the model alone
        return update / (update.norm(dim=0) + 0.1)

    def apply(self, weights: Tensor, update: Tensor, group: dict[str, Any], shape: torch.Size) -> None:
        weights.sub_(update, alpha=group["lr"] * shape[0] ** 0.5)

    def flops(self, height: int, width: int, _: dict[str, Any]) -> float:
        return 2 * height * width


class OwnParts(Optimizer):
    """An optimizer of one's own in these parts, and plain descent for what is no matrix."""

    matrix_update = Parts()

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() == 2:
                    update = self.matrix_update.of_rows(p.grad, self.state[p], group)
                    self.matrix_update.apply(p, self.matrix_update.of_matrix(update, group), group, p.shape)
                else:
                    p.sub_(p.grad, alpha=group["lr"])


class Sam(Optimizer):
    """Two gradients per step, the second at the worst point nearby; the step is another optimizer's."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)

    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in parameters]).norm().item()
            climbs = [p.grad * (0.05 / norm) for p in parameters]
            torch._foreach_add_([p.data for p in parameters], climbs)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            torch._foreach_sub_([p.data for p in parameters], climbs)
        self.base.step()


class Lamb(Optimizer):
    """Scales each update by the ratio of two norms."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * p.norm().item() / (p.grad.norm().item() + 1e-3))


def of_torch(name: str, model: nn.Module, **options: Any) -> Optimizer:
    return getattr(torch.optim, name)(model.parameters(), **{"lr": 0.01, **options})


MAKE: dict[str, Callable[[nn.Module], Optimizer]] = {
    f"`torch.optim.{name}`": partial(of_torch, name)
    for name in (
        "ASGD",
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "Rprop",
        "SGD",
        "SparseAdam",
    )
} | {
    "`torch.optim.LBFGS`": lambda m: torch.optim.LBFGS(
        m.parameters(), max_iter=3, history_size=2, line_search_fn="strong_wolfe"
    ),
    "`torch.optim.Muon`": lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.01),
    "`torch.optim.RMSprop`": partial(of_torch, "RMSprop", lr=1e-3, eps=1e-3),
    "`transformers.Adafactor`": lambda m: transformers.Adafactor(m.parameters(), beta1=0.9, weight_decay=0.1),
    "LAMB, of your own": lambda m: Lamb(m.parameters()),
    "SAM around SGD, of your own": lambda m: Sam(m.parameters()),
    "one with `needs_whole_parameters = True`": lambda m: Own(m.parameters()),
    "one with `matrix_update`": lambda m: OwnParts(m.parameters()),
    "`ZeroRedundancyOptimizer`": lambda m: ZeroRedundancyOptimizer(m.parameters(), torch.optim.SGD, lr=0.1),
}


def train(optimizer: Optimizer, backward: Callable[[], Tensor], steps: int = STEPS) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward()

    for _ in range(steps):
        if isinstance(optimizer, torch.optim.LBFGS | Sam):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def alone(make: Callable[[nn.Module], Optimizer]) -> dict[str, Tensor]:
    model = network()

    def backward() -> Tensor:
        loss = sum(model(tokens(2, seed=rank)) for rank in range(RANKS)) / RANKS
        loss.backward()
        return loss

    train(make(model), backward)
    return whole_weights(model)


class Sent(TorchDispatchMode):
    """Bytes that this rank sends to other nodes, as rings and pairs send them, in groups other than the control's."""

    def __init__(self, nodes: Sequence[int], control: Any) -> None:
        super().__init__()
        self.nodes, self.control, self.sent_bytes = nodes, control, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        found = collective_of(func, args)
        if found is not None and found.group != self.control:
            size = found.dtype.itemsize
            sent = sent_by(
                found.kind,
                found.elements * size,
                nodes=self.nodes,
                position=found.group.rank(),
                gloo=True,
                sizes_bytes=[size * elements for elements in found.sizes],
            )
            self.sent_bytes += sent.between_bytes
        return func(*args, **(kwargs or {}))


def sent_between_nodes(name: str) -> tuple[float, float]:
    """Bytes that this rank, which is a node, sends in a later step: as counted, and as operations show."""
    model = network()
    topology = Topology(world_size=RANKS, ranks_per_node=1, partition_size=RANKS)
    groups = create_partition_groups(topology, device_type="cpu")
    schedule = shard_model(model, groups, communication=CommunicationOptions.NODE)
    optimizer = MAKE[name](model)
    schedule.optimizer_hooks.adopt(optimizer)

    def backward() -> Tensor:
        with schedule.micro_step(boundary=True):
            loss = model(tokens(2, seed=torch.distributed.get_rank()))
            loss.backward()
        return loss

    train(optimizer, backward)
    before = counted(schedule)
    with Sent(range(RANKS), groups.control._group) as sent:
        train(optimizer, backward, steps=1)
    return counted(schedule) - before, sent.sent_bytes


def counted(schedule: Any) -> float:
    return sum(each.between_bytes for each in schedule.traffic.by_technique().values())


def sharded(name: str, ranks_per_node: int = RANKS) -> Any:
    """The weights after training, or the message of the error that came before."""
    model = network()
    topology = Topology(world_size=RANKS, ranks_per_node=ranks_per_node, partition_size=RANKS)
    options = CommunicationOptions(cache_parameters="rank", accumulate_gradients="rank")
    schedule = shard_model(model, create_partition_groups(topology, device_type="cpu"), communication=options)
    rank = torch.distributed.get_rank()

    def backward() -> Tensor:
        with schedule.micro_step(boundary=True):
            loss = model(tokens(2, seed=rank))
            loss.backward()
        return loss

    def run() -> None:
        optimizer = MAKE[name](model)
        schedule.optimizer_hooks.adopt(optimizer)
        train(optimizer, backward)

    message = refusal(run)
    return whole_weights(model) if message == "nothing was refused" else message


class OfTheModule(TinyModule):
    """Its optimizer is made in ``__init__``, by name."""

    def __init__(self, name: str) -> None:
        super().__init__(kind=OneBlock)
        self.made = MAKE[name](self)

    def configure_optimizers(self) -> Any:
        return [self.made], [torch.optim.lr_scheduler.StepLR(self.made, 1, 0.5)]


def fit(folder: Path, name: str, *, epochs: int, ckpt_path: Path | None = None, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0 if ckpt_path is None else 1)
    module = OfTheModule(name)
    trainer = make_trainer(folder, max_epochs=epochs, limit_val_batches=0, use_distributed_sampler=False, **options)
    trainer.fit(module, loader_of_tokens(4), ckpt_path=ckpt_path)
    if epochs == 1:
        trainer.save_checkpoint(folder / "one.ckpt")
    return whole_weights(module)


def resumed(folder: Path, name: str, **options: Any) -> dict[str, Tensor]:
    fit(folder, name, epochs=1, devices=RANKS, strategy=mics(**options))
    return fit(folder, name, epochs=2, ckpt_path=folder / "one.ckpt", devices=RANKS, strategy=mics(**options))


def under_fabric(name: str) -> dict[str, Tensor]:
    fabric, model = start(devices=RANKS), network()
    optimizer = MAKE[name](model)  # before the model is sharded, and set up after it
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(optimizer)

    def backward() -> Tensor:
        loss = model(tokens(2, seed=fabric.global_rank))
        fabric.backward(loss)
        return loss

    train(optimizer, backward)
    return whole_weights(model._forward_module)


def under_accelerate(name: str) -> dict[str, Tensor]:
    accelerator, model = start_accelerate(), network()
    model, prepared = accelerator.prepare(model, MAKE[name](model))

    def backward() -> Tensor:
        loss = model(tokens(2, seed=accelerator.process_index))
        accelerator.backward(loss)
        return loss

    def closure() -> Tensor:
        prepared.zero_grad()
        return backward()

    for _ in range(STEPS):
        if isinstance(prepared.optimizer, torch.optim.LBFGS | Sam):
            prepared.step(closure)
        else:
            closure()
            prepared.step()
    return whole_weights(model)


def refused_by_hosts() -> list[str]:
    """What the hosts say of an optimizer that cannot step, of tensors of another model, and of states from before."""
    sparse, stepped = network(), network()
    by_fabric = partial(start(devices=RANKS).setup, sparse, torch.optim.SparseAdam(sparse.parameters()))
    late = torch.optim.Adam(stepped.parameters())
    stepped(tokens(2)).backward()
    late.step()
    fabric = start(devices=RANKS)
    fabric.setup_module(stepped)
    return [refusal(by_fabric), refusal(partial(fabric.setup_optimizers, late))]


REJECTED = ["`torch.optim.SparseAdam`", "`ZeroRedundancyOptimizer`"]


HOSTED = [
    ("over nodes", "`torch.optim.Adafactor`"),
    ("fabric", "`torch.optim.Adafactor`"),
    ("over nodes", "one with `matrix_update`"),
    ("fabric", "`torch.optim.LBFGS`"),
    ("fabric", "one with `matrix_update`"),
    ("accelerate", "one with `matrix_update`"),
    ("accelerate", "`transformers.Adafactor`"),
    ("accelerate", "SAM around SGD, of your own"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    folder = tmp_path_factory.mktemp("fits")
    kinds: dict[Any, Callable[[], Any]] = {name: partial(sharded, name) for name in MAKE}
    hosts = {(host, name): partial(HOSTS[host], name) for host, name in HOSTED}
    fits = {
        ("resumed", name): partial(resumed, folder / str(index), name, **options)
        for index, (name, options) in enumerate(RESUMED.items())
    }
    traffic = {("sent", name): partial(sent_between_nodes, name) for name in MAKE if name not in REJECTED}
    return cases_on_ranks({**kinds, **hosts, **fits, **traffic, "refused": refused_by_hosts}, world_size=RANKS)


HOSTS = {"over nodes": partial(sharded, ranks_per_node=1), "fabric": under_fabric, "accelerate": under_accelerate}
RESUMED: dict[str, dict[str, Any]] = {
    "`torch.optim.Adafactor`": {"state_dict_type": "full"},
    "`torch.optim.Rprop`": {"ranks_per_node": 1, "partition_size": 2, "cache_parameters": "never"},
    "one with `matrix_update`": {"ranks_per_node": 1, "partition_size": 2},
}


def table() -> dict[str, tuple[str, str, str]]:
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", PAGE.read_text(), flags=re.MULTILINE)
    return {name: tuple(cells) for name, *cells in rows if name != "optimizer" and not name.startswith("---")}


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_the_table_of_the_docs_has_each_optimizer_of_torch_and_transformers() -> None:
    of_torch = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and kind is not Optimizer}
    assert {f"`torch.optim.{name}`" for name in of_torch} <= table().keys()
    assert table().keys() == MAKE.keys()


@pytest.mark.parametrize("name", [name for name in MAKE if name not in REJECTED])
def test_each_optimizer_of_the_table_trains_to_the_weights_of_one_process(
    name: str, results: dict[Any, list[Any]]
) -> None:
    expected, tolerance = alone(MAKE[name]), float(table()[name][1])
    assert gap(expected, whole_weights(network())) > 3 * min(tolerance, 1e-3)
    for weights in results[name]:
        assert not isinstance(weights, str), weights
        assert gap(weights, expected) < tolerance


@pytest.mark.parametrize("name", [name for name in MAKE if name not in REJECTED])
def test_nothing_that_an_optimizer_sends_to_other_nodes_is_uncounted(name: str, results: dict[Any, list[Any]]) -> None:
    for by_techniques, by_operations in results["sent", name]:
        assert by_techniques == pytest.approx(by_operations)
    weights = sum(p.nbytes for p in network().parameters())
    of_node = sum(by_techniques for by_techniques, _ in results["sent", name]) / RANKS
    assert table()[name][2] == f"{of_node / weights:.2f}"


@pytest.mark.parametrize(("host", "name"), HOSTED)
def test_optimizers_that_need_more_than_their_shards_train_the_same_everywhere(
    host: str, name: str, results: dict[Any, list[Any]]
) -> None:
    expected, tolerance = alone(MAKE[name]), float(table()[name][1])
    for weights in results[host, name]:
        assert gap(weights, expected) < tolerance


@pytest.mark.parametrize("name", RESUMED)
def test_an_optimizer_that_is_made_in_the_constructor_trains_and_resumes(
    name: str, results: dict[Any, list[Any]], tmp_path: Path
) -> None:
    expected = fit(tmp_path, name, epochs=2, strategy="auto", devices=1)
    assert gap(expected, fit(tmp_path, name, epochs=1, strategy="auto", devices=1)) > 1e-3
    for weights in results["resumed", name]:
        assert gap(weights, expected) < 1e-6


def test_optimizers_that_cannot_step_on_shards_are_rejected_by_class(results: dict[Any, list[Any]]) -> None:
    assert set(results["`torch.optim.SparseAdam`"]) == {
        "TypeError: SparseAdam takes sparse gradients, and those of sharded parameters are dense: use torch.optim.Adam "
        "or AdamW, and nn.Embedding(sparse=False)"
    }
    assert set(results["`ZeroRedundancyOptimizer`"]) == {
        "TypeError: ZeroRedundancyOptimizer shards the states of an optimizer, which are sharded already, as "
        "parameters and gradients are: use the optimizer_class that it wraps"
    }
    for sparse, stepped in results["refused"]:
        assert sparse.startswith("TypeError: SparseAdam takes sparse gradients")
        assert stepped.startswith("ValueError: Adam has stepped before the model was sharded")
