"""What users do to parameters that are sharded along another dim than rows: the numbers of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_mics import CommunicationOptions, Topology, create_partition_groups, full_state_dict, shard_model
from lightning_mics.checkpoint.opening import open_checkpoint
from lightning_mics.checkpoint.whole_model import read_tensors, stored_model
from lightning_mics.sharding.optimizers.adapt import adapt_optimizer
from lightning_mics.sharding.ranks.replicas import verify_replicas
from tests.support.checkpoints import load_into, save_file, save_shards, slots_of, weights_of
from tests.support.fits import same
from tests.support.forked import run_cases
from tests.support.narrow import DIM, NARROW, Network, batch, by_rows, narrow, network, sgd, whole

OVER_NODES = Topology(world_size=4, ranks_per_node=2, partition_size=4)
SCHEDULES = {"paper": CommunicationOptions.PAPER, "node": CommunicationOptions.NODE, "rank": CommunicationOptions.RANK}


def sharded(
    topology: Topology = OVER_NODES,
    communication: CommunicationOptions = CommunicationOptions.PAPER,
    make: Callable[[], Network] = network,
    **options: Any,
) -> tuple[Any, Any]:
    model = make()
    groups = create_partition_groups(topology, device_type="cpu")
    return model, shard_model(model, groups, communication=communication, **options)


def as_one(value: Any) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


# -- changes -----------------------------------------------------------------------------------------------------------


def randoms(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "a row": lambda w: w[1].mul_(2.0),
    "a row is set": lambda w: w.__setitem__(0, 3.0),
    "an element is set": lambda w: w.__setitem__((1, 2), 5.0),
    "a column": lambda w: w[..., 3].zero_(),
    "columns": lambda w: w[..., 2:7].mul_(3.0),
    "columns of a narrow": lambda w: w.narrow(-1, 3, 2).fill_(1.0),
    "chunks": lambda w: w.chunk(2, dim=-1)[1].neg_(),
    "rows in a loop": lambda w: [row.add_(float(i)) for i, row in enumerate(w)],
    "flattened": lambda w: w.view(-1)[3:9].zero_(),
    "transposed": lambda w: w.transpose(0, 1)[2].fill_(4.0),
    "a mask": lambda w: w.__setitem__(w.abs() < 0.05, 0.0),
    "an unsharded factor": lambda w: w.mul_(randoms(w.shape)),
    "unsharded values": lambda w: w.copy_(randoms(w.shape)),
    "data is assigned": lambda w: setattr(w, "data", randoms(w.shape)),
    "data is scaled": lambda w: w.data.mul_(0.5),
    "random numbers": lambda w: (torch.manual_seed(5), nn.init.normal_(w)),
    "a row is drawn": lambda w: (torch.manual_seed(5), w[1].uniform_()),
    "scaled by norms of rows": lambda w: w.div_(w.flatten(1).norm(dim=1).view(-1, *[1] * (w.dim() - 1))),
    "scaled by norms of columns": lambda w: w.div_(w.norm(dim=0, keepdim=True)),
    "scaled by the norm": lambda w: w.div_(w.norm()),
    "scaled by a number": lambda w: w.mul_(w.abs().max().item()),
    "clamped": lambda w: w.clamp_(-0.01, 0.01),
    "lists": lambda w: torch._foreach_mul_([w, w], [2.0, 3.0]),
}
OF_MATRICES: dict[str, Callable[[Tensor], Any]] = {
    "orthogonal": lambda w: (torch.manual_seed(5), nn.init.orthogonal_(w)),
}
CHANGED = {
    (change, name): made
    for name in ("layers.1.down", "layers.1.kernel", "head.weight")
    for change, made in {**CHANGES, **({} if "kernel" in name else OF_MATRICES)}.items()
}


def change_all() -> dict[Any, tuple[Tensor, Tensor]]:
    """Each changed parameter, and the loss of a forward after the change, in which caches must be fresh."""
    model, _ = sharded(communication=CommunicationOptions.RANK)
    start = whole(model)
    found = {}
    for key, change in CHANGED.items():
        model.load_state_dict(start)
        with torch.no_grad():
            model(batch(0, 0, 0))
            model.reshard()
            change(model.get_parameter(key[1]))
            loss = model(batch(0, 0, 0))
        model.reshard()
        found[key] = as_one(model.get_parameter(key[1])), as_one(loss)
    return found


@pytest.fixture(scope="module")
def changed() -> list[dict[Any, tuple[Tensor, Tensor]]]:
    return run_cases(4, {"": change_all})[""]


@pytest.mark.parametrize("key", CHANGED, ids=", ".join)
def test_a_change_is_that_of_one_process(key: tuple[str, str], changed: list[Any]) -> None:
    model = network()
    before = model.get_parameter(key[1]).detach().clone()
    with torch.no_grad():
        CHANGED[key](model.get_parameter(key[1]))
        loss = model(batch(0, 0, 0))
    after = model.get_parameter(key[1]).detach()
    assert not torch.equal(after, before)
    for of_rank in changed:
        torch.testing.assert_close(of_rank[key], (after, loss))


# -- in a forward, and outside of it -----------------------------------------------------------------------------------


def scale_in_forward(module: Any, *_: Any) -> None:
    assert not isinstance(module.down, DTensor)
    with torch.no_grad():
        module.down.mul_(0.5)
        module.kernel.data = module.kernel.data * 2.0


def loss_of(model: Any, x: Tensor) -> Tensor:
    """With a penalty, and a use of a narrow matrix without its layer."""
    penalty: Tensor = sum(p.square().sum() for p in model.parameters() if p.requires_grad)  # type: ignore[assignment]
    used: Tensor = (x @ model.layers[1].down.T).square().mean()
    return model(x) + 0.1 * used + 0.01 * penalty


def by_loss(model: Any, x: Tensor) -> Tensor:
    return model(x)  # type: ignore[no-any-return]


USES: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], object]]] = {
    "outside of a forward": (loss_of, lambda model: None),
    "changed in a forward": (by_loss, lambda model: model.layers[0].register_forward_pre_hook(scale_in_forward)),
}


def use(name: str, schedule_name: str) -> dict[str, Tensor]:
    loss, prepare = USES[name]
    model, schedule = sharded(communication=SCHEDULES[schedule_name])
    prepare(model)
    optimizer = sgd(model)
    for step in range(2):
        for micro_step in range(2):
            with schedule.micro_step(boundary=micro_step == 1):
                loss(model, batch(dist.get_rank(), step, micro_step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


@pytest.fixture(scope="module")
def used() -> dict[Any, list[Any]]:
    return run_cases(4, {(name, schedule): partial(use, name, schedule) for name in USES for schedule in SCHEDULES})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_use_outside_of_a_forward_trains_as_in_one_process(schedule: str, used: dict[Any, list[Any]]) -> None:
    model = network()
    optimizer = sgd(model)
    for step in range(2):
        for micro_step in range(2):
            (sum(loss_of(model, batch(rank, step, micro_step)) for rank in range(4)) / 4).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    for of_rank in used["outside of a forward", schedule]:
        torch.testing.assert_close(of_rank, whole(model), atol=1e-6, rtol=0)


def changed_in_a_forward() -> dict[str, Tensor]:
    """One process has all samples in one forward, so that its weights change as often as those of each rank."""
    model = network()
    model.layers[0].register_forward_pre_hook(scale_in_forward)
    optimizer = sgd(model)
    for step in range(2):
        for micro_step in range(2):
            by_loss(model, torch.cat([batch(rank, step, micro_step) for rank in range(4)])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_change_in_a_forward_reaches_the_shards(schedule: str, used: dict[Any, list[Any]]) -> None:
    expected = changed_in_a_forward()
    for of_rank in used["changed in a forward", schedule]:
        for name in ("layers.0.down", "layers.0.kernel"):
            assert float(of_rank[name].norm() / network().state_dict()[name].norm()) != pytest.approx(1, abs=0.2)
        torch.testing.assert_close(of_rank, expected, atol=1e-6, rtol=1e-5)


# -- optimizers --------------------------------------------------------------------------------------------------------


def of_torch(name: str, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    kind = getattr(torch.optim, name)
    return lambda model: kind([p for p in model.parameters() if p.requires_grad], **{"lr": 0.01, **options})


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": of_torch("SGD", lr=0.1, momentum=0.9, weight_decay=0.01, foreach=True),
    "AdamW": of_torch("AdamW", eps=1e-3),
    "AdamW, foreach": of_torch("AdamW", eps=1e-3, foreach=True),
    "AdamW, fused": of_torch("AdamW", eps=1e-3, fused=True),
    "Adafactor": of_torch("Adafactor"),
    "Adafactor of transformers": lambda model: transformers.Adafactor(
        [p for p in model.parameters() if p.requires_grad]
    ),
    "Rprop": of_torch("Rprop"),
    "LBFGS": of_torch("LBFGS", lr=1.0, max_iter=2),
    "Muon": lambda model: torch.optim.Muon([p for p in model.parameters() if p.requires_grad and p.dim() == 2]),
}


def step_all(optimizer: torch.optim.Optimizer, backward: Callable[[], Tensor]) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward()

    for _ in range(3):
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def optimize(name: str) -> dict[str, Tensor]:
    model, schedule = sharded()

    def backward() -> Tensor:
        with schedule.micro_step(boundary=True):
            loss = model(batch(dist.get_rank(), 0, 0))
            loss.backward()
        return loss  # type: ignore[no-any-return]

    optimizer = OPTIMIZERS[name](model)
    adapt_optimizer(optimizer, schedule.optimizer_hooks.owners)
    step_all(optimizer, backward)
    return whole(model)


@pytest.fixture(scope="module")
def optimized() -> dict[str, list[dict[str, Tensor]]]:
    return run_cases(4, {name: partial(optimize, name) for name in OPTIMIZERS})


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:LBFGS")
def test_optimizers_step_as_in_one_process(name: str, optimized: dict[str, list[dict[str, Tensor]]]) -> None:
    model = network()

    def backward() -> Tensor:
        loss: Any = sum(model(batch(rank, 0, 0)) for rank in range(4)) / 4
        loss.backward()
        return loss  # type: ignore[no-any-return]

    before = whole(model)
    step_all(OPTIMIZERS[name](model), backward)
    expected = whole(model)
    assert all(not torch.equal(before[key], expected[key]) for key in ("layers.1.down", "head.weight"))
    for of_rank in optimized[name]:
        torch.testing.assert_close(of_rank, expected, atol=2e-4 if name == "Muon" else 1e-5, rtol=0)


# -- initial weights, copies, replicas ---------------------------------------------------------------------------------


class Linears(Network):
    """Built of modules that initialize themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, 3) for _ in range(2))
        self.conv = nn.Conv1d(DIM, 2, 3)


