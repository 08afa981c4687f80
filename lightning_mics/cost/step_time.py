"""The time of an optimizer step, predicted from its exact traffic, the rates and latencies of links, and its FLOPs.

A collective over n ranks is a ring (or exchanges of all pairs): a rank's bytes leave at the rate of its links inside
the node, a node's bytes to other nodes at the rate of the network, both concurrently; and the first bytes pass all
hops. Arithmetic runs at the share of the peak that kernels reach, divided over the parameter groups by their elements.

What overlaps is simulated in the order of FSDP2 (:mod:`lightning_mics.cost.timeline`). That is the least that a
micro-step takes. The most is arithmetic and collectives one after the other, where the stages of two units still run
side by side, as they use different links. Between these ends, ``HIDDEN_SHARE`` of what could overlap is expected to.
Not counted: the optimizer's own arithmetic, data, and kernel launches.

These are predictions. For the runs that they were fitted to, and the errors on others, see
benchmarks/results/published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from lightning_mics.cost.collective import Collective
from lightning_mics.cost.hardware import Hardware, Links
from lightning_mics.cost.step_traffic import ScheduledCollective, StepTraffic, UnitTraffic, When
from lightning_mics.cost.timeline import Stage, UnitStages, micro_step_seconds

HIDDEN_SHARE = 0.5  # of what the order lets overlap; fitted by benchmarks.published


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """The seconds of one optimizer step, or of one micro-step.

    Attributes:
        compute: Seconds of arithmetic.
        inside: Seconds of collectives inside nodes.
        between: Seconds of inter-node collectives.
        least: Total if arithmetic and communication overlap as far as their order allows.
        expected: Total if the usual share of that overlaps.
        most: Total if arithmetic and communication do not overlap.
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


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """The arithmetic of an optimizer step of one rank.

    Attributes:
        micro_steps: Micro-steps per optimizer step.
        micro_step_flops: FLOPs of a micro-step, with recomputation.
        recomputed_share: Share of the blocks, 0 to 1, whose forward runs again in backward.
        host_bytes: Bytes that a micro-step sends to the host's memory, and fetches again: inputs of recomputed blocks.
    """

    micro_steps: int
    micro_step_flops: float
    recomputed_share: float = 0.0
    host_bytes: float = 0.0


def step_seconds(
    traffic: StepTraffic,
    hardware: Hardware,
    ways: Sequence[Arithmetic],
    *,
    ranks_per_node: int | None = None,
    units_ahead: int = 0,
    hidden_share: float = HIDDEN_SHARE,
) -> list[Seconds]:
    """Seconds of an optimizer step, for each way to divide the same traffic by arithmetic.

    Args:
        traffic: Collectives of the step, from :func:`~lightning_mics.cost.step_traffic.step_traffic`.
        hardware: Hardware of each node.
        ways: Arithmetic between the collectives.
        ranks_per_node: Number of ranks that share the node's network; None is one per GPU.
        units_ahead: Further units whose stage between nodes is prefetched.
        hidden_share: Share of what the order lets overlap, 0 to 1, that is expected to.
    """
    compute = np.array([way.micro_step_flops for way in ways]) / (hardware.peak_tflops * 1e12 * hardware.kernel_share)
    recomputed = np.array([way.recomputed_share for way in ways])
    host = np.array([way.host_bytes for way in ways]) / (hardware.host_rate_gbytes_per_s * 1e9)
    seconds_of = cache(partial(collective_seconds, hardware=hardware, ranks_per_node=ranks_per_node))
    counts = [micro_steps_by_kind(way.micro_steps) for way in ways]
    parts = {}
    for whens in {whens for count in counts for whens in count}:
        parts[whens] = _micro_step(
            traffic,
            whens,
            seconds_of,
            compute,
            recomputed_share=recomputed,
            host=host,
            host_rate=hardware.host_rate_gbytes_per_s * 1e9,
            units_ahead=units_ahead,
            hidden=hidden_share,
        )
    return [
        Seconds(
            **{
                name: sum(float(parts[whens][name][index]) * times for whens, times in count.items())
                for name in Seconds.__dataclass_fields__
            }
        )
        for index, count in enumerate(counts)
    ]


