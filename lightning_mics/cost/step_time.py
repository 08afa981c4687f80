"""The time of an optimizer step, predicted from its exact traffic, the rates and latencies of links, and its FLOPs.

A collective over n ranks is a ring (or exchanges of all pairs): a rank's bytes leave at the rate of its links inside
the node, a node's bytes to other nodes at the rate of the network, both concurrently; and the first bytes pass all
hops. Arithmetic runs at the share of the peak that kernels reach.

Communication overlaps with arithmetic, so a micro-step takes at least the longer of both and at most their sum. Between
these ends, ``HIDDEN_SHARE`` of the communication that could overlap is expected to. Bytes sent once per step can
overlap with one micro-step only. Not counted: the optimizer's own arithmetic, data, and kernel launches.

These are predictions. For the runs that they were fitted to, and the errors on others, see
benchmarks/results/published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_mics.cost.collective import Collective
from lightning_mics.cost.hardware import Hardware, Links
from lightning_mics.cost.step_traffic import ScheduledCollective, When

HIDDEN_SHARE = 0.5  # of the communication that could overlap; fitted by benchmarks.published


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """The seconds of one optimizer step, or of one micro-step.

    Attributes:
        compute: Seconds of arithmetic.
        inside: Seconds of collectives inside nodes.
        between: Seconds of inter-node collectives.
        least: Total if arithmetic and communication overlap fully.
        expected: Total if the usual share overlaps.
        most: Total without overlap.
    """

    compute: float
    inside: float
    between: float
    least: float
    expected: float
    most: float

    @property
    def limit(self) -> str:
        """Name of the longest of the three: "arithmetic", "links in nodes" or "network"."""
        parts = {"arithmetic": self.compute, "links in nodes": self.inside, "network": self.between}
        return max(parts, key=parts.__getitem__)


def collective_seconds(collective: Collective, hardware: Links, *, ranks_per_node: int | None = None) -> float:
    """Seconds of one collective that all ranks of a node run at once, each in a group of its kind.

    Args:
        collective: The collective.
        hardware: Hardware of each node, or its links.
        ranks_per_node: Number of ranks that share the node's network; None is one per GPU.
    """
    sent = collective.sent
    network = sent.between_bytes * (ranks_per_node or hardware.gpus_per_node) / hardware.network_bytes_per_s
    links = (sent.inside_bytes + sent.between_bytes) / (hardware.in_node_rate_gbytes_per_s * 1e9)
    crossing = collective.nodes - 1
    hops_us = crossing * hardware.network_latency_us
    hops_us += (collective.ranks - 1 - crossing) * hardware.in_node_latency_us
    rounds = 2 if collective.kind == "all_reduce" else 1
    return max(network, links) + rounds * hops_us * 1e-6


def step_seconds(
    traffic: Iterable[ScheduledCollective],
    hardware: Hardware,
    *,
    micro_steps: int,
    micro_step_flops: float,
    ranks_per_node: int | None = None,
    hidden_share: float = HIDDEN_SHARE,
) -> Seconds:
    """Seconds of an optimizer step.

    Args:
        traffic: Collectives of the step, from :func:`~lightning_mics.cost.step_traffic.step_traffic`.
        hardware: Hardware of each node.
        micro_steps: Micro-steps per optimizer step.
        micro_step_flops: FLOPs of one rank in a micro-step, with recomputation.
        ranks_per_node: Number of ranks that share the node's network; None is one per GPU.
        hidden_share: Share of the communication, 0 to 1, that is expected to overlap where it could.
    """
    compute = micro_step_flops / (hardware.peak_tflops * 1e12 * hardware.kernel_share)
    totals: Counter[tuple[When, str]] = Counter()
    for repeated in traffic:
        tier = "inside" if repeated.collective.nodes == 1 else "between"
        seconds = collective_seconds(repeated.collective, hardware, ranks_per_node=ranks_per_node)
        totals[repeated.when, tier] += seconds * repeated.times  # type: ignore[assignment]  # a Counter adds floats too

    def micro_step(*whens: When) -> Seconds:
        inside, between = (sum(totals[when, tier] for when in whens) for tier in ("inside", "between"))
        return _micro_step(compute, inside=inside, between=between, hidden_share=hidden_share)

    if micro_steps == 1:
        return micro_step("every", "first", "boundary")
    first, middle, last = micro_step("every", "first"), micro_step("every"), micro_step("every", "boundary")
    return Seconds(
        **{
            name: getattr(first, name) + (micro_steps - 2) * getattr(middle, name) + getattr(last, name)
            for name in vars(first)
        }
    )


def _micro_step(compute: float, *, inside: float, between: float, hidden_share: float) -> Seconds:
    communication = inside + between
    hidden = min(compute, communication)
    most = compute + communication
    return Seconds(
        compute=compute,
        inside=inside,
        between=between,
        least=most - hidden,
        expected=most - hidden_share * hidden,
        most=most,
    )