def from_meta() -> Network:
    torch.manual_seed(7)
    with torch.device("meta"):
        return Linears()


def initial(partition_size: int, communication: CommunicationOptions = CommunicationOptions.PAPER) -> Any:
    topology = Topology(world_size=4, ranks_per_node=2, partition_size=partition_size)
    model, _ = sharded(topology, communication, from_meta)
    found = whole(model)
    torch.manual_seed(11)
    for module in (*model.layers, model.conv, model.head):
        module.reset_parameters()
    return narrow(model), found, whole(model)


def copied() -> dict[str, Any]:
    model, schedule = sharded(communication=CommunicationOptions.NODE)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = sgd(model)
    for step in range(2):
        with schedule.micro_step(boundary=True):
            model(batch(dist.get_rank(), step, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    names = narrow(average)  # before the forward, after which the root is unsharded
    with torch.inference_mode():
        loss = average(batch(0, 0, 0))
    twin = copy.deepcopy(model)
    equal = same(whole(twin), whole(model))
    full = full_state_dict(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return {
        "narrow": names,
        "average": whole(average.module),
        "loss": as_one(loss),
        "equal": equal,
        "twin is its own": not same(whole(twin), whole(model)),
        "full": full,
        "twin": whole(twin),
    }


def loaded_whole() -> bool:
    model, _ = sharded(communication=CommunicationOptions.RANK)
    torch.manual_seed(1)
    state = Network().state_dict()
    model(batch(0, 0, 0))
    model.load_state_dict(state)
    torch.testing.assert_close(model(batch(0, 0, 0)), _of_state(state))
    return same(whole(model), {name: value.detach() for name, value in state.items()})


def _of_state(state: dict[str, Tensor]) -> Tensor:
    model = Network()
    model.load_state_dict(state)
    return model(batch(0, 0, 0))  # type: ignore[no-any-return]


def apart() -> list[str]:
    """What comparisons of replicas say: at once, and while training."""
    topology = Topology(world_size=8, ranks_per_node=4, partition_size=4)
    said = []
    model, schedule = sharded(topology, certify_every_n_steps=1)
    optimizer = sgd(model)
    for step in range(3):
        with schedule.micro_step(boundary=True):
            model(batch(dist.get_rank(), step, 0)).backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            said.append(str(error))
            break
        if step == 0 and dist.get_rank() == 6:
            model.head.weight.to_local().view(torch.int32)[0, 0] ^= 1
    groups = create_partition_groups(topology, device_type="cpu")
    try:
        verify_replicas(model, groups)
    except RuntimeError as error:
        said.append(str(error))
    return said


@pytest.fixture(scope="module")
def others() -> dict[Any, list[Any]]:
    cases: dict[Any, Any] = {size: partial(initial, size) for size in (1, 2, 4)}
    cases |= {"copied": copied, "loaded": loaded_whole}
    return run_cases(4, cases)


def test_initial_weights_do_not_depend_on_how_they_are_sharded(others: dict[Any, list[Any]]) -> None:
    assert [others[size][0][0] for size in (1, 2)] == [[], []]
    assert others[4][0][0] == ["layers.0.weight", "layers.1.weight", "head.weight", "conv.weight"]
    for size in (1, 2, 4):
        for _, first, again in others[size]:
            assert same(first, others[1][0][1])
            assert same(again, others[1][0][2])
            assert not same(first, again)


def test_copies_and_averages_are_those_of_one_process(others: dict[Any, list[Any]]) -> None:
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = sgd(model)
    for step in range(2):
        (sum(model(batch(rank, step, 0)) for rank in range(4)) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    for rank, found in enumerate(others["copied"]):
        assert found["narrow"] == [f"module.{name}" for name in NARROW]
        assert found["equal"] and found["twin is its own"]
        torch.testing.assert_close(found["average"], whole(average.module), atol=1e-6, rtol=0)
        torch.testing.assert_close(found["loss"], average(batch(0, 0, 0)).detach(), atol=1e-6, rtol=0)
        assert same(found["full"], found["twin"] if rank == 0 else {})
        torch.testing.assert_close(found["twin"], whole(model), atol=1e-6, rtol=0)


def test_whole_tensors_are_loaded(others: dict[Any, list[Any]]) -> None:
    assert others["loaded"] == [True] * 4


def test_replicas_that_differ_in_a_narrow_matrix_are_found() -> None:
    for rank, said in enumerate(run_cases(8, {"": apart})[""]):
        assert said[-1].startswith("the replicas of the model differ in ")
        assert ("head.weight" in said[-1]) == (rank in (2, 6))  # those that hold the part
        of_step = ["after optimizer step 2: " + said[-1]] if rank in (2, 6) else []
        assert said[:-1] == of_step


# -- checkpoints -------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "four": OVER_NODES,
    "rows": OVER_NODES,
    "two replicas": Topology(world_size=4, ranks_per_node=2, partition_size=2),
}
SAVERS: dict[str, Callable[..., None]] = {"sharded": save_shards, "full": save_file}


def training(name: str, seed: int, topology: Topology | None = None) -> tuple[Any, Any]:
    def make() -> Network:
        torch.manual_seed(seed)
        return Network()

    with by_rows() if name == "rows" else nullcontext():
        model, _ = sharded(topology or LAYOUTS[name], make=make)
    of_ranks = {3: [n for n in NARROW if "kernel" in n], 4: NARROW}  # three columns divide by three
    assert narrow(model) == ([] if name == "rows" else of_ranks.get((topology or LAYOUTS[name]).partition_size, []))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, foreach=True)


def backward(model: Any) -> None:
    model(batch(0, 0, 0)).backward()


def save_all(folder: Path) -> dict[str, Any]:
    """A checkpoint of each layout in each format, and what is in them: the same in all."""
    for name in LAYOUTS:
        model, optimizer = training(name, 0)
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        for kind, save in SAVERS.items():
            save(folder / f"{name}, {kind}", model, optimizer)
    return {"weights": weights_of(model), "slots": slots_of(optimizer)}


def load_all(folder: Path, saved: dict[str, Any], layouts: dict[str, Topology]) -> list[str]:
    """Which checkpoints do not give the weights and states of ``saved``, and the same next step, in some layout."""
    different = []
    model, optimizer = training(
        "one", 0, Topology(world_size=dist.get_world_size(), ranks_per_node=1, partition_size=1)
    )
    load_into(folder / "four, sharded", model, optimizer)
    backward(model)
    optimizer.step()
    after = weights_of(model)
    for name, topology in layouts.items():
        for file in sorted(folder.iterdir()):
            model, optimizer = training(name, 1, topology)
            load_into(file, model, optimizer)
            sides = [(weights_of(model), saved["weights"])]
            sides += zip(slots_of(optimizer), saved["slots"], strict=True)
            backward(model)
            optimizer.step()
            sides.append((weights_of(model), after))
            for number, (found, expected) in enumerate(sides):
                close = found.keys() == expected.keys() and all(
                    (found[key] - expected[key]).abs().max() <= 1e-5 * expected[key].abs().max() for key in found
                )
                if not close:
                    different.append(f"{file.name} in {name}: {number}")
    return different


def test_checkpoints_load_into_any_layout_and_those_by_rows_too(tmp_path: Path) -> None:
    saved = run_cases(4, {"": partial(save_all, tmp_path)})[""][0]
    assert len(list(tmp_path.iterdir())) == 6
    assert run_cases(4, {"": partial(load_all, tmp_path, saved, LAYOUTS)})[""] == [[]] * 4
    three = {"three": Topology(world_size=3, ranks_per_node=3, partition_size=3)}
    assert run_cases(3, {"": partial(load_all, tmp_path, saved, three)})[""] == [[]] * 3
    for name in LAYOUTS:  # read by a process alone, as `export` does
        checkpoint = open_checkpoint(tmp_path / f"{name}, sharded")
        found = read_tensors(checkpoint, stored_model(checkpoint), saved["weights"])
        assert same(found, saved["weights"])
