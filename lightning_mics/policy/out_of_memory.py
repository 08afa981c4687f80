"""Errors of a device that is out of memory: the options that would take less, added to the error."""

from __future__ import annotations

import json
import sys

import torch

from lightning_mics.policy.choice import Choice
from lightning_mics.policy.memory import in_gib
from lightning_mics.sharding.optimizers.offload import Offload
from lightning_mics.topology import Topology, partition_sizes

BEGINNING = "To take less memory under MiCS, change the first of these that is acceptable: "


def memory_advice(choice: Choice, *, recomputes: bool, offloads: bool = False, states_on_host: Offload = False) -> str:
    """The options that would take less memory than a choice, the cheapest first, in one sentence.

    Args:
        choice: Choice of how to shard the model.
        recomputes: Whether activations are recomputed already.
        offloads: Whether the inputs of recomputed blocks are in host memory already.
        states_on_host: Which model states are in host memory already.
    """
    topology, options = choice.topology, choice.communication
    on_node = topology.spans_nodes and (options.hierarchical or topology.local_ranks_per_partition_group == 1)
    cached = f"caches take {in_gib(choice.cached_bytes)} per rank"
    ways = []
    if on_node and options.inter_node_prefetch:
        ways.append("inter_node_prefetch=0")
    places = (options.cache_parameters, options.accumulate_gradients)
    if on_node and not options.cache_offload and any(place == "node" or isinstance(place, float) for place in places):
        ways.append(f"cache_offload=True, which takes host memory instead ({cached})")
    if options.allow_unused:
        ways.append(f"allow_unused=False ({cached})")
    elif topology.partition_size > 1:
        if options.frozen_on_ranks:
            ways.append(f"frozen_on_ranks=0 in place of {options.frozen_on_ranks} ({cached})")
        for option, now, lowest in (
            ("cache_parameters", options.cache_parameters, "never"),
            ("accumulate_gradients", options.accumulate_gradients, "shard"),
        ):
            if now != lowest:
                less = "node" if on_node and now == "rank" else lowest
                ways.append(f"{option}={json.dumps(less)} in place of {json.dumps(now)} ({cached})")
    if not recomputes:
        ways.append("activation_checkpointing=True")
    elif not offloads:
        ways.append("activation_offload=True, which takes host memory instead")
    larger = _next_partition_size(topology)
    if larger is not None:
        ways.append(
            f"partition_size={larger} in place of {topology.partition_size} (model states take "
            f"{in_gib(choice.states_bytes)} per rank)"
        )
    if states_on_host is not True:
        ways.append(f"offload={'True' if states_on_host else json.dumps('optimizer')}, which takes host memory instead")
    ways.append("micro-batches of fewer samples, with more micro-steps per optimizer step")
    return BEGINNING + "; ".join(ways) + "."


def explain_out_of_memory(error: BaseException | None, advice: str) -> None:
    """Add advice to an error if it says that a device is out of memory, once.

    Args:
        error: The error; None for none.
        advice: Advice, from :func:`memory_advice`.
    """
    if not isinstance(error, torch.OutOfMemoryError) or not advice:
        return
    if sys.version_info >= (3, 11):
        if advice not in getattr(error, "__notes__", ()):
            error.add_note(advice)
    elif advice not in str(error):
        error.args = (f"{error}\n{advice}",)


def _next_partition_size(topology: Topology) -> int | None:
    sizes = partition_sizes(world_size=topology.world_size, ranks_per_node=topology.ranks_per_node)
    return next((size for size in sizes if size > topology.partition_size), None)
