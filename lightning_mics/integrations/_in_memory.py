"""In-memory checkpoints of a job, whatever runs its steps: which keepers it has, and what to do where none is whole.

The Trainer finds the step to resume from by itself (:mod:`~lightning_mics.integrations.trainer.in_memory`). In a loop
that the user writes, with Fabric or Accelerate, :class:`InMemoryLoop` saves and loads where the loop says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_mics._torch.optimizers.steps import call_first_before_step
from lightning_mics.checkpoint import FullNames, random_states
from lightning_mics.collectives.agreement import on_all_ranks
from lightning_mics.in_memory.job import InMemoryJob
from lightning_mics.in_memory.keeper.memory import Stamp
from lightning_mics.in_memory.launcher import end_launcher_with_this_rank
from lightning_mics.in_memory.orphans import end_workers_with_this_rank
from lightning_mics.in_memory.reading import InMemoryCheckpoint
from lightning_mics.integrations._keeper import STARTED, keeper_settings, launcher_process
from lightning_mics.sharding.sharded import Sharded
from lightning_mics.topology import Topology

RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")  # more than zero in a job that was started again
FINISHED = "MICS_FIT_HAS_FINISHED"  # set by this process for itself: what it trains next was not restarted


class StepInMemory(str):
    """The name of a step in memory, where the path of a checkpoint is expected.

    Attributes:
        stamp: The step.
    """

    stamp: Stamp

    @classmethod
    def of(cls, stamp: Stamp) -> StepInMemory:
        """The name of a step."""
        name = cls(f"step {stamp.step} in the memory of the nodes")
        name.stamp = stamp
        return name


class NoWholeStepError(RuntimeError):
    """A restarted job finds no step from which all ranks can resume."""

    raised_by_all_ranks = True
    comes_again = True  # if the job is started again: see `in_memory.launcher`


class UnfitRanksError(ValueError):
    """The options of a job do not fit its ranks, such as those that are left after a death."""

    comes_again = True


@contextmanager
def fits_the_ranks() -> Iterator[None]:
    """Say inside what to change where nodes may have died, and let torchrun end rather than start the same again.

    Raises:
        UnfitRanksError: If the options do not fit the ranks, under torchrun.
    """
    launcher = launcher_process(os.environ)
    if launcher is None:
        yield
        return
    end_launcher_with_this_rank(launcher)
    try:
        yield
    except ValueError as error:
        raise UnfitRanksError(
            f"{error}. If nodes have died: a job goes on without them only where partition_size fits all numbers of "
            "nodes that --nnodes allows; else keep --nnodes at one number, and start spare nodes"
        ) from error


class StartedJob:
    """The keepers of a job and whether it was started again; every rank makes it, when process groups exist.

    Args:
        local_size: Number of ranks on each host.

    Attributes:
        job: In-memory checkpoints of the job.
        local_size: Number of ranks on each host.
    """

    def __init__(self, *, local_size: int) -> None:
        end_workers_with_this_rank()
        if (launcher := launcher_process(os.environ)) is not None:
            end_launcher_with_this_rank(launcher)
        nodes = dist.get_world_size() // local_size
        settings = on_all_ranks(lambda: keeper_settings(os.environ, nodes=nodes))
        own = settings[0 if nodes == 1 else dist.get_rank()]  # a single node's name is that of rank 0's launcher
        self.local_size = local_size
        self.job = InMemoryJob(own, local_size=local_size, starts_keepers=STARTED not in os.environ)
        self._restarts = max(on_all_ranks(_restarts))
        _warn_of_launcher(nodes)

    @property
    def has_lost_steps(self) -> bool:
        """Whether the job was started again, and no step of before is whole."""
        holdings = self.job.holdings
        if holdings.newest is not None:
            return False
        return holdings.newest_in_part is not None or bool(self.job.all_keepers_are_new and self._restarts)

    def tell_of_other_ranks(self) -> None:
        """Warn if the newest whole step is one of another number of ranks."""
        whole, now = self.job.holdings.newest, dist.get_world_size()
        if whole is not None and whole.world_size != now:
            rank_zero_warn(
                f"the job goes on with {now} ranks after {whole.world_size}: from the same states, but with sums in "
                "another order and other random numbers, so not with the same bits"
            )

    def why(self) -> str:
        """Why there is nothing to resume from, in words, if steps were lost."""
        seen = self.job.holdings.fullest
        if seen is None:
            found = "its nodes' memory holds nothing"
        else:
            missing = [
                f"the {kind} part of rank {rank} (node {rank // self.local_size})"
                for kind, rank in self.job.holdings.missing(seen)
            ]
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            found = f"of step {seen.step}, of which most is left, {', '.join(missing[:3])}{more} is lost"
        return (
            f"the job was started again, and no step can be resumed from: {found}. Nodes that held the same bytes have "
            "died together"
        )

    def begin(self, topology: Topology, *, device: torch.device) -> Topology:
        """Prepare to save, when the model is sharded; every rank calls it.

        Args:
            topology: Positions of all ranks, as they were sharded.
            device: Device of this rank.

        Returns:
            The positions with the hosts as nodes.
        """
        hosts = Topology(
            world_size=topology.world_size, ranks_per_node=self.local_size, partition_size=topology.partition_size
        )
        self.job.begin(hosts, device=device)
        return hosts

    def report_saved(self, every: str) -> None:
        """Say once what saving takes; every rank calls it, after the first save.

        Args:
            every: When a step is saved, in words.
        """
        on_all_ranks(self.job.saver.wait_until_protected)
        self.report(every, max(on_all_ranks(self.job.node_bytes)))

    def report(self, every: str, per_node: int) -> None:
        """Say what saving takes.

        Args:
            every: When a step is saved, in words.
            per_node: Bytes of host memory.
        """
        several = dist.get_world_size() > self.local_size
        where = "on two nodes" if several else "on this node only: it survives the death of ranks, not of the node"
        rank_zero_info(f"in-memory checkpoint: {every}, {where}; {per_node / 2**30:.3g} GiB of host memory per node")

    def close(self, *, finished: bool) -> None:
        """Close the connections; every rank calls it.

        Args:
            finished: Whether training has ended by itself, so that keepers end too.
        """
        self.job.close(finished=finished)
        if finished:
            os.environ[FINISHED] = "1"


class InMemoryLoop:
    """In-memory checkpoints of a loop that the user writes; every rank makes it, once the model is sharded.

    Args:
        handle: The sharded model's groups.
        local_size: Number of ranks on each host.
        device: Device of this rank.
    """

    def __init__(self, handle: Sharded, *, local_size: int, device: torch.device) -> None:
        self._topology = handle.groups.topology
        self._control = handle.groups.control
        self._device = device
        self._started = StartedJob(local_size=local_size)
        self._step = 0
        self._is_ready = False
        self._hooked: list[Optimizer] = []
        self._steps = 0  # of the first optimizer since the last save
        self._steps_between = 1  # of the last two saves

    def load(
        self,
        fill: Callable[[InMemoryCheckpoint, dict[str, Tensor]], Mapping[str, Any]],
        *,
        weights_only: bool,
    ) -> Mapping[str, Any] | None:
        """Resume from the newest step that is whole, if this is a restart; every rank calls it, before the first save.

        The states of random number generators are set as they were on each rank.

        Args:
            fill: Function that loads an open checkpoint and this rank's own tensors, and returns the other entries.
            weights_only: Whether entries other than tensors must be plain data.

        Returns:
            What ``fill`` returns; None if the job begins anew.

        Raises:
            NoWholeStepError: On all ranks, if steps of before are lost. The loop may load a checkpoint of a disk then,
                and go on.
            RuntimeError: If a step was saved already.
        """
        if self._is_ready:
            raise RuntimeError("load_from_memory comes before the first save_in_memory, once")
        job, whole = self._started.job, self._started.job.holdings.newest
        if whole is None:
            self._begin()
            if self._started.has_lost_steps:
                raise NoWholeStepError(f"{self._started.why()}: load the newest checkpoint of a disk instead")
            return None
        self._started.tell_of_other_ranks()
        name = StepInMemory.of(whole)
        own = random_states.capture()
        rest = fill(job.open(whole, name=name, weights_only=weights_only), own)
        rank, size = dist.get_rank(), dist.get_world_size()
        if whole.world_size == size:
            random_states.restore(own)
        else:
            random_states.branch(own, rank=rank, world_size=size)
        self._step = whole.step
        self._begin()
        job.save_again()
        rank_zero_info(f"Resumed from {name}")
        return rest

    def save(
        self,
        *,
        model_state: dict[str, Any],
        optimizer_states: list[dict[str, Any]],
        meta: dict[str, Any],
        optimizers: Iterable[Optimizer],
        names: FullNames | None = None,
    ) -> None:
        """Save an optimizer step that has just ended, beside what follows; every rank calls it.

        Args:
            model_state: Tensors by FQN; sharded ones are DTensors.
            optimizer_states: States of the optimizers.
            meta: Entries that are not sharded; rank 0's are saved.
            optimizers: Optimizers whose next step waits until their tensors are copied.
            names: The user's keys of the model and the optimizers, if they have any.

        Raises:
            RuntimeError: If there is a step of before that was not loaded.
            HostMemoryError: On all ranks, if the hosts have too little memory; at the first save.
        """
        if not self._is_ready:
            if (whole := self._started.job.holdings.newest) is not None:
                raise RuntimeError(
                    f"{StepInMemory.of(whole)} was not loaded: call load_from_memory before the first save_in_memory"
                )
            self._begin()
        for optimizer in optimizers:
            if all(optimizer is not known for known in self._hooked):
                call_first_before_step(optimizer, self._before_step)
                self._hooked.append(optimizer)
        saver = self._started.job.saver
        first = saver.slot_bytes == 0
        newest = torch.tensor([-saver.wait_until_protected()])
        protected = self._control.begin_largest(newest, "saves a step in memory")
        self._step, self._steps_between, self._steps = self._step + 1, max(1, self._steps), 0
        self._started.job.save(
            self._step,
            model_state=model_state,
            optimizer_states=optimizer_states,
            meta=meta,
            rank_state=random_states.capture(),
            names=names,
            read_protected=lambda: -int(protected().item()),
        )
        if first:
            self._started.report_saved("where the loop saves")

    def end(self) -> None:
        """End the keepers, when training is done; every rank calls it."""
        self._started.close(finished=True)

    def _begin(self) -> None:
        self._started.begin(self._topology, device=self._device)
        self._is_ready = True

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """What is saved has been copied, and on two nodes before a step that is expected to be saved as well."""
        self._steps += optimizer is self._hooked[0]
        if self._steps >= self._steps_between:
            self._started.job.saver.wait_until_protected()
        else:
            self._started.job.saver.confirm(wait=True)


def _restarts() -> int:
    """How often the job was started again since its last training has begun."""
    return 0 if FINISHED in os.environ else max(int(os.environ.get(name, 0)) for name in RESTARTS)


def _warn_of_launcher(nodes: int) -> None:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and nodes > 1:
        rank_zero_warn(
            "torchrun shares its store with the ranks, and neither a restart nor a new node works then (torch 2.13): "
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the launch script"
        )
    if "TORCHELASTIC_RUN_ID" not in os.environ and "SLURM_JOB_ID" not in os.environ:
        rank_zero_warn(
            "in-memory checkpoints: nothing starts ranks again under this launcher; use torchrun with --max-restarts"
        )
