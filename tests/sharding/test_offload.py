"""Model states in host memory: the same training, bit for bit, with every schedule and every optimizer that may."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_mics._torch import host_memory
from lightning_mics._torch.fsdp import fsdp_modules
from lightning_mics._torch.optimizers.steps import call_first_before_step
from lightning_mics._torch.process_groups import backends_with_host
from lightning_mics._torch.units.on_host import shards_on_host
from lightning_mics.policy import policy
from lightning_mics.policy.policy import Policy
from lightning_mics.sharding.optimizers.offload import check_host_memory, shards_stay
from lightning_mics.sharding.optimizers.on_host import StepOnHost
from lightning_mics.sharding.options import CommunicationOptions
from tests.support.models import TinyLM, tokens

MICRO_STEPS, STEPS = 2, 2
PAPER, NODE, RANK = CommunicationOptions.PAPER, CommunicationOptions.NODE, CommunicationOptions.RANK


class LayerwiseAdaptive(torch.optim.Optimizer):
    """Divides each update by the norm of the whole parameter, as LARS does, which shards alone do not know."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state.setdefault("momentum", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                    p.sub_(state["momentum"] * (group["lr"] * p.norm() / (1 + state["momentum"].norm())))


class Lookahead(torch.optim.Optimizer):
    """Weights that follow those of another optimizer, every other step."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        self.base = torch.optim.SGD(params, lr=lr, momentum=0.9)
        super().__init__(self.base.param_groups, {})
        self.param_groups = self.base.param_groups
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base.step()
        self.count += 1
        for group in self.param_groups if self.count % 2 == 0 else ():
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.detach().clone())
                slow.lerp_(p, 0.5)
                p.copy_(slow)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "Adam": partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    "AdamW, fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "RAdam": partial(torch.optim.RAdam, lr=0.1),
    "Rprop": torch.optim.Rprop,
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "norms of parameters": LayerwiseAdaptive,
    "around another": Lookahead,
}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


WAYS: dict[str, dict[str, Any]] = {
    "one rank": {"partition_size": 1, **PAPER.keywords()},
    "a node": {"partition_size": 2, **PAPER.keywords()},
    "a node, once per step everywhere": {"partition_size": 2, **RANK.keywords()},
    "all": {"partition_size": 4, **PAPER.keywords()},
    "all, once per step": {"partition_size": 4, **NODE.keywords()},
    "all, once per step everywhere": {"partition_size": 4, **RANK.keywords()},
    "all, in bfloat16 between nodes": {"partition_size": 4, "inter_node_reduce_dtype": "bfloat16"},
    "unused blocks": {"partition_size": 2, "allow_unused": True},
    "compared replicas": {"partition_size": 1, "certify_every_n_steps": 1},
    "half precision": {"partition_size": 4, "precision": "bf16-true", "reduce_dtype": "float32"},
    "recomputed": {"partition_size": 2, "activation_checkpointing": True, "activation_offload": True},
}


def shard(model: nn.Module, *, precision: str = "32-true", **options: Any) -> Any:
    made = Policy(**{"ranks_per_node": 2, **options})
    return made.shard(model, precision=precision, device=torch.device("cpu"), local_size=4)


def trained(way: dict[str, Any], offload: Any, make_optimizer: Any) -> tuple[list[Tensor], dict[str, int]]:
    """Losses, norms, local weights and states of a rank, and what was in host memory and in which number of steps."""
    torch.manual_seed(0)
    model = TinyLM().to(torch.bfloat16 if way.get("precision") == "bf16-true" else torch.float32)
    handle = shard(model, offload=offload, **way)
    optimizer = make_optimizer(model.parameters())
    handle.schedule.optimizer_hooks.adopt(optimizer)
    found, steps, step_on_host = [], [], StepOnHost.step

    def counted(*args: Any) -> None:
        steps.append(None)
        step_on_host(*args)

    with patch.object(StepOnHost, "step", counted):
        for step in range(STEPS):
            for micro_step in range(MICRO_STEPS):
                with handle.schedule.micro_step(boundary=micro_step == MICRO_STEPS - 1):
                    loss = model(tokens(3, seed=MICRO_STEPS * step + micro_step))
                    loss.backward()
                found.append(loss.detach())
            norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            assert norm.full_tensor() > 0.1  # it clips
            found.append(norm.full_tensor())
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad(), handle.schedule.cached_weights():
                found.append(model(tokens(3, seed=99)))
    found += [local(parameter) for parameter in model.parameters()]
    found += [local(v) for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    on_host = sum(map(len, map(shards_on_host, fsdp_modules(model).values())))
    return found, {"shards": on_host, "steps": len(steps), "parameters": len(list(model.parameters()))}


def local(tensor: Any) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor).detach()


def assert_same(with_host: Any, without: Any) -> None:
    for (ours, _), (theirs, nothing) in zip(with_host, without, strict=True):
        assert nothing["shards"] == nothing["steps"] == 0
        assert len(ours) == len(theirs) > 0
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def without(run_shared: Any) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def run(way: str, name: str) -> Any:
        make = OPTIMIZERS.get(name, adamw)
        if (way, name) not in known:
            known[way, name] = run_shared(4, partial(trained, WAYS[way], False, make))
        return known[way, name]

    return run


@pytest.mark.parametrize("offload", [True, "optimizer"])
@pytest.mark.parametrize("way", WAYS)
def test_losses_weights_and_states_are_those_without_offloading(
    way: str, offload: Any, run_shared: Any, without: Any
) -> None:
    with_host = run_shared(4, partial(trained, WAYS[way], offload, adamw))
    assert_same(with_host, without(way, "AdamW"))
    for _, seen in with_host:
        assert seen["shards"] == (seen["parameters"] if offload is True else 0)
        assert seen["steps"] == (STEPS if offload == "optimizer" else 0)


@pytest.mark.parametrize("offload", [True, "optimizer"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_on_the_host_as_on_the_device(
    name: str, offload: Any, run_shared: Any, without: Any
) -> None:
    with_host = run_shared(4, partial(trained, WAYS["all"], offload, OPTIMIZERS[name]))
    assert_same(with_host, without("all", name))
    assert all(seen["steps"] == (STEPS if offload == "optimizer" else 0) for _, seen in with_host)


def in_a_loop_of_its_own() -> tuple[int, list[str]]:
    """Steps on the host of an optimizer that nobody has adopted, and how its states are sharded."""
    model = TinyLM()
    handle = shard(model, offload="optimizer", partition_size=2)
    optimizer = adamw(model.parameters())
    with patch.object(StepOnHost, "finish", autospec=True, side_effect=StepOnHost.finish) as finish:
        for step in range(STEPS):
            with handle.schedule.micro_step(boundary=True):
                model(tokens(3, seed=step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    states = [state["exp_avg"] for state in optimizer.state.values()]
    return finish.call_count, sorted({str(state.placements) for state in states})


def test_an_optimizer_of_a_loop_of_your_own_steps_on_the_host_too(run_shared: Any) -> None:
    assert run_shared(4, in_a_loop_of_its_own) == [(STEPS, ["(Replicate(), Shard(dim=0))"])] * 4


def copied() -> bool:
    model = TinyLM()
    handle = shard(model, offload=True, partition_size=4)
    made = copy.deepcopy(model)
    assert sum(map(len, map(shards_on_host, fsdp_modules(made).values()))) == len(list(model.parameters()))
    for each in (model, made):
        optimizer = adamw(each.parameters())
        each(tokens(2)).backward()
        optimizer.step()
    assert handle.schedule is not None
    return all(torch.equal(local(a), local(b)) for a, b in zip(model.parameters(), made.parameters(), strict=True))


def test_copies_have_their_shards_in_host_memory_and_train_alike(run_shared: Any) -> None:
    assert all(run_shared(4, copied))


def moved() -> tuple[set[str], set[str]]:
    model = TinyLM()
    shard(model, offload=True, partition_size=2)
    with shards_stay(model):
        model.to("meta")
    assert "_apply" not in vars(model)
    return {p.device.type for p in model.parameters()}, {b.device.type for b in model.buffers()}


def test_shards_stay_where_they_are_when_the_rest_of_a_model_moves(run_shared: Any) -> None:
    assert run_shared(4, moved) == [({"cpu"}, {"meta"})] * 4


def reported(offload: Any) -> str:
    return str(shard(TinyLM(), offload=offload, partition_size=2).report)


@pytest.mark.parametrize(
    ("offload", "said"), [(True, "weights, gradients and optimizer states"), ("optimizer", "optimizer states, and")]
)
def test_the_start_report_tells_the_memory_of_the_host(offload: Any, said: str, run_shared: Any) -> None:
    (line,) = (line for line in run_shared(4, partial(reported, offload))[0].splitlines() if "on the host" in line)
    assert said in line and "per host of 4 ranks" in line
    bytes_per_rank = 16 * sum(p.numel() for p in TinyLM().parameters()) / 2
    assert f"about {4 * bytes_per_rank / 2**30:.3g} GiB of " in line
    assert not any("on the host" in row for row in run_shared(4, partial(reported, False))[0].splitlines())


def error_of(options: dict[str, Any], make_optimizer: Any = None) -> str:
    try:
        model = TinyLM()
        handle = shard(model, **options)
        if make_optimizer is not None:
            handle.schedule.optimizer_hooks.adopt(make_optimizer(model.parameters()))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Whole(torch.optim.SGD):
    """Says that it needs all rows."""

    needs_whole_parameters = True


def muon(parameters: Any) -> Any:
    return torch.optim.Muon([p for p in parameters if p.dim() == 2])


def capturable(parameters: Any) -> Any:
    optimizer = adamw(parameters)
    optimizer.param_groups[0]["capturable"] = True
    return optimizer


REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "another value": ({"offload": "states"}, None, "ValueError: offload='states' is none of True, False and"),
    "a number": ({"offload": 1}, None, "ValueError: offload=1 is none of True"),
    "slices ahead": (
        {"offload": True, "inter_node_prefetch": 1, "partition_size": 4},
        None,
        'ValueError: inter_node_prefetch=1 sends shards ahead from the device, .* or offload="optimizer"',
    ),
    "scaled losses": ({"offload": True, "precision": "16-mixed"}, None, "ValueError: offload=True has gradients on"),
    "LBFGS": ({"offload": "optimizer"}, torch.optim.LBFGS, "TypeError: LBFGS steps on one vector of all parameters"),
    "Muon": ({"offload": "optimizer"}, muon, "TypeError: Muon steps on whole matrices, .* torch.optim.AdamW"),
    "Adafactor": ({"offload": True}, torch.optim.Adafactor, "TypeError: Adafactor steps on whole parameters"),
    "all rows": ({"offload": "optimizer"}, Whole, "TypeError: Whole steps on whole parameters, .* leave offload out"),
    "CUDA graphs": (
        {"offload": True},
        capturable,
        r"ValueError: AdamW\(capturable=True\) is for steps in a CUDA graph",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_work_is_an_error_of_all_ranks_that_names_it(case: str, run_shared: Any) -> None:
    options, make_optimizer, message = REFUSED[case]
    errors = run_shared(4, partial(error_of, {"partition_size": 2, **options}, make_optimizer))
    assert len(set(errors)) == 1
    assert re.match(message, errors[0]), errors[0]


def with_little_memory() -> str:
    with patch.object(policy, "host_memory_bytes", lambda: 20_000):
        return error_of({"partition_size": 2, "offload": True})


def test_states_that_do_not_fit_the_host_are_an_error_before_sharding(run_shared: Any) -> None:
    (error,) = set(run_shared(4, with_little_memory))
    assert error.startswith("HostMemoryError: offload=True: model states of 4 ranks take ")
    assert "75% of what the smallest host has; use a larger partition_size" in error


def test_as_much_as_fits_the_host_is_no_error() -> None:
    check_host_memory("optimizer", rank_bytes=100, host_bytes=401, processes=3)
    with pytest.raises(host_memory.HostMemoryError, match="offload='optimizer': model states of 3 ranks take"):
        check_host_memory("optimizer", rank_bytes=101, host_bytes=401, processes=3)


def test_groups_of_gpus_get_gloo_for_what_is_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cuda:nccl")
    assert backends_with_host() == "cpu:gloo,cuda:nccl"
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    assert backends_with_host() is None


def seen_before_a_step() -> tuple[bool, bool]:
    """Whether a hook that comes first sees the weights of before a step on the host, and whether it changed them."""
    model = TinyLM()
    handle = shard(model, offload="optimizer", partition_size=2)
    optimizer = adamw(model.parameters())
    handle.schedule.optimizer_hooks.adopt(optimizer)
    weights, seen = next(model.parameters()), []
    call_first_before_step(optimizer, lambda *_: seen.append(local(weights).clone()))
    before = local(weights).clone()
    model(tokens(3)).backward()
    optimizer.step()
    return torch.equal(seen[0], before), not torch.equal(local(weights), before)


def test_what_waits_for_a_step_is_called_before_the_host_steps(run_shared: Any) -> None:
    assert run_shared(4, seen_before_a_step) == [(True, True)] * 4


def beside(what: str, offload: Any) -> list[Tensor]:
    """Losses and local weights of a rank whose program does something else as well."""
    torch.manual_seed(0)
    model = TinyLM()
    handle = shard(model, offload=offload, partition_size=4)
    if what == "compiled blocks":
        for block in model.blocks:
            block.compile(backend="aot_eager")
    optimizer = adamw(model.parameters())
    average: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    found = []
    for step in range(STEPS):
        with handle.schedule.micro_step(boundary=True):
            loss = model(tokens(3, seed=step))
            if what == "weights used directly":
                loss = loss + model.blocks[0].up(torch.ones(1, 7)).sum()
                loss = loss + sum(parameter.square().sum() for parameter in model.parameters())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        found.append(loss.detach())
    weights = [*model.parameters(), *(average.parameters() if what == "an average" else ())]
    return found + [local(parameter).clone() for parameter in weights]


@pytest.mark.parametrize("what", ["compiled blocks", "weights used directly", "an average"])
def test_compilation_direct_use_and_averages_work_beside_it(what: str, run_shared: Any) -> None:
    without, *others = (run_shared(4, partial(beside, what, offload)) for offload in (False, True, "optimizer"))
    for ours in others:
        for one, other in zip(ours, without, strict=True):
            assert len(one) == len(other) and all(map(torch.equal, one, other))
