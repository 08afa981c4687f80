"""What "auto" stands for: the partition size, and where parameters are cached and gradients accumulated.

The partition group is the smallest whole number of nodes that holds the model states (MiCS, section 3.1).

Caching parameters and accumulating gradients trades memory for traffic. On nodes, with M bytes of parameters and k
ranks of a partition group per node, the cache takes M/k bytes of each rank, and accumulated gradients take their size
/ k. If memory is left for only one of them, parameters take precedence: over s micro-steps their cache saves 2s-1
times M bytes of inter-node traffic, accumulated gradients save s-1 times.

If neither fits, as many blocks as fit are cached on nodes, spread over the depth, and then as many accumulated. What is
left then is for frozen weights on each rank (:func:`~lightning_mics.policy.places.place_frozen`).

With ``cache_offload=True`` they wait in host memory, and all are cached and accumulated on nodes.

On ranks, the cache takes M bytes, and accumulated gradients take their full size. Links inside a node are fast, and
sharding is there to save memory, so "auto" does it only if the unsharded model states, as in DDP, would fit a rank.
Optimizer states stay sharded, so this takes less memory than DDP.

That is the rule where nothing but the size of the model is known. Where a strategy has measured the rates of links
(:mod:`lightning_mics.cost.probe`), this rule fills the caches of each partition size, flat and in stages, and the
way that communicates for the shortest time is taken. Plans know batches and FLOPs as well, and choose by the time of a
step (:mod:`lightning_mics.policy.candidates`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

from lightning_mics.cost.communication_time import CommunicationTime, Pricing
from lightning_mics.policy.memory import USABLE_SHARE, ModelSize, fits, smallest_partition_size
from lightning_mics.policy.places import Memory, Place, place_frozen, weigh
from lightning_mics.sharding.options import CommunicationOptions
from lightning_mics.techniques.partition_groups import choose_hierarchical
from lightning_mics.topology import Topology, partition_sizes


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How to shard a model over a job, with reasons.

    Attributes:
        topology: Topology of the job.
        communication: Options of :func:`~lightning_mics.sharding.shard_model.shard_model`, none of them "auto".
        reasons: Reason for each value that may be "auto", by the name of the option.
        states_bytes: Model states of a rank, with the unsharded parameters and gradients of the peak, in bytes.
        cached_bytes: Cached parameters and accumulated gradients of a rank, in bytes.
        capacity_bytes: Memory of a rank's device, in bytes.
        host_bytes: Cached parameters and accumulated gradients of a rank that wait in host memory, in bytes.
        time: Predicted communication of an optimizer step; None if it was not chosen by time.
        pricing: Basis of that prediction; None if it was not chosen by time.
        instead: Other ways, by what they are: "second best" and "full sharding"; empty if it was not chosen by time.
        resumed: Fate, in words, of the choice in the checkpoint that training resumes from; empty if there is none.
    """

    topology: Topology
    communication: CommunicationOptions
    reasons: Mapping[str, str]
    states_bytes: int
    cached_bytes: int
    capacity_bytes: int
    host_bytes: int = 0
    time: CommunicationTime | None = None
    pricing: Pricing | None = None
    instead: Mapping[str, Choice] = field(default_factory=dict)
    resumed: str = ""

    @property
    def fits(self) -> bool:
        """Whether model states and caches leave enough of the device for activations."""
        return self.states_bytes + self.cached_bytes <= USABLE_SHARE * self.capacity_bytes

    @property
    def options(self) -> dict[str, Any]:
        """The options that may be "auto", with what they are here, as a strategy takes them."""
        options = options_that_may_be_auto(self.topology.partition_size, self.communication)
        frozen = self.communication.frozen_on_ranks
        return {**options, "frozen_on_ranks": frozen} if "frozen_on_ranks" in self.reasons else options


def options_that_may_be_auto(
    partition_size: int | Literal["auto"], communication: CommunicationOptions
) -> dict[str, Any]:
    """The options that may be "auto", by name; ``frozen_on_ranks`` if it is.

    Args:
        partition_size: Ranks per partition group, or "auto".
        communication: Options of the collectives.
    """
    names = ("hierarchical", "cache_parameters", "accumulate_gradients")
    options = {"partition_size": partition_size, **{name: getattr(communication, name) for name in names}}
    return {**options, "frozen_on_ranks": "auto"} if communication.frozen_on_ranks == "auto" else options


