"""The options of communication: what they may be, and which of them fit a topology."""

from __future__ import annotations

from typing import Literal, TypedDict, get_args

import torch

from lightning_mics.topology import Topology

Gather = Literal["every_use", "once_per_step"]


Reduce = Literal["every_micro_step", "once_per_step"]


WIRE_DTYPES = (torch.float32, torch.bfloat16)


class OncePerStepOptions(TypedDict):
    """How often each kind of traffic runs."""

    cross_node_gather: Gather
    cross_node_reduce: Reduce
    in_node_gather: Gather
    in_node_reduce: Reduce


EVERY_TIME: OncePerStepOptions = {
    "cross_node_gather": "every_use",
    "cross_node_reduce": "every_micro_step",
    "in_node_gather": "every_use",
    "in_node_reduce": "every_micro_step",
}


def check_traffic_options(
    topology: Topology,
    *,
    hierarchical: bool,
    cross_node_gather: str,
    cross_node_reduce: str,
    in_node_gather: str,
    in_node_reduce: str,
    inter_node_reduce_dtype: torch.dtype | None,
    two_hop: bool,
) -> None:
    """Refuse options that are unknown, or that flat collectives cannot serve.

    Args:
        topology: Where every rank is.
        hierarchical: Whether collectives are.
        cross_node_gather: When parameters cross nodes.
        cross_node_reduce: When gradients cross nodes.
        in_node_gather: When parameters travel inside nodes.
        in_node_reduce: When gradients travel inside nodes.
        inter_node_reduce_dtype: What gradients travel in between nodes.
        two_hop: Whether the second hop waits for the boundary.

    Raises:
        ValueError: If a value is unknown, needs hierarchical collectives where they are flat, or leaves the second hop
            nothing to reduce before the boundary.
    """
    check_choice("cross_node_gather", cross_node_gather, get_args(Gather))
    check_choice("cross_node_reduce", cross_node_reduce, get_args(Reduce))
    check_choice("in_node_gather", in_node_gather, get_args(Gather))
    check_choice("in_node_reduce", in_node_reduce, get_args(Reduce))
    if inter_node_reduce_dtype not in (None, *WIRE_DTYPES):
        raise ValueError(
            f"inter_node_reduce_dtype={inter_node_reduce_dtype!r} is not one of None, torch.float32, torch.bfloat16"
        )
    check_two_hop(two_hop, cross_node_reduce=cross_node_reduce, in_node_reduce=in_node_reduce)
    if not topology.spans_nodes or hierarchical or topology.local_ranks_per_partition_group == 1:
        return
    once = "once_per_step"
    in_stages = {
        "cross_node_gather='once_per_step'": cross_node_gather == once and in_node_gather != once,
        "cross_node_reduce='once_per_step'": cross_node_reduce == once and in_node_reduce != once,
        f"inter_node_reduce_dtype={inter_node_reduce_dtype}": inter_node_reduce_dtype is not None,
    }
    for option, is_wanted in in_stages.items():
        if is_wanted:
            raise ValueError(
                f"{option} needs collectives that cross nodes in a stage of their own, but hierarchical=False and "
                f"partition_size={topology.partition_size} spans {topology.nodes_per_partition_group} nodes; use "
                'hierarchical="auto"'
            )


def check_two_hop(two_hop: bool, *, cross_node_reduce: str, in_node_reduce: str) -> None:
    """Refuse a second hop in every micro-step where sums are kept back until the boundary, with a ValueError."""
    if not isinstance(two_hop, bool):
        raise ValueError(f"two_hop={two_hop!r} is neither True nor False")
    for option, value in (("cross_node_reduce", cross_node_reduce), ("in_node_reduce", in_node_reduce)):
        if not two_hop and value == "once_per_step":
            raise ValueError(
                f"two_hop=False reduces over replicas in every micro-step, but {option}='once_per_step' keeps "
                "gradients back until the boundary; use 'every_micro_step', or two_hop=True"
            )


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not one of ``choices``, with a ValueError."""
    if value not in choices:
        raise ValueError(f"{option}={value!r} is not one of {', '.join(map(repr, choices))}")
