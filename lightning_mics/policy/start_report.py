"""The table that rank 0 logs at start: groups, techniques that are on and why, and memory."""

from __future__ import annotations

import torch

from lightning_mics.policy.choice import Choice
from lightning_mics.policy.memory import in_gib
from lightning_mics.sharding.options import CommunicationOptions
from lightning_mics.topology import Topology


def start_report(
    choice: Choice,
    *,
    reduce_dtype: torch.dtype,
    initializers: str = "",
    frozen_bytes: int = 0,
    on_host: str = "",
) -> str:
    """Describe the groups, techniques and estimated memory of a job in a few lines.

    Args:
        choice: Choice of how to shard the model.
        reduce_dtype: Dtype in which gradients are reduced and added up.
        initializers: What has set the initial weights of modules that were on the meta device; empty if none were.
        frozen_bytes: Bytes of the parameters that do not require gradients.
        on_host: Model states in host memory, in words; empty if there are none.
    """
    t, options, why = choice.topology, choice.communication, choice.reasons
    chosen = "" if why["partition_size"] == "given" else f" ({why['partition_size']})"
    rows = {
        "ranks": f"{t.world_size} on {t.nodes} {_plural('node', t.nodes)}",
        "partition groups": f"{t.replicas} of {t.partition_size} {_plural('rank', t.partition_size)}{chosen}",
        "replication groups": f"{t.partition_size} of {t.replicas} {_plural('rank', t.replicas)}",
        "hierarchical": f"{'on' if options.hierarchical else 'off'}: {why['hierarchical']}",
        "two-hop": _why_two_hop(t, options.two_hop),
        "gradients": f"reduced, and summed over micro-steps, in {_name(reduce_dtype)}{_hint(options, reduce_dtype)}",
    }
    if t.partition_size > 1:
        for option in ("cache_parameters", "accumulate_gradients"):
            rows[option.replace("_", " ")] = f"{getattr(options, option)} ({why[option]})"
        if "frozen_on_ranks" in why:
            rows["frozen on ranks"] = f"{options.frozen_on_ranks:g} ({why['frozen_on_ranks']})"
    if frozen_bytes and t.partition_size > 1:
        rows["frozen weights"] = f"{in_gib(frozen_bytes)} {_frozen_gathers(t, options)}"
    if t.nodes > 1:
        rows["inter-node gathers"] = _inter_node_gathers(t, options)
        rows["inter-node reductions"] = _inter_node_reductions(t, options)
    rows |= _by_time(choice)
    if choice.resumed:
        rows["resumed"] = choice.resumed
    if initializers:
        rows["initial weights"] = initializers
    needed_bytes = choice.states_bytes + choice.cached_bytes
    capacity = in_gib(choice.capacity_bytes)
    rows["model states"] = f"about {in_gib(needed_bytes)} of {capacity} per rank (Adam; no activations)"
    if on_host:
        rows["on the host"] = on_host
    if choice.host_bytes:
        kinds = {"caches": options.cache_parameters, "sums": options.accumulate_gradients}
        moved = [kind for kind, place in kinds.items() if place == "node" or isinstance(place, float)]
        what = " and ".join(moved)
        rows[f"{what} on the host"] = (
            f"{in_gib(choice.host_bytes)} per rank (cache_offload=True), fetched one block ahead"
        )
    if needed_bytes > choice.capacity_bytes:
        rows["warning"] = "the model states alone exceed the device: use more ranks, or a smaller model"
    elif not choice.fits:
        rows["warning"] = "the model states leave little of the device for activations: use more ranks if you can"
    width = max(map(len, rows))
    return "\n".join(["MiCS", *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def _by_time(choice: Choice) -> dict[str, str]:
    """Seconds of the choice and of others, and the choice as options; empty if it was not chosen by time."""
    if choice.time is None or choice.pricing is None:
        return {}
    links, steps = choice.pricing.links, choice.pricing.micro_steps
    rows = {
        "links, measured": f"{links.in_node_rate_gbytes_per_s:.3g} GB/s and {links.in_node_latency_us:.3g} us per hop "
        f"inside nodes; {links.network_rate_gbits_per_s:.3g} Gbit/s per node and {links.network_latency_us:.3g} us per "
        "hop between nodes",
        "communication": f"{choice.time.seconds:.3g} s per step of {steps} {_plural('micro-step', steps)} if nothing "
        f"hides it, limited by the {choice.time.limit}",
    }
    for name, way in choice.instead.items():
        assert way.time is not None
        rows[name] = f"{way.time.seconds:.3g} s: {_pinned(way)}"
    return rows | {"to pin this": _pinned(choice)}


def _pinned(choice: Choice) -> str:
    """The choice as keyword arguments of a strategy."""
    return ", ".join(
        f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}" for name, value in choice.options.items()
    )


def _hint(options: CommunicationOptions, reduce_dtype: torch.dtype) -> str:
    """What to do about sums that are rounded in each micro-step; empty if they are not."""
    if options.accumulate_gradients == "shard" or reduce_dtype.itemsize >= torch.float32.itemsize:
        return ""
    return '; over many micro-steps, reduce_dtype="float32" keeps what this rounds off'


def _why_two_hop(topology: Topology, two_hop: bool) -> str:
    if topology.replicas == 1:
        return "off: there is only one replica"
    if not two_hop:
        return "off: two_hop=False, so gradients are reduced over replicas in every micro-step"
    return "on: gradients are reduced over replicas at the boundary only"


def _frozen_gathers(topology: Topology, options: CommunicationOptions) -> str:
    place = options.cache_parameters
    once = "are gathered once per job, and stay cached on ranks"
    if place == "rank" or options.frozen_on_ranks == 1:
        return once
    if place == "never" or not topology.spans_nodes:
        others = "are gathered at every use"
    elif place == "node":
        others = "cross nodes once per job, and stay cached on nodes"
    else:
        others = "cross nodes once per job, and stay cached there, for cached blocks, and at every use for others"
    return f"{once}, for blocks on ranks; those of others {others}" if options.frozen_on_ranks else others


def _inter_node_gathers(topology: Topology, options: CommunicationOptions) -> str:
    if not topology.spans_nodes:
        return "none: a partition group is inside one node"
    if isinstance(options.cache_parameters, float):
        return "once per step for cached blocks, at every use for the others"
    return "at every use" if options.cache_parameters == "never" else "once per step"


def _inter_node_reductions(topology: Topology, options: CommunicationOptions) -> str:
    every, once = "in every micro-step", "once per step"
    if topology.spans_nodes:
        when = every if options.accumulate_gradients == "shard" else once
        if isinstance(options.accumulate_gradients, float):
            when = f"{once} for accumulated blocks, {every} for the others"
    else:
        when = f"{once if options.two_hop else every}, by the second hop"
    return when + (f", as {_name(options.inter_node_reduce_dtype)}" if options.inter_node_reduce_dtype else "")


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