@dataclass(frozen=True, kw_only=True)
class ShardingJob:
    """A model to shard over a job, with the options of the user.

    Attributes:
        size: Size of the model, from :func:`~lightning_mics.policy.memory.measure_model`.
        world_size: Ranks in the job.
        ranks_per_node: Ranks on each node.
        capacity_bytes: Memory of one rank's device, of which ``USABLE_SHARE`` is for model states and caches.
        partition_size: Ranks per partition group, or "auto".
        communication: Options of the collectives, with "auto" where they are free.
    """

    size: ModelSize
    world_size: int
    ranks_per_node: int
    capacity_bytes: int
    partition_size: int | Literal["auto"] = "auto"
    communication: CommunicationOptions = CommunicationOptions.AUTO

    @property
    def given(self) -> dict[str, Any]:
        """The options that may be "auto", by name."""
        return options_that_may_be_auto(self.partition_size, self.communication)

    def topology(self, partition_size: int) -> Topology:
        """The topology with partition groups of this size.

        Args:
            partition_size: Ranks per partition group.

        Raises:
            TypeError: If it is not an integer.
            ValueError: If it does not fit the job.
        """
        return Topology(world_size=self.world_size, ranks_per_node=self.ranks_per_node, partition_size=partition_size)


def choose(job: ShardingJob, pricing: Pricing | None = None) -> Choice:
    """Replace "auto" by what memory allows, or by the fastest of what it allows.

    What takes as long within 1 % counts as equally fast: then caches on ranks are avoided, then bytes between nodes,
    then memory, then large partition groups. What is chosen is never slower than flat full sharding, which is a way to
    run any job unless an option that is given excludes it.

    Args:
        job: Model and job.
        pricing: The model on links with known rates; None chooses by memory alone.

    Raises:
        TypeError: If the partition size is not an integer.
        ValueError: If it does not fit the job, or ``hierarchical=True`` does not fit it.
    """
    by_memory = _by_memory(job)
    if pricing is None:
        return by_memory
    ways = fitting_ways(job)
    if not ways:
        return by_memory
    timed = [replace(way, time=pricing.time(way.topology, way.communication), pricing=pricing) for way in ways]
    return _fastest(timed, job.given)


def fitting_ways(job: ShardingJob) -> list[Choice]:
    """All ways to run a job that memory and the given options allow, to choose from by time."""
    sizes: Sequence[int] = (
        partition_sizes(world_size=job.world_size, ranks_per_node=job.ranks_per_node)
        if job.partition_size == "auto"
        else (job.partition_size,)
    )
    alternatives: dict[str, tuple[Any, ...]] = {  # "auto" is as much as memory allows
        "hierarchical": ("auto", False),
        "cache_parameters": ("auto", "node", "never"),
        "accumulate_gradients": ("auto", "node", "shard"),
        "frozen_on_ranks": ("auto", 0.0),
    }
    if job.communication.allow_unused:  # they take the memory in any case
        job = replace(job, communication=job.communication.on_ranks())
    given = job.communication.keywords()
    values = [others if given[name] == "auto" else (given[name],) for name, others in alternatives.items()]
    found: dict[tuple[int, CommunicationOptions], Choice] = {}
    for ranks, ways in product(sizes, product(*values)):
        try:
            options = replace(job.communication, **dict(zip(alternatives, ways, strict=True)))
            replace(job.communication, hierarchical=options.hierarchical).check(job.topology(ranks))
        except ValueError:  # an option that is given needs another one
            continue
        way = _by_memory(replace(job, partition_size=ranks, communication=options))
        if way.fits and (way.host_bytes or not options.cache_offload):
            found.setdefault((ranks, way.communication), way)
    return list(found.values())


