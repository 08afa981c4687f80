"""``copy.deepcopy`` of a sharded model is a sharded model: ``AveragedModel`` and teachers in loops of one's own."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from tests.support import accelerators, loops
from tests.support.fits import refusal, whole_weights
from tests.support.forked import run_cases
from tests.support.models import OneBlock, TinyLM, tokens
from tests.support.recorded import RecordCollectives
from tests.support.trainers import cases_on_ranks

STEPS = 6

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "p=1": (1, {}),
    "p=2": (2, {}),
    "p=4, node": (4, {"communication": CommunicationOptions.NODE}),
    "p=4, rank, recomputed": (
        4,
        {"communication": CommunicationOptions.RANK, "activation_checkpointing": True},
    ),
}

AVERAGES: dict[str, dict[str, Any]] = {
    "avg_fn": {"avg_fn": get_ema_avg_fn(0.9)},
    "multi_avg_fn": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "buffers": {"use_buffers": True},
}


class Counting(nn.Module):
    """A hook of the user's with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1


def made(name: str) -> tuple[Any, Any]:
    partition_size, options = LAYOUTS[name]
    torch.manual_seed(0)
    model = TinyLM()
    topology = Topology(world_size=4, ranks_per_node=2, partition_size=partition_size)
    return model, shard_model(model, create_partition_groups(topology, device_type="cpu"), **options)


def step(model: Any, schedule: Any, optimizer: Any, number: int) -> None:
    for micro_step in range(2):
        with schedule.micro_step(boundary=micro_step == 1):
            model(tokens(2, seed=10 * number + dist.get_rank() + micro_step)).backward()
    optimizer.step()
    optimizer.zero_grad()


def averaged(name: str, kind: str) -> dict[str, Any]:
    """A sharded average beside a whole one that is fed the gathered weights."""
    model, schedule = made(name)
    torch.manual_seed(0)
    plain = TinyLM()
    plain.load_state_dict(whole_weights(model))
    sharded, whole = AveragedModel(model, **AVERAGES[kind]), AveragedModel(plain, **AVERAGES[kind])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for number in range(STEPS):
        step(model, schedule, optimizer, number)
        with RecordCollectives() as recorded:
            sharded.update_parameters(model)
        assert not recorded.seen
        plain.load_state_dict(whole_weights(model))
        whole.update_parameters(plain)
    found, expected = whole_weights(sharded), whole_weights(whole)
    sizes = [sum(p.to_local().numel() for p in each.parameters()) for each in (sharded, model)]
    with torch.no_grad():
        gap = float((sharded(tokens(4)) - whole(tokens(4))).abs())
    return {
        "same": found.keys() == expected.keys() and all(torch.equal(v, expected[key]) for key, v in found.items()),
        "gap": gap,
        "sizes": sizes,
        "sharded": isinstance(sharded.module, FSDPModule) and type(sharded.module.blocks[0]).__name__ == "Block",
    }


def of_its_own() -> dict[str, Any]:
    """What a copy shares with its model, and what not."""
    model, schedule = made("p=4, node")
    hook = Counting()
    model.blocks[0].register_forward_hook(hook)
    groups = dist.distributed_c10d._world.pg_map
    before = len(groups)
    model.note = {"block": model.blocks[1]}
    with RecordCollectives() as recorded:
        teacher = copy.deepcopy(model)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1)
    sent = schedule.traffic.by_technique()
    bytes_before = sum(each.between_bytes for each in sent.values())
    with torch.no_grad():
        loss = model(tokens(2))
        schedule.cache.invalidate()
        bytes_of_one = sum(each.between_bytes for each in schedule.traffic.by_technique().values()) - bytes_before
        same = torch.equal(teacher(tokens(2)), loss)
    bytes_of_both = sum(each.between_bytes for each in schedule.traffic.by_technique().values()) - bytes_before
    teacher(tokens(2)).backward()
    optimizer.step()
    changed = whole_weights(teacher)
    kept = whole_weights(model)
    again = copy.deepcopy(teacher)
    found = {
        "communicated": len(recorded.seen),
        "groups": len(groups) - before,
        "same": same,
        "calls": (hook.calls, next(iter(teacher.blocks[0]._forward_hooks.values())).calls),
        "note": teacher.note["block"] is teacher.blocks[1],
        "traffic": bytes_of_both == 2 * bytes_of_one > 0,
        "own weights": not torch.equal(changed["norm.weight"], kept["norm.weight"]),
        "tied": teacher.head.weight is teacher.embed.weight,
        "of a copy": all(torch.equal(value, changed[name]) for name, value in whole_weights(again).items()),
    }
    references = [weakref.ref(p) for p in teacher.parameters()]
    del optimizer, teacher
    gc.collect()
    return {**found, "freed": not any(reference() is not None for reference in references)}


def refused() -> dict[str, str]:
    model, schedule = made("p=2")
    said = {"block": refusal(partial(copy.deepcopy, model.blocks[0]))}
    with schedule.micro_step(boundary=False):
        model(tokens(2)).backward()
    said["window"] = refusal(partial(copy.deepcopy, model))

    def in_forward(*_: Any) -> None:
        said["forward"] = refusal(partial(copy.deepcopy, model))

    handle = model.blocks[0].register_forward_hook(in_forward)
    with schedule.micro_step(boundary=True):
        model(tokens(2)).backward()
    handle.remove()
    assert isinstance(copy.deepcopy(model), FSDPModule)
    copy.copy(model)  # as before
    said["pickled"] = refusal(partial(pickle.dumps, model))
    said["pickled inside"] = refusal(partial(torch.save, {"models": [model]}, io.BytesIO()))
    return said


