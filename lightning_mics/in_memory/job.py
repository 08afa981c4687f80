"""In-memory checkpoints of one job: its ranks meet their keepers, agree on a step to resume from, and save again.

::

    start     each node's first rank starts its keeper, or finds it     all compare what the keepers hold
              newest whole step?   load it, on any number of ranks      save it again: the new node holds its part
    training  every step: see `saver`
    end       keepers end
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics._torch.host_memory import USABLE_SHARE, HostMemoryError, host_memory_bytes
from lightning_mics.checkpoint.content.entries import ShardedEntries
from lightning_mics.checkpoint.content.layout import LAYOUT_KEY, FullNames, Layout
from lightning_mics.checkpoint.saving import serialized
from lightning_mics.collectives.agreement import on_all_ranks
from lightning_mics.in_memory.holdings import Holdings
from lightning_mics.in_memory.keeper.client import KeeperSettings, connect_or_start
from lightning_mics.in_memory.keeper.memory import Stamp
from lightning_mics.in_memory.plan import BLOB_BYTES, Holders, Plan
from lightning_mics.in_memory.reading import InMemoryCheckpoint, Keepers
from lightning_mics.in_memory.saver import NOTHING, StepSaver
from lightning_mics.in_memory.table import joined
from lightning_mics.topology import Topology

SLOTS = 2  # of each rank
PRIVATE_BYTES = 2**15  # about the states of a rank's random number generators


@dataclass(frozen=True)
class _Answer:
    """What a node's first rank says of its keeper."""

    address: tuple[str, int]
    held: list[dict[str, Any]]
    is_new: bool


