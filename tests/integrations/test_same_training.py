"""The same training under every host: Trainer, Fabric, Accelerate, and plain ``shard_model``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.fabric import Fabric
from torch import Tensor

from lightning_mics import MiCSFabricStrategy, Topology, create_partition_groups, shard_model
from lightning_mics.integrations.accelerate import MiCSPlugin
from tests.support.campaign import campaign
from tests.support.models import TinyModule, tokens
from tests.support.recorded import RecordCollectives
from tests.support.trainers import cases_on_ranks, make_trainer, mics

STEPS, LR = 3, 0.1


EVERY_TIME = {"in_node_gather": "every_use", "in_node_reduce": "every_micro_step"}


ONCE = {"cross_node_gather": "once_per_step", "cross_node_reduce": "once_per_step", **EVERY_TIME}


NEVER_ONCE = {"cross_node_gather": "every_use", "cross_node_reduce": "every_micro_step", **EVERY_TIME}


POLICIES: dict[str, dict[str, Any]] = {
    "2 of 4": {"partition_size": 2, **EVERY_TIME},
    "4 of 4, flat": {"partition_size": 4, "hierarchical": False, **EVERY_TIME},
    "4 of 4, hierarchical": {"partition_size": 4, **NEVER_ONCE},
    "4 of 4, once per step": {"partition_size": 4, **ONCE},
    "4 of 4, once per step everywhere": {
        "partition_size": 4,
        "in_node_gather": "once_per_step",
        "in_node_reduce": "once_per_step",
    },
}


def batches(rank: int, micro_steps: int) -> list[Tensor]:
    return [tokens(2, seed=100 * rank + index) for index in range(STEPS * micro_steps)]


def model() -> TinyModule:
    torch.manual_seed(1)
    return TinyModule(lr=LR)


def plain(policy: dict[str, Any], micro_steps: int, _folder: Path) -> list[float]:
    options = copy.copy(policy)
    topology = Topology(world_size=4, ranks_per_node=2, partition_size=options.pop("partition_size"))
    groups = create_partition_groups(topology, device_type="cpu", hierarchical=options.pop("hierarchical", "auto"))
    net = model()
    if options.get("in_node_gather") == "once_per_step":
        options |= {"cross_node_gather": "once_per_step", "cross_node_reduce": "once_per_step"}
    schedule = shard_model(net, groups, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    losses = []
    for index, batch in enumerate(batches(dist.get_rank(), micro_steps), start=1):
        boundary = index % micro_steps == 0
        with schedule.micro_step(boundary=boundary):
            loss = net(batch)
            (loss / micro_steps).backward()
        losses.append(loss.item())
        if boundary:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def fabric(policy: dict[str, Any], micro_steps: int, _folder: Path) -> list[float]:
    host = Fabric(accelerator="cpu", devices=4, strategy=MiCSFabricStrategy(ranks_per_node=2, **policy))
    host.launch()
    net = model()
    net, optimizer = host.setup(net, torch.optim.SGD(net.parameters(), lr=LR))
    losses = []
    for index, batch in enumerate(batches(host.global_rank, micro_steps), start=1):
        boundary = index % micro_steps == 0
        with host.no_backward_sync(net, enabled=not boundary):
            loss = net(batch)
            host.backward(loss / micro_steps)
        losses.append(loss.item())
        if boundary:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def hf_accelerate(policy: dict[str, Any], micro_steps: int, _folder: Path) -> list[float]:
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = MiCSPlugin(ranks_per_node=2, **policy)
    host = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=micro_steps)
    net = model()
    net, optimizer = host.prepare(net, torch.optim.SGD(net.parameters(), lr=LR))
    losses = []
    for batch in batches(host.process_index, micro_steps):
        with host.accumulate(net):
            loss = net(batch)
            host.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class Recorded(TinyModule):
    """Keeps its losses."""

    def on_fit_start(self) -> None:
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch)
        self.losses.append(loss.item())
        return loss


def trainer(policy: dict[str, Any], micro_steps: int, folder: Path) -> list[float]:
    torch.manual_seed(1)
    net = Recorded(lr=LR)
    make_trainer(
        folder,
        strategy=mics(**policy),
        accumulate_grad_batches=micro_steps,
        use_distributed_sampler=False,
        enable_model_summary=False,
    ).fit(net, torch.utils.data.DataLoader(batches(dist.get_rank(), micro_steps), batch_size=None))
    return net.losses


HOSTS: dict[str, Callable[..., list[float]]] = {
    "plain": plain,
    "fabric": fabric,
    "accelerate": hf_accelerate,
    "trainer": trainer,
}


def of_training(seen: list[Any]) -> list[Any]:
    """Neither barriers, nor what is agreed on before training: shapes, seeds, first weights, memory."""
    first_gather = next(index for index, one in enumerate(seen) if one.kind == "all_gather" and one.nbytes > 64)
    kinds = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce")
    return [one for one in seen[first_gather:] if one.kind in kinds and one.nbytes > 64]


def run_under_all(policy: dict[str, Any], micro_steps: int, folder: Path) -> dict[str, Any]:
    results = {}
    for name, run in HOSTS.items():
        with RecordCollectives() as recorded:
            losses = run(policy, micro_steps, folder)
        results[name] = losses, of_training(recorded.seen)
    return results


CASES = list(product(POLICIES, (1, 4)))


def is_left_to_the_campaign(policy: str, micro_steps: int) -> bool:
    """Without accumulation, policies differ in what one micro-step with a boundary shows as well."""
    return micro_steps == 1 and policy != "4 of 4, once per step"


@pytest.fixture(scope="module")
def trained(in_campaign: bool, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    """By case, what each rank has seen under each integration."""
    folder = tmp_path_factory.mktemp("trained")
    cases = [case for case in CASES if in_campaign or not is_left_to_the_campaign(*case)]
    return cases_on_ranks({(p, s): partial(run_under_all, POLICIES[p], s, folder) for p, s in cases}, timeout=280)


@pytest.mark.parametrize(
    ("policy", "micro_steps"), [campaign(*case) if is_left_to_the_campaign(*case) else case for case in CASES]
)
def test_all_hosts_train_the_same_with_the_same_collectives(
    policy: str, micro_steps: int, trained: dict[Any, list[Any]]
) -> None:
    for results in trained[policy, micro_steps]:
        losses, collectives = results["plain"]
        assert len(losses) == STEPS * micro_steps and losses[-1] != losses[0]
        assert collectives
        for other_losses, other_collectives in results.values():
            assert other_losses == pytest.approx(losses, abs=1e-6)
            assert other_collectives == collectives
