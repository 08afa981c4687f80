"""How long an optimizer step takes: its exact traffic, priced by rates and latencies of links, beside its arithmetic.

A collective over n ranks is a ring (or exchanges of all pairs): what a rank sends leaves at the rate of its links
inside the node, what a node sends to others at the rate of the network, both at once; and the first bytes pass all
hops. Arithmetic takes its FLOPs at the share of the peak that kernels reach.

Communication runs beside arithmetic, so a micro-step takes at least the longer of both and at most their sum. That is
the range; between its ends, ``HIDDEN_SHARE`` of what can be hidden is expected to be. What travels once per step can
hide behind one micro-step only. Not counted: the optimizer's own arithmetic, data, and what starts kernels.

These are predictions. What they were fitted to, and how far off they are where they were not:
benchmarks/results/published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_mics.cost.collective import Collective
from lightning_mics.cost.hardware import Hardware
from lightning_mics.cost.step_traffic import ScheduledCollective, When

HIDDEN_SHARE = 0.5  # of the communication that arithmetic could hide; fitted by benchmarks.published


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of one optimizer step, or of one micro-step.

    Attributes:
        compute: Of arithmetic.
        inside: Of collectives that stay inside nodes.
        between: Of collectives that cross nodes.
        least: If all is hidden that can be.
        expected: If the usual share is.
        most: If nothing is.
    """

    compute: float
    inside: float
    between: float
    least: float
    expected: float
    most: float

    @property
    def limit(self) -> str:
        """What takes longest."""
        parts = {"arithmetic": self.compute, "links in nodes": self.inside, "network": self.between}
        return max(parts, key=parts.__getitem__)


def collective_seconds(collective: Collective, hardware: Hardware, *, ranks_per_node: int | None = None) -> float:
    """Seconds of one collective that all ranks of a node run at once, each in a group of its kind.

    Args:
        collective: What runs.
        hardware: Where.
        ranks_per_node: That share the node's network; None is one per GPU.
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
        traffic: From :func:`~lightning_mics.cost.step_traffic.step_traffic`.
        hardware: Of each node.
        micro_steps: Per optimizer step.
        micro_step_flops: Of one rank, with what is recomputed.
        ranks_per_node: That share the node's network; None is one per GPU.
        hidden_share: Of the communication that arithmetic could hide, what is expected to be.
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