class InMemoryJob:
    """The keepers of a job that starts, and what they hold; every rank makes it.

    Args:
        settings: Settings of this node's keeper.
        local_size: Number of ranks on each node.
        starts_keepers: Whether each node's first rank starts its keeper if there is none; else ranks wait for it.

    Attributes:
        holdings: What all keepers hold.
        resumed: Step that the job resumes from; None until one is loaded.

    Raises:
        KeeperError: On all ranks, if a keeper cannot be started or reached.
    """

    def __init__(self, settings: KeeperSettings, *, local_size: int, starts_keepers: bool = True) -> None:
        self._settings = settings
        self._starts_keepers = starts_keepers
        self._rank, self._world_size, self._local_size = dist.get_rank(), dist.get_world_size(), local_size
        answers: list[_Answer | None] = on_all_ranks(self._meet)
        of_nodes = [answer for answer in answers if answer is not None]
        self.holdings = Holdings.of([answer.held for answer in of_nodes])
        self.all_keepers_are_new = all(answer.is_new for answer in of_nodes)
        self._generation = self.holdings.next_generation
        self._addresses = [answer.address for answer in of_nodes]
        self._keepers = Keepers(
            self._addresses,
            own=self._connection,
            own_node=self._rank // local_size,
            is_first=self._rank % local_size == 0,
            token=settings.token,
        )
        self._saver: StepSaver | None = None
        self._loaded: InMemoryCheckpoint | None = None
        self.resumed: Stamp | None = None

    def _meet(self) -> _Answer | None:
        first = self._rank % self._local_size == 0
        self._connection = connect_or_start(self._settings, starts=first and self._starts_keepers)
        answer, _ = self._connection.ask({"do": "hello", "rank": self._rank})
        if not first:
            return None
        held, _ = self._connection.ask({"do": "list"})
        return _Answer((str(answer["host"]), int(answer["port"])), held["held"], bool(answer["is_new"]))

    def open(self, stamp: Stamp, *, name: Any, weights_only: bool) -> InMemoryCheckpoint:
        """Open a step; every rank calls it.

        Args:
            stamp: A whole step of the holdings.
            name: Name, for messages.
            weights_only: Whether entries other than tensors must be plain data.

        Raises:
            DamagedCheckpointError: If no node has a part undamaged.
        """
        nodes = self.holdings.nodes[stamp]
        self._loaded = InMemoryCheckpoint.open(name, self._keepers, stamp, nodes, weights_only=weights_only)
        self.resumed = stamp
        return self._loaded

    # -- saving --------------------------------------------------------------------------------------------------------

    def begin(self, topology: Topology, *, device: torch.device) -> None:
        """Prepare to save, once the model is sharded; every rank calls it.

        Args:
            topology: Positions of all ranks, with the hosts as nodes.
            device: Device of this rank.
        """
        node, offset = self._rank // self._local_size, Holders.of(topology).node_offset
        copies, watched = (self._address(node + distance) if offset else None for distance in (offset, 1))
        if self._rank % self._local_size == 0:
            self._connection.ask({"do": "peers", "target": copies, "watched": watched, "generation": self._generation})
        self._saver = StepSaver(
            self._connection,
            rank=self._rank,
            world_size=self._world_size,
            generation=self._generation,
            plan=Plan(rank=self._rank, topology=topology),
            device=device,
            protected_step=NOTHING if self.resumed is None else self.resumed.step,
        )

    def _address(self, node: int) -> tuple[str, int]:
        return self._addresses[node % len(self._addresses)]

    @property
    def saver(self) -> StepSaver:
        """What saves steps, after :meth:`begin`."""
        assert self._saver is not None
        return self._saver

    def save(
        self,
        step: int,
        *,
        model_state: dict[str, Any],
        optimizer_states: list[dict[str, Any]],
        meta: dict[str, Any],
        rank_state: Mapping[str, Tensor],
        read_protected: Callable[[], int],
        names: FullNames | None = None,
    ) -> None:
        """Save a step beside what follows; every rank calls it.

        Args:
            step: Number of optimizer steps done.
            model_state: Tensors by FQN; sharded ones are DTensors.
            optimizer_states: States of the optimizers, each from
                :func:`~lightning_mics.checkpoint.optimizer_states.optimizer_state`.
            meta: Entries that are not sharded; rank 0's are saved.
            rank_state: Tensors of this rank alone.
            read_protected: See :meth:`StepSaver.save`.
            names: The user's keys of the model and the optimizers, if they have any.

        Raises:
            HostMemoryError: On all ranks, if the hosts have too little memory; at the first save.
        """
        plan, layout, entries = self.saver.plan, Layout(names=names), ShardedEntries.of(meta)
        states = layout.describe(model_state, optimizer_states)
        objects = plan.update({**states, **entries.tensors()}, private=rank_state)
        first = not self.saver.slot_bytes
        if self._rank == 0:
            with entries.as_calls():
                pickled = serialized({**meta, LAYOUT_KEY: layout.plain()}, warns=first)
            plan.set_blob(joined(_pickled(objects), pickled))
        if first:
            self._check_memory(self._slot_bytes())
        self.saver.save(step, read_protected=read_protected)

    def expect(self, shard_bytes: int, topology: Topology) -> int:
        """Compare what steps will take with the hosts' memory, before there is one; every rank calls it.

        Args:
            shard_bytes: Bytes of this rank's weights and optimizer states.
            topology: Positions of all ranks, with the hosts as nodes.

        Returns:
            The most bytes of a node.

        Raises:
            HostMemoryError: On all ranks, if the hosts have too little memory.
        """
        private = PRIVATE_BYTES + (0 if self._rank else BLOB_BYTES)
        return self._check_memory(Holders.of(topology).copies * (shard_bytes // topology.replicas + private))

    def _slot_bytes(self) -> int:
        """Bytes of this rank's parts, and of those that it sends, in one slot."""
        own = {(part.kind, part.rank): part.layout().capacity_bytes for part in self.saver.plan.parts}
        sent = sum(own[key] for key in [("private", self._rank), *self.saver.plan.forwarded])
        return sum(own.values()) + (sent if len(self._addresses) > 1 else 0)

    def _check_memory(self, slot_bytes: int) -> int:
        """Compare the memory that two steps take on each node with what there is; every rank calls it."""
        of_ranks = on_all_ranks(lambda: (slot_bytes, _usable_bytes()))
        most = 0
        for first in range(0, self._world_size, self._local_size):
            of_node = of_ranks[first : first + self._local_size]
            needed, usable = SLOTS * sum(size for size, _ in of_node), min(size for _, size in of_node)
            most = max(most, needed)
            if needed > usable:
                raise HostMemoryError(
                    f"in_memory_checkpoint takes {needed / 2**30:.3g} GiB of host memory per node, for two steps of "
                    f"two nodes, and {usable / 2**30:.3g} GiB may be used ({USABLE_SHARE:.0%} of what the host or its "
                    "control group has). It is less on more nodes, and half in bfloat16; or leave the option out"
                )
        return most

    def save_again(self) -> None:
        """Save the step that was loaded, before the first new one: a new node does not hold its part yet.

        Every rank calls it, after :meth:`begin`. A step of another number of ranks stays where it is, until all ranks
        have a new one.
        """
        stamp, loaded, self._loaded = self.resumed, self._loaded, None
        if loaded is None or stamp is None or stamp.world_size != self._world_size:
            return
        parts = [loaded.parts[key] for key in self.saver.plan.keys]
        on_all_ranks(lambda: self.saver.copy(stamp, parts))
        if self._rank % self._local_size == 0:
            self._connection.ask({"do": "forget", "before": self._generation})

    def node_bytes(self) -> int:
        """Memory of this node's keeper, bytes; 0 except on a node's first rank."""
        if self._rank % self._local_size:
            return 0
        status, _ = self._connection.ask({"do": "status"})
        return sum(int(area["bytes"]) for area in status["areas"])

    def close(self, *, finished: bool) -> None:
        """Close the connections; every rank calls it.

        Args:
            finished: Whether the job is done, so that keepers end.
        """
        if self._saver is not None and finished:
            on_all_ranks(self._saver.wait_until_protected)  # keepers need each other until then
        if finished and self._rank % self._local_size == 0:
            self._connection.ask({"do": "stop"})
        self._keepers.close()
        if self._saver is not None:
            self._saver.close()
        else:
            self._connection.close()


def _usable_bytes() -> int:
    return int(USABLE_SHARE * host_memory_bytes())


def _pickled(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