def _by_memory(job: ShardingJob) -> Choice:
    size, partition_size, communication = job.size, job.partition_size, job.communication
    reasons = {"partition_size": "given"}
    if partition_size == "auto":
        partition_size = smallest_partition_size(
            size, world_size=job.world_size, ranks_per_node=job.ranks_per_node, capacity_bytes=job.capacity_bytes
        )
        hold = fits(size, partition_size, job.capacity_bytes)
        why = (
            "the fewest whole nodes that hold the model states"
            if hold
            else "all ranks, which hardly hold the model states"
        )
        reasons["partition_size"] = f'"auto": {why}'
    topology = job.topology(partition_size)
    hierarchical = choose_hierarchical(communication.hierarchical, topology)
    states_bytes = size.per_rank_bytes(partition_size)
    memory = Memory(
        topology=topology,
        on_nodes=True,
        free_bytes=int(USABLE_SHARE * job.capacity_bytes) - states_bytes,
        fits_unsharded=fits(size, 1, job.capacity_bytes),
        offload=communication.cache_offload is True,
    )
    if communication.allow_unused:  # they take the memory in any case
        communication = communication.on_ranks()
    cache = weigh(communication.cache_parameters, size.gathered_bytes, size.blocks_gathered_bytes, memory)
    in_stages = hierarchical or topology.local_ranks_per_partition_group == 1  # which sums on nodes need
    memory = replace(memory, on_nodes=in_stages, free_bytes=memory.free_bytes - cache.bytes)
    if communication.two_hop:
        accumulate = weigh(communication.accumulate_gradients, size.reduced_bytes, size.blocks_reduced_bytes, memory)
    else:
        accumulate = Place(None, "two_hop=False reduces in every micro-step")
    left_bytes = memory.free_bytes - accumulate.bytes
    frozen = place_frozen(communication.frozen_on_ranks, size, topology, cached=cache.level, free_bytes=left_bytes)
    cached_bytes = cache.bytes + accumulate.bytes + frozen.bytes
    if communication.allow_unused and partition_size > 1:
        cached_bytes = size.gathered_bytes + size.reduced_bytes
    return Choice(
        topology=topology,
        communication=replace(
            communication,
            hierarchical=hierarchical,
            cache_parameters=cache.level or "never",
            accumulate_gradients=accumulate.level or "shard",
            frozen_on_ranks=frozen.share,
        ),
        reasons={
            **reasons,
            "hierarchical": _why_hierarchical(topology, hierarchical),
            "cache_parameters": cache.why,
            "accumulate_gradients": accumulate.why,
            **({"frozen_on_ranks": frozen.why} if frozen.why else {}),
        },
        states_bytes=states_bytes,
        cached_bytes=cached_bytes,
        capacity_bytes=job.capacity_bytes,
        host_bytes=cache.host_bytes + accumulate.host_bytes,
    )


def _fastest(ways: Sequence[Choice], given: Mapping[str, Any]) -> Choice:
    """The fastest of several ways to run a job, and of those as fast as it the simplest.

    Args:
        ways: Ways with their time, at least one.
        given: Options of the user, by name.
    """
    full = next((way for way in ways if _is_full_sharding(way)), None)
    least = min(map(_seconds, ways))
    bound = 1.01 * least if full is None else min(1.01 * least, _seconds(full))
    chosen = min((way for way in ways if _seconds(way) <= bound), key=_simplicity)
    others = [way for way in ways if _groups(way) != _groups(chosen)]
    instead = {"second best": min(others, key=_seconds)} if others else {}
    if full is not None and full is not chosen:
        instead["full sharding"] = full
    reasons = dict(chosen.reasons)
    for name, value in given.items():
        if value == "auto" and name in reasons:
            reasons[name] = _why_fastest(name, chosen)
    return replace(chosen, instead=instead, reasons=reasons)


def _seconds(way: Choice) -> float:
    assert way.time is not None
    return way.time.seconds


def _groups(way: Choice) -> tuple[Any, ...]:
    return way.topology.partition_size, way.communication.hierarchical


def _is_full_sharding(way: Choice) -> bool:
    """Whether it is what FSDP2 does with its defaults."""
    options = way.communication
    plain = (options.hierarchical, options.cache_parameters, options.accumulate_gradients) == (False, "never", "shard")
    return plain and not options.frozen_on_ranks and way.topology.replicas == 1


def _simplicity(way: Choice) -> tuple[float, ...]:
    """Smaller for what is simpler, as in :func:`lightning_mics.policy.fastest.fastest`."""
    assert way.time is not None
    options = way.communication
    return (
        (options.cache_parameters == "rank") + (options.accumulate_gradients == "rank") + bool(options.frozen_on_ranks),
        round(way.time.between_bytes, -6),
        way.states_bytes + way.cached_bytes,
        way.topology.partition_size,
        way.time.seconds,
    )


def _why_fastest(name: str, way: Choice) -> str:
    why = way.reasons[name].removeprefix('"auto": ')
    if name == "hierarchical":
        flat = way.topology.spans_nodes and not way.communication.hierarchical
        return "as fast as in stages, or faster" if flat and why == "hierarchical=False" else why
    return '"auto": the shortest communication' if name == "partition_size" else f'"auto": by time; {why}'


def _why_hierarchical(topology: Topology, hierarchical: bool) -> str:
    if hierarchical:
        return f"a partition group spans {topology.nodes_per_partition_group} nodes"
    if not topology.spans_nodes:
        return "a partition group is inside one node"
    if topology.local_ranks_per_partition_group == 1:
        return "one rank per node, so there is no second stage"
    return "hierarchical=False"
