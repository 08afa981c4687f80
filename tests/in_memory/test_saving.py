"""A step that was saved in memory is loaded as it was, from whichever node has it undamaged."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from lightning_mics import Topology, create_partition_groups, shard_model
from lightning_mics.checkpoint.errors import DamagedCheckpointError
from lightning_mics.checkpoint.loading import load_model, load_optimizers, load_rank_state, mesh_of
from lightning_mics.checkpoint.opening import open_sharded
from lightning_mics.checkpoint.optimizer_states import optimizer_state
from lightning_mics.in_memory.job import InMemoryJob
from lightning_mics.in_memory.keeper.client import KeeperConnection, KeeperSettings
from tests.support.fits import refusal
from tests.support.forked import run_cases
from tests.support.models import TinyLM, tokens

STEP = 7


def settings(name: str) -> KeeperSettings:
    """Each rank is a node of its own."""
    return KeeperSettings(f"{name}-{dist.get_rank()}", "secret", "127.0.0.1")


class WithFewRows(TinyLM):
    """A matrix of one row, which two ranks share by columns."""

    def __init__(self) -> None:
        super().__init__(dim=64)
        self.narrow = nn.Parameter(torch.randn(1, 64))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.narrow.square().sum()


class Training:
    """A model and an optimizer with states, after a step on other data for each seed."""

    def __init__(self, partition_size: int, *, seed: int) -> None:
        torch.manual_seed(0)
        self.topology = Topology(world_size=dist.get_world_size(), ranks_per_node=1, partition_size=partition_size)
        self.model = WithFewRows()
        schedule = shard_model(self.model, create_partition_groups(self.topology, device_type="cpu"))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        with schedule.micro_step(boundary=True):
            self.model(tokens(4, seed=seed)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self) -> list[Tensor]:
        """All weights and states, this rank's shards."""
        states = [value for state in self.optimizer.state.values() for _, value in sorted(state.items())]
        tensors: list[Any] = [*self.model.state_dict().values(), *states]
        return [(t.to_local() if hasattr(t, "to_local") else t).detach().clone() for t in tensors]

    def save(self, job: InMemoryJob) -> None:
        """Save it, and wait until it is on two nodes."""
        job.begin(self.topology, device=torch.device("cpu"))
        job.save(
            STEP,
            model_state=get_model_state_dict(self.model),
            optimizer_states=[optimizer_state(self.model, self.optimizer, sharded=True)],
            meta={"global_step": STEP, "note": ["plain", 1.5]},
            rank_state={"own": torch.full((3,), dist.get_rank())},
            read_protected=lambda: -1,
        )
        job.saver.confirm(wait=True)
        assert job.saver.wait_until_protected() == STEP

    def load(self, job: InMemoryJob) -> dict[str, Any]:
        """Load the newest whole step."""
        stamp = job.holdings.newest
        assert stamp is not None
        stored = job.open(stamp, name=Path("step in memory"), weights_only=True)
        opened = open_sharded(stored, mesh=lambda: mesh_of(self.model), weights_only=True)
        load_optimizers(opened, [(self.optimizer, opened.optimizers[0])], model=self.model)
        load_model(opened, model=self.model, strict=True)
        own = {"own": torch.zeros(3, dtype=torch.int64)}
        load_rank_state(opened, own)
        assert own["own"].tolist() == 3 * [dist.get_rank()]
        return opened.entries


def flip(job: InMemoryJob, part: int) -> None:
    """Change a byte in the middle of a part of this rank's slot that holds the step."""
    slots = job.saver._slots
    assert slots is not None
    sizes = [part.used_bytes for part in job.saver.plan.parts]
    for view in slots._views:
        view[slots._first[part] + sizes[part] // 2] ^= 1


def saved_and_loaded(partition_size: int, damage: Callable[[InMemoryJob], None]) -> tuple[str, bool]:
    """The error of loading after some damage, and whether what was loaded is what was saved."""
    name = [secrets.token_hex(4)]
    dist.broadcast_object_list(name)
    saved = Training(partition_size, seed=1)
    job = InMemoryJob(settings(name[0]), local_size=1)
    saved.save(job)
    expected = saved.values()
    damage(job)
    dist.barrier()
    job.close(finished=False)
    other, again = Training(partition_size, seed=2), InMemoryJob(settings(name[0]), local_size=1)
    assert any(not torch.equal(a, b) for a, b in zip(expected, other.values(), strict=True))
    error = refusal(lambda: told(lambda: other.load(again)))
    equal = all(torch.equal(a, b) for a, b in zip(expected, other.values(), strict=True))
    dist.barrier()
    KeeperConnection.local(settings(name[0])).ask({"do": "stop"})
    return error, equal


def told(load: Callable[[], Any]) -> None:
    """Load, and say whether another start would raise the error too."""
    try:
        load()
    except DamagedCheckpointError as error:
        error.args = (f"{error} comes again: {error.comes_again}",)
        raise


def on_rank_0(damage: Callable[[InMemoryJob], None]) -> Callable[[InMemoryJob], None]:
    return lambda job: damage(job) if dist.get_rank() == 0 else None


def own_and_the_replicas(job: InMemoryJob) -> None:
    """Damage the rows of rank 0, in its own slot and in that of rank 1, which holds the same shard."""
    flip(job, 1 if dist.get_rank() == 0 else 2)


def test_what_is_saved_is_loaded_from_a_node_that_has_it_undamaged() -> None:
    cases = {
        "one replica": partial(saved_and_loaded, 2, lambda job: None),
        "two replicas": partial(saved_and_loaded, 1, lambda job: None),
        "one replica, rows damaged": partial(saved_and_loaded, 2, on_rank_0(lambda job: flip(job, 1))),
        "two replicas, rows damaged": partial(saved_and_loaded, 1, on_rank_0(lambda job: flip(job, 1))),
        "entries damaged": partial(saved_and_loaded, 1, on_rank_0(lambda job: flip(job, 0))),
        "both damaged": partial(saved_and_loaded, 1, own_and_the_replicas),
    }
    found = run_cases(2, cases)
    damaged = found.pop("both damaged")
    for case, results in found.items():
        assert results == 2 * [("nothing was refused", True)], case
    assert all(error.startswith("DamagedCheckpointError: step 7 in memory is corrupted: ") for error, _ in damaged)
    assert all("node 0 has it altered" in error and "node 1 has it altered" in error for error, _ in damaged)
    assert all(error.endswith("comes again: True") for error, _ in damaged)  # so the launcher ends