@pytest.fixture(scope="module")
def results() -> dict[Any, list[Any]]:
    cases: dict[Any, Any] = {
        (name, kind): partial(averaged, name, kind)
        for name in LAYOUTS
        for kind in (AVERAGES if name == "p=2" else ["avg_fn"])
    }
    return run_cases(4, {**cases, "own": of_its_own, "refused": refused})


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_averaged_model_is_the_average_of_whole_weights_bit_for_bit(
    name: str, results: dict[Any, list[Any]]
) -> None:
    for kind in AVERAGES if name == "p=2" else ["avg_fn"]:
        for found in results[name, kind]:
            assert found["same"] and found["sharded"]
            assert found["gap"] == 0.0
            assert found["sizes"][0] == found["sizes"][1]


def test_a_copy_has_weights_and_hooks_of_its_own_and_the_groups_of_its_model(results: dict[Any, list[Any]]) -> None:
    for found in results["own"]:
        assert found.pop("communicated") == found.pop("groups") == 0
        calls = found.pop("calls")
        assert calls == (1, 2)
        assert all(found.values()), found


def test_copies_that_could_not_be_right_are_refused(results: dict[Any, list[Any]]) -> None:
    for said in results["refused"]:
        assert said["block"].startswith("TypeError: Block is a block of a sharded model")
        assert "is in a forward or backward" in said["forward"]
        assert "in an accumulation window" in said["window"] and "copy it at a boundary" in said["window"]
        for how in ("pickled", "pickled inside"):
            assert "is sharded, and cannot be pickled" in said[how]
            assert all(way in said[how] for way in ("deepcopy", "full_state_dict", "trainer.save_checkpoint"))


# -- Fabric and Accelerate --------------------------------------------------------------------------------------------


def whole(model: Any) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in model.state_dict().items()
    }


class WithoutNorm(OneBlock):
    """On CPUs a norm takes no 16-bit weights with a hidden state in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()


def in_fabric(folder: Path, precision: Any) -> dict[str, Any]:
    folder = folder / f"of fabric in {precision}"
    fabric = loops.start(precision=precision)
    model, optimizer = set_up(fabric)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5))
    for number in range(3):
        loops.step(fabric, model, optimizer, seed=number)
        average.update_parameters(model)
    before = whole(average)
    with torch.inference_mode():
        evaluated = float(average(tokens(2)))
        first = AveragedModel(model)
        equal = torch.equal(first(tokens(2)), model(tokens(2)))
    loops.step(fabric, model, optimizer, seed=3)  # training goes on after an evaluation of the copy
    fabric.save(folder, {"model": model, "optimizer": optimizer, "average": average})
    other, _ = set_up(fabric)
    loaded = AveragedModel(other, avg_fn=get_ema_avg_fn(0.5))
    fabric.load(folder, {"model": other, "average": loaded})
    with torch.inference_mode():
        again = float(loaded(tokens(2)))
    after = whole(loaded)
    same = before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert "is a copy of a sharded model, for forwards" in refusal(partial(fabric.setup_module, average.module))
    return {
        "same": same,
        "losses": evaluated == again,
        "equal": equal,
        "sharded": isinstance(average.module, FSDPModule),
    }


def set_up(fabric: Any) -> Any:
    model = loops.network(kind=WithoutNorm)
    return fabric.setup(model, loops.sgd(model))


def in_accelerate(folder: Path, precision: str) -> dict[str, Any]:
    accelerator = accelerators.start(mixed_precision=precision)
    model = loops.network(kind=WithoutNorm)
    model, optimizer = accelerator.prepare(model, loops.sgd(model))
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5))
    accelerator.register_for_checkpointing(average)
    with torch.no_grad():
        first = torch.equal(average(tokens(2)), model(tokens(2)))
    for number in range(3):
        accelerators.step(accelerator, model, optimizer, seed=number)
        average.update_parameters(model)
    with torch.no_grad():
        differs = not torch.equal(average(tokens(2)), model(tokens(2)))
    accelerator.save_state(folder / precision)
    before = whole(average)
    accelerators.step(accelerator, model, optimizer, seed=7)
    average.update_parameters(model)
    accelerator.load_state(folder / precision)
    after = whole(average)
    same = all(torch.equal(value, after[name]) for name, value in before.items())
    return {"first": first, "differs": differs, "same": same, "count": int(average.n_averaged) == 3}


@pytest.fixture(scope="module")
def integrated(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    folder = tmp_path_factory.mktemp("saved")
    cases = {precision: partial(in_accelerate, folder, precision) for precision in ("no", "bf16")}
    of_fabric = {precision: partial(in_fabric, folder, precision) for precision in ("32-true", "bf16-mixed")}
    return cases_on_ranks({**cases, **of_fabric})


@pytest.mark.parametrize("case", ["no", "bf16", "32-true", "bf16-mixed"])
def test_averages_in_loops_of_ones_own_train_evaluate_save_and_load(
    case: str, integrated: dict[Any, list[Any]]
) -> None:
    for found in integrated[case]:
        assert all(found.values()), found