def micro_steps_by_kind(number: int) -> dict[frozenset[When], int]:
    """Numbers of micro-steps by the collectives that they run.

    Args:
        number: Micro-steps per optimizer step.
    """
    if number == 1:
        return {frozenset(("every", "first", "boundary")): 1}
    return {
        frozenset(("every", "first")): 1,
        frozenset(("every", "later")): number - 2,
        frozenset(("every", "later", "boundary")): 1,
    }


def _micro_step(
    traffic: StepTraffic,
    whens: frozenset[When],
    seconds_of: Callable[[Collective], float],
    compute: NDArray[np.float64],
    *,
    recomputed_share: NDArray[np.float64],
    host: NDArray[np.float64],
    host_rate: float,
    units_ahead: int,
    hidden: float,
) -> dict[str, NDArray[np.float64]]:
    """The fields of :class:`Seconds` of a micro-step, each [ways]."""
    kinds = {id(unit): unit for unit in traffic.units}  # blocks that are alike are one object
    stages = {
        key: _with_host(_stages(unit.collectives, whens=whens, seconds_of=seconds_of), unit, whens, host_rate)
        for key, unit in kinds.items()
    }
    units = [stages[id(unit)] for unit in traffic.units]
    sizes = {key: unit.unit.elements(1) for key, unit in kinds.items()}
    elements = [sizes[id(unit)] for unit in traffic.units]
    total = sum(elements)
    forward = compute / (3 + recomputed_share)  # a backward takes twice as long, and runs the forward again
    without = np.zeros_like(compute)  # the same without arithmetic
    least, alone = np.split(
        micro_step_seconds(
            units,
            [count / total for count in elements],
            forward=np.append(forward, without),
            backward=np.append(compute - forward, without),
            units_ahead=units_ahead,
            host=np.tile(host / max(1, len(units) - 1), 2) if host.any() else None,
        ),
        2,
    )
    most = compute + alone
    sums = {"inside": 0.0, "between": 0.0}
    for key, times in Counter(map(id, traffic.units)).items():
        unit = stages[key]
        for stage in (*unit.forward, *unit.backward, *unit.reduction, *unit.second_hop):
            if stage.link in sums:
                sums[stage.link] += times * stage.seconds
    return {
        "compute": compute,
        **{link: np.full_like(compute, seconds) for link, seconds in sums.items()},
        "least": least,
        "expected": most - hidden * (most - least),
        "most": most,
    }


def _stages(
    collectives: Sequence[ScheduledCollective], *, whens: frozenset[When], seconds_of: Callable[[Collective], float]
) -> UnitStages:
    """The stages of a parameter group in the micro-steps of these kinds."""
    stages: dict[str, list[Stage]] = {"forward": [], "backward": [], "reduction": [], "second_hop": []}
    for repeated in collectives:
        if repeated.when not in whens:
            continue
        collective = repeated.collective
        stage = Stage("inside" if collective.nodes == 1 else "between", seconds_of(collective))
        is_gather = collective.kind == "all_gather" and collective.group != "replication"
        last = "second_hop" if collective.group == "replication" else "reduction"
        for place in repeated.phases if is_gather else (last,):
            stages[place].append(stage)
    return UnitStages(**{name: tuple(found) for name, found in stages.items()})


def _with_host(stages: UnitStages, unit: UnitTraffic, whens: frozenset[When], host_rate: float) -> UnitStages:
    """The stages of a parameter group with the copies of what of it waits on the host.

    Args:
        stages: Stages of its collectives.
        unit: Parameter group.
        whens: Kinds of the micro-step.
        host_rate: Bytes per second of the link to the host, in each direction.
    """
    cached, summed = unit.slice_bytes / host_rate, unit.sum_bytes / host_rate
    if cached:
        fetch, gathers = Stage("from host", cached), {}
        for phase, used in (("forward", True), ("backward", not unit.unit.is_root)):
            found: tuple[Stage, ...] = getattr(stages, phase)
            if found and found[0].link == "between":
                stages = replace(stages, filled=(Stage("to host", cached),))
            elif used:
                gathers[phase] = (fetch, *found)
        stages = replace(stages, **gathers)
    if summed and "first" not in whens:
        stages = replace(stages, sum_before=(Stage("from host", summed),))
    if summed and "boundary" not in whens:
        stages = replace(stages, sum_after=(Stage("to host", summed),))
    return stages
