"""The options of communication: their values, and which of them fit a topology."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import compress
from typing import Any, ClassVar, Literal, get_args

import torch

from lightning_mics.sharding.blocks import evenly
from lightning_mics.sharding.modules.frozen_blocks import UnitSize, units_on_ranks
from lightning_mics.techniques.partition_groups import PartitionGroups, check_hierarchical, choose_hierarchical
from lightning_mics.topology import Topology

Hierarchical = bool | Literal["auto"]


CacheParameters = Literal["auto", "never", "node", "rank"] | float


AccumulateGradients = Literal["auto", "shard", "node", "rank"] | float


CacheOffload = bool | Literal["auto"]


FrozenOnRanks = Literal["auto"] | float


WIRE_DTYPES = (torch.float32, torch.bfloat16)


_CHOICES = {
    option: get_args(get_args(values)[0])
    for option, values in (("cache_parameters", CacheParameters), ("accumulate_gradients", AccumulateGradients))
}


@dataclass(frozen=True, kw_only=True)
class CommunicationOptions:
    """In how many stages collectives run, how often, and in which dtype.

    A policy replaces ``cache_parameters="auto"`` and ``accumulate_gradients="auto"`` by what memory allows
    (:mod:`lightning_mics.policy.choice`) before a model is sharded.

    Attributes:
        hierarchical: Whether collectives of a partition group that spans nodes run in two stages, along rails and
            inside nodes; ``"auto"`` does so where it has several ranks on each node.
        cache_parameters: Where unsharded parameters are cached until the gradient accumulation boundary. ``"never"``:
            they are gathered at every use. ``"node"``: each node holds one copy, spread over its ranks, so they are
            gathered between nodes once per step; takes their bytes / k on each rank, with k ranks of a partition group
            on a node, and changes nothing where a partition group is inside one node. A share of the blocks, as 0.25,
            is ``"node"`` for so many, spread over the depth, and ``"never"`` for the others and the parameters outside
            of blocks. Where collectives are flat the first gather is so too, and later ones run inside nodes; see
            :mod:`~lightning_mics.techniques.flat_cache`. ``"rank"``: each rank holds all of them, so they are gathered
            once per step; takes their bytes on each rank.
        accumulate_gradients: Where gradients are accumulated until the boundary. ``"shard"``: reduced over the
            partition group in every micro-step, each rank accumulates its shard. ``"node"``: reduced inside nodes in
            every micro-step, between nodes once per step; takes their bytes / k on each rank, and changes nothing where
            a partition group is inside one node. A share of the blocks, as 0.25, is ``"node"`` for so many, spread over
            the depth, and ``"shard"`` for the others. ``"rank"``: reduced once per step; takes their bytes on each
            rank.
        frozen_on_ranks: Share of the blocks with frozen weights, 0 to 1, that each rank holds unsharded for the whole
            job, wherever others are cached: frozen weights of these, and of the root, are gathered once per job, and
            what trains in them once per step. Those come first that save the most traffic for their memory; see
            :mod:`~lightning_mics.sharding.modules.frozen_blocks`. Takes their bytes on each rank; changes nothing where
            nothing is frozen.
        inter_node_reduce_dtype: Dtype in which gradients are sent between nodes, float32 or bfloat16; None is the
            dtype in which they are reduced.
        inter_node_prefetch: Number of units whose stage between nodes runs ahead of their gather, beside arithmetic;
            takes their bytes / k on each rank. It changes nothing where collectives run in one stage inside a node or
            over several; see :mod:`~lightning_mics.techniques.inter_node_prefetch`. ``"auto"`` is for plans, which take
            one unit where it is worth its memory.
        cache_offload: Whether what is cached and accumulated on nodes waits in host memory between uses, fetched one
            unit ahead; takes the memory of the host in place of the device's, but for two units of each kind.
            ``"auto"`` is for plans. See :mod:`~lightning_mics.techniques.cache_offload`.
        two_hop: Whether gradients are reduced over replicas at the boundary only; False does so in every micro-step,
            as hybrid sharding without MiCS does. For measurements.
        allow_unused: Whether ranks may use different units in training, as with layer drop, early exit or experts by
            rank. Every rank then gathers all units before a forward and reduces all gradients after its backward, which
            takes the bytes of both on each rank; see :mod:`~lightning_mics.sharding.ranks.unused`.

    Raises:
        ValueError: If a value is unknown, or ``two_hop=False`` leaves no gradients to accumulate until the boundary.
    """

    hierarchical: Hierarchical = "auto"
    cache_parameters: CacheParameters = "never"
    accumulate_gradients: AccumulateGradients = "shard"
    frozen_on_ranks: FrozenOnRanks = 0.0
    inter_node_reduce_dtype: torch.dtype | None = None
    inter_node_prefetch: int | Literal["auto"] = 0
    cache_offload: CacheOffload = False
    two_hop: bool = True
    allow_unused: bool = False

    PAPER: ClassVar[CommunicationOptions]  # each collective as often as in the paper
    NODE: ClassVar[CommunicationOptions]  # inter-node traffic once per step
    RANK: ClassVar[CommunicationOptions]  # all traffic once per step
    AUTO: ClassVar[CommunicationOptions]  # what memory allows

    def __post_init__(self) -> None:
        check_hierarchical(self.hierarchical)
        for option, choices in _CHOICES.items():
            value = getattr(self, option)
            if not (_is_share(value) or (isinstance(value, str) and value in choices)):
                raise ValueError(
                    f"{option}={value!r} is neither one of {_listed(choices)} nor a share of the blocks, such as 0.5"
                )
        if not (self.frozen_on_ranks == "auto" or _is_part(self.frozen_on_ranks)):
            raise ValueError(
                f"frozen_on_ranks={self.frozen_on_ranks!r} is neither 'auto' nor a share of the blocks, from 0 to 1"
            )
        if self.inter_node_reduce_dtype not in (None, *WIRE_DTYPES):
            raise ValueError(
                f"inter_node_reduce_dtype={self.inter_node_reduce_dtype!r} is not one of None, "
                f"{', '.join(map(str, WIRE_DTYPES))}"
            )
        ahead = self.inter_node_prefetch
        if ahead != "auto" and (type(ahead) is not int or ahead < 0):
            raise ValueError(f"inter_node_prefetch={ahead!r} is neither 0 nor a positive integer")
        if not isinstance(self.cache_offload, bool) and self.cache_offload != "auto":
            raise ValueError(f'cache_offload={self.cache_offload!r} is neither True nor False, nor "auto", for a plan')
        if not isinstance(self.two_hop, bool):
            raise ValueError(f"two_hop={self.two_hop!r} is neither True nor False")
        if not isinstance(self.allow_unused, bool):
            raise ValueError(f"allow_unused={self.allow_unused!r} is neither True nor False")
        if not self.two_hop and self.accumulate_gradients not in ("auto", "shard"):
            raise ValueError(
                f"two_hop=False reduces over replicas in every micro-step, but accumulate_gradients="
                f"{self.accumulate_gradients!r} accumulates them until the boundary; use "
                "accumulate_gradients='shard', or two_hop=True"
            )

    @property
    def caches_on_nodes(self) -> bool:
        """Whether parameters of any block are cached on nodes; no longer "auto"."""
        return _is_on_nodes(self.cache_parameters)

    @property
    def units_ahead(self) -> int:
        """Number of units whose stage between nodes runs ahead of their gather; no longer "auto"."""
        return int(self.inter_node_prefetch)

    def check(self, topology: Topology) -> None:
        """Check that these options fit ``topology``.

        Raises:
            ValueError: If an option needs two stages but collectives are flat, or two stages are required in a node, or
                ``cache_offload`` has nothing to move.
        """
        if self.cache_offload is True:
            self._check_cached_on_nodes(topology)
        if choose_hierarchical(self.hierarchical, topology) or not topology.spans_nodes:
            return
        if topology.local_ranks_per_partition_group == 1:
            return
        in_stages = {
            f"accumulate_gradients={self.accumulate_gradients!r}": _is_on_nodes(self.accumulate_gradients),
            "cache_offload=True": self.cache_offload is True,
            f"inter_node_reduce_dtype={self.inter_node_reduce_dtype}": self.inter_node_reduce_dtype is not None,
        }
        for option, is_wanted in in_stages.items():
            if is_wanted:
                raise ValueError(
                    f"{option} needs a separate inter-node stage of collectives, but hierarchical=False and "
                    f"partition_size={topology.partition_size} spans {topology.nodes_per_partition_group} nodes; use "
                    'hierarchical="auto"'
                )

    def _check_cached_on_nodes(self, topology: Topology) -> None:
        given = self.on_ranks() if self.allow_unused else self
        caches = given.cache_parameters == "auto" or _is_on_nodes(given.cache_parameters)
        sums = (given.accumulate_gradients == "auto" and given.two_hop) or _is_on_nodes(given.accumulate_gradients)
        if not caches and not sums:
            cause = "allow_unused=True, " if self.allow_unused else ""
            raise ValueError(
                f"cache_offload=True moves to the host what is cached and accumulated on nodes, and with {cause}"
                f"cache_parameters={given.cache_parameters!r} and accumulate_gradients={given.accumulate_gradients!r} "
                'nothing is; use cache_parameters="node" or accumulate_gradients="node", or a share of the blocks for '
                "either, or leave cache_offload out"
            )
        if not topology.spans_nodes:
            raise ValueError(
                f"cache_offload=True moves to the host what is cached on nodes, and partition_size="
                f"{topology.partition_size} is inside a node of {topology.ranks_per_node} ranks, where nothing is; use "
                "a partition_size over several nodes, or leave cache_offload out"
            )

    def fitted_to(self, groups: PartitionGroups) -> CommunicationOptions:
        """Return these options with ``hierarchical`` as ``groups`` were made.

        Raises:
            ValueError: If the groups were made with another ``hierarchical``, or an option does not fit them or is
                ``"auto"``.
        """
        self.check_chosen()
        wanted, in_stages = choose_hierarchical(self.hierarchical, groups.topology), groups.in_stages
        both_possible = groups.topology.spans_nodes and groups.topology.local_ranks_per_partition_group > 1
        if both_possible and wanted != in_stages and self.hierarchical != "auto":
            raise ValueError(
                f"hierarchical={self.hierarchical}, but the partition groups were made with hierarchical={in_stages}; "
                "give both the same value"
            )
        fitted = replace(self, hierarchical=in_stages)
        fitted.check(groups.topology)
        if both_possible and self.caches_on_nodes and groups.node is None:
            raise ValueError(
                f"cache_parameters={self.cache_parameters!r} gathers inside nodes, and the partition groups were made "
                "without groups inside them; give create_partition_groups caches_on_nodes=True"
            )
        return fitted

    def check_chosen(self) -> None:
        """Check that no option is left to a policy.

        Raises:
            ValueError: If an option is ``"auto"``.
        """
        self.check_not_for_plans()
        for option, choices in _CHOICES.items():
            if getattr(self, option) == "auto":
                allowed = _listed(choice for choice in choices if choice != "auto")
                raise ValueError(f"{option}='auto' is for policies, which know the model's size; use one of {allowed}")
        if self.frozen_on_ranks == "auto":
            raise ValueError("frozen_on_ranks='auto' is for policies, which know the model's size; use a share, 0 to 1")

    def check_not_for_plans(self) -> None:
        """Check that no option is left to a plan, which alone knows how long a step takes.

        Raises:
            ValueError: If ``inter_node_prefetch`` or ``cache_offload`` is ``"auto"``.
        """
        advice = {"inter_node_prefetch": "a number of blocks, such as 1, or 0", "cache_offload": "True or False"}
        for option, values in advice.items():
            if getattr(self, option) == "auto":
                raise ValueError(
                    f"{option}='auto' is for the recipes, whose plan knows what a step takes; use {values}"
                )

    def by_unit(self, *, sizes: Sequence[UnitSize]) -> tuple[CommunicationOptions, ...]:
        """These options for each parameter group, without shares: the root's own, then those of blocks in order.

        Args:
            sizes: Elements of each parameter group, and those of them that require gradients.
        """
        blocks = len(sizes) - 1
        cached = _units_on_nodes(self.cache_parameters, blocks, otherwise="never")
        accumulated = _units_on_nodes(self.accumulate_gradients, blocks, otherwise="shard")
        if self.frozen_on_ranks:
            on_ranks = units_on_ranks(sizes, float(self.frozen_on_ranks))
            cached = ["rank" if whole else place for whole, place in zip(on_ranks, cached, strict=True)]
        places = list(zip(cached, accumulated, strict=True))
        whole = replace(self, frozen_on_ranks=0.0)
        kinds = {
            (cache, accumulate): replace(whole, cache_parameters=cache, accumulate_gradients=accumulate)
            for cache, accumulate in set(places)
        }
        return tuple(kinds[each] for each in places)

    def on_ranks(self) -> CommunicationOptions:
        """Return these options with "rank" in place of "auto", where it fits the others."""
        accumulate = "rank" if self.accumulate_gradients == "auto" and self.two_hop else self.accumulate_gradients
        cache = "rank" if self.cache_parameters == "auto" else self.cache_parameters
        frozen = 0.0 if self.frozen_on_ranks == "auto" else self.frozen_on_ranks
        return replace(self, cache_parameters=cache, accumulate_gradients=accumulate, frozen_on_ranks=frozen)

    def keywords(self) -> dict[str, Any]:
        """These options as keyword arguments of a strategy, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def floating_dtype(option: str, value: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that ``value`` names.

    Args:
        option: Name of the option, for the message.
        value: A dtype, or its name such as ``"bfloat16"``; None is returned as None.

    Raises:
        ValueError: If it is none of float32, bfloat16 and None.
    """
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if value is not None and not (isinstance(dtype, torch.dtype) and dtype in WIRE_DTYPES):
        raise ValueError(f"{option}={value!r} is not one of {', '.join(map(str, WIRE_DTYPES))}")
    return dtype


def spread_over(blocks: int, share: float) -> list[bool]:
    """Which blocks a share of them is: evenly spread over the depth, never more than the share.

    Args:
        blocks: Number of blocks.
        share: Share of the blocks, 0 to 1.
    """
    return evenly(int(share * blocks + 1e-6), blocks)  # a share may be a rounded quotient


def share_of(count: int, blocks: int) -> float:
    """The shortest decimal of at least two digits that is a share of ``count`` blocks, to be read and typed.

    Args:
        count: Number of blocks in the share.
        blocks: Number of blocks, at least ``count``.
    """
    scales = (float(10**digits) for digits in range(2, 16))
    shares = (math.ceil(count / blocks * scale - 1e-9) / scale for scale in scales)
    return next(share for share in shares if share <= 1 and sum(spread_over(blocks, share)) == count)


def size_of_share(sizes: Sequence[int], share: float) -> int:
    """Size of a share of blocks.

    Args:
        sizes: Size of each block, in any unit.
        share: Share of the blocks, 0 to 1.
    """
    return sum(compress(sizes, spread_over(len(sizes), share)))


def _is_share(value: object) -> bool:
    return isinstance(value, float) and 0 < value <= 1


def _is_part(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_on_nodes(value: str | float) -> bool:
    return value == "node" or _is_share(value)


def _units_on_nodes(value: Any, blocks: int, *, otherwise: str) -> Sequence[Any]:
    if not _is_share(value):
        return [value] * (1 + blocks)
    return [otherwise, *("node" if kept else otherwise for kept in spread_over(blocks, value))]


def _listed(choices: Iterable[str]) -> str:
    return ", ".join(map(repr, choices))


CommunicationOptions.PAPER = CommunicationOptions()
CommunicationOptions.NODE = CommunicationOptions(cache_parameters="node", accumulate_gradients="node")
CommunicationOptions.RANK = CommunicationOptions(cache_parameters="rank", accumulate_gradients="rank")
CommunicationOptions.AUTO = CommunicationOptions(
    cache_parameters="auto", accumulate_gradients="auto", frozen_on_ranks="auto"
)
