"""The table that rank 0 logs at start: who talks to whom, which techniques are on and why, what memory it takes."""

from __future__ import annotations

import torch

from lightning_mics.policy.memory import in_gib
from lightning_mics.policy.once_per_step import Choice, OncePerStep
from lightning_mics.topology import Topology


def start_report(
    topology: Topology,
    *,
    chosen_automatically: bool,
    hierarchical: bool,
    once_per_step: OncePerStep,
    two_hop: bool,
    inter_node_reduce_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype,
    states_bytes: int,
    capacity_bytes: int,
    fits: bool,
) -> str:
    """A few lines on a job's groups, techniques and estimated memory.

    Args:
        topology: Where every rank is.
        chosen_automatically: Whether the partition size came from ``"auto"``.
        hierarchical: Whether collectives are.
        once_per_step: When parameters and gradients travel.
        two_hop: Whether gradients are reduced over replicas at the boundary only.
        inter_node_reduce_dtype: What gradients travel in between nodes; None is ``reduce_dtype``.
        reduce_dtype: What gradients are reduced and summed in.
        states_bytes: Estimated bytes of model states on each rank, and of what is kept to travel once per step.
        capacity_bytes: Memory of one rank's device.
        fits: Whether that leaves enough of it for activations.
    """
    t = topology
    rows = {
        "ranks": f"{t.world_size} on {t.nodes} {_plural('node', t.nodes)}",
        "partition groups": f"{t.replicas} of {t.partition_size} {_plural('rank', t.partition_size)}"
        + (f' ("auto": {_why_size(fits)})' if chosen_automatically else ""),
        "replication groups": f"{t.partition_size} of {t.replicas} {_plural('rank', t.replicas)}",
        "hierarchical": _why_hierarchical(t, hierarchical),
        "two-hop": _why_two_hop(t, two_hop),
        "gradients": f"reduced, and summed over micro-steps, in {_name(reduce_dtype)}",
    }
    if t.partition_size > 1:
        rows["parameters in nodes"] = _when(once_per_step.in_node_gather, else_="at every use")
        rows["gradients in nodes"] = _when(once_per_step.in_node_reduce, else_="in every micro-step")
    if t.nodes > 1:
        rows["parameters cross nodes"] = _parameters_cross(t, once_per_step.cross_node_gather)
        rows["gradients cross nodes"] = _gradients_cross(t, once_per_step.cross_node_reduce, two_hop) + (
            f", as {_name(inter_node_reduce_dtype)}" if inter_node_reduce_dtype else ""
        )
    rows["model states"] = f"about {in_gib(states_bytes)} of {in_gib(capacity_bytes)} per rank (Adam; no activations)"
    if states_bytes > capacity_bytes:
        rows["warning"] = "the model states alone exceed the device: use more ranks, or a smaller model"
    elif not fits:
        rows["warning"] = "the model states leave little of the device for activations: use more ranks if you can"
    width = max(map(len, rows))
    return "\n".join(["MiCS", *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def _why_size(fits: bool) -> str:
    return "the fewest whole nodes that hold the model states" if fits else "all, and they hardly hold the model states"


def _why_hierarchical(topology: Topology, hierarchical: bool) -> str:
    if hierarchical:
        return f"on: a partition group spans {topology.nodes_per_partition_group} nodes"
    if not topology.spans_nodes:
        return "off: a partition group is inside one node"
    if topology.local_ranks_per_partition_group == 1:
        return "off: one rank per node, so there is no second stage"
    return "off: hierarchical=False"


def _why_two_hop(topology: Topology, two_hop: bool) -> str:
    if topology.replicas == 1:
        return "off: there is one replica only"
    if not two_hop:
        return "off: two_hop=False, so gradients cross replicas in every micro-step"
    return "on: gradients cross replicas at the boundary only"


def _parameters_cross(topology: Topology, choice: Choice) -> str:
    return _when(choice, else_="at every use") if topology.spans_nodes else f"never: {choice.why}"


def _gradients_cross(topology: Topology, choice: Choice, two_hop: bool) -> str:
    if topology.spans_nodes:
        return _when(choice, else_="in every micro-step")
    return f"{'once per step' if two_hop else 'in every micro-step'}: by the second hop"


def _when(choice: Choice, *, else_: str) -> str:
    return f"{'once per step' if choice.once else else_} ({choice.why})"


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
