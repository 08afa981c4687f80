"""The seconds that a job communicates per optimizer step, where the rates of its links are known.

A strategy knows neither activations nor FLOPs, so it cannot tell how much communication hides behind arithmetic. But
whatever share that is, less communication takes no longer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lightning_mics.cost.hardware import Links
from lightning_mics.cost.step_time import collective_seconds
from lightning_mics.cost.step_traffic import Unit, step_traffic
from lightning_mics.sharding.options import CommunicationOptions
from lightning_mics.topology import Topology

# Micro-steps per optimizer step where nobody says how many there are: the fewest in which all that accumulation saves
# is worth something. With one only, caches and sums that are not needed take memory that nothing else was given.
UNKNOWN_MICRO_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class CommunicationTime:
    """The communication of an optimizer step, none of it hidden.

    Attributes:
        inside: Seconds of collectives inside nodes.
        between: Seconds of inter-node collectives.
        between_bytes: Bytes that a node sends to others.
    """

    inside: float
    between: float
    between_bytes: float

    @property
    def seconds(self) -> float:
        """Seconds of all collectives."""
        return self.inside + self.between

    @property
    def limit(self) -> str:
        """Name of what takes longer: "links in nodes" or "network"."""
        return "network" if self.between > self.inside else "links in nodes"


@dataclass(frozen=True, kw_only=True)
class Pricing:
    """A model on links with known rates: prices any way to shard it.

    Attributes:
        units: Parameter groups of the model, from :func:`~lightning_mics.cost.step_traffic.find_units`.
        gathered_dtype: Dtype of unsharded parameters.
        reduce_dtype: Dtype of gradient sums.
        links: Links of each node.
        micro_steps: Micro-steps per optimizer step.
    """

    units: tuple[Unit, ...] = field(repr=False)
    gathered_dtype: torch.dtype
    reduce_dtype: torch.dtype
    links: Links
    micro_steps: int = UNKNOWN_MICRO_STEPS

    def time(self, topology: Topology, options: CommunicationOptions) -> CommunicationTime:
        """The communication of an optimizer step.

        Args:
            topology: Topology of the job.
            options: Options of the collectives, without "auto".
        """
        traffic = step_traffic(
            self.units,
            topology,
            communication=options,
            gathered_dtype=self.gathered_dtype,
            reduce_dtype=self.reduce_dtype,
        )
        seconds = {True: 0.0, False: 0.0}  # by whether nodes are left
        for repeated in traffic:
            of_one = collective_seconds(repeated.collective, self.links, ranks_per_node=topology.ranks_per_node)
            seconds[repeated.collective.nodes > 1] += repeated.in_step(self.micro_steps) * of_one
        sent = traffic.sent(self.micro_steps)
        return CommunicationTime(
            inside=seconds[False],
            between=seconds[True],
            between_bytes=sent.between_bytes * topology.ranks_per_node,
        )
