"""The options of MiCS that all integrations take, declared once."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from textwrap import dedent, indent
from typing import Literal, TypeVar

import torch
from typing_extensions import TypedDict

from lightning_mics.sharding.blocks import ModuleClasses
from lightning_mics.sharding.optimizers.offload import Offload
from lightning_mics.sharding.options import AccumulateGradients, CacheParameters, FrozenOnRanks


class PolicyOptions(TypedDict, total=False):
    """Options of sharding, as ``MiCSStrategy``, ``MiCSFabricStrategy`` and ``MiCSPlugin`` take them.

    Attributes:
        partition_size: Ranks per partition group; ``"auto"``, the default, is the smallest whole number of nodes whose
            memory holds the model states. Where ranks run on several hosts, a training measures their links; ``"auto"``
            of this, ``hierarchical``, ``cache_parameters`` and ``accumulate_gradients`` is then what communicates for
            the shortest time and fits.
        ranks_per_node: Ranks on each node; None, the default, takes it from the launcher. An integer pretends that
            nodes are smaller, for tests and for runs on one machine.
        hierarchical: Whether collectives of a partition group that spans nodes run in two stages; ``"auto"``, the
            default, does so where it has several ranks on each node.
        cache_parameters: Where unsharded parameters are cached until the gradient accumulation boundary: ``"never"``,
            they are gathered at every use; on each ``"node"``, spread over its ranks, they are gathered between nodes
            once per step; on each ``"rank"``, they are gathered once per step. A share, as 0.25, is ``"node"`` for so
            many of the blocks. ``"auto"``, the default, is ``"rank"`` if the unsharded model states would fit a rank,
            else ``"node"`` if memory allows, else the largest share that it allows, else ``"never"``.
        accumulate_gradients: Where gradients are accumulated until the boundary: in each rank's ``"shard"``, reduced
            in every micro-step; on each ``"node"``, reduced between nodes once per step; on each ``"rank"``, reduced
            once per step. A share, as 0.25, is ``"node"`` for so many of the blocks. ``"auto"``, the default, chooses
            as for ``cache_parameters``, from the memory it leaves.
        frozen_on_ranks: Share of the blocks with frozen weights, 0 to 1, that each rank holds unsharded for the whole
            job, those first that save the most traffic for their memory; then nothing of them is sent again, also
            inside nodes. ``"auto"``, the default, is as much as memory allows after the options above, where that
            communicates for a shorter time.
        inter_node_reduce_dtype: Dtype in which gradients are sent between nodes, or its name; None, the default, is
            ``reduce_dtype``, in which they are added up in any case.
        inter_node_prefetch: Number of blocks whose gather between nodes runs ahead, while earlier blocks are gathered
            inside nodes and computed; 0, the default, is none. Takes their unsharded bytes on each node.
        cache_offload: Whether what is cached and accumulated on nodes waits in host memory between uses, fetched one
            block ahead, False by default. With True, ``"auto"`` of ``cache_parameters`` and ``accumulate_gradients`` is
            ``"node"``.
        reduce_dtype: Dtype in which gradients are reduced and added up, or its name; None, the default, follows the
            precision: float32 for float32 and mixed precision, bfloat16 for a model in bfloat16.
        block_classes: Classes of the blocks to shard, or their names; None, the default, takes the model's
            ``_no_split_modules``, else the longest list of equal modules.
        activation_checkpointing: Whether blocks are recomputed in backward, False by default; a number between 0 and 1
            is the share of the blocks that are, spread over the depth; classes or names choose other modules, patterns
            choose blocks by FQN: ``"network.transformer.h.*[02468]"``.
        activation_offload: Whether the inputs of recomputed blocks wait for the backward in host memory, fetched one
            block ahead, False by default. Compiled blocks keep theirs on the device.
        offload: Whether model states are in host memory, False by default: ``"optimizer"`` for the optimizer's states,
            True for weights, gradients and these. The optimizer steps on the host.
        broadcast_buffers: Whether all ranks get the buffers of rank 0, such as running statistics, where they differ
            and a step, an evaluation or a checkpoint uses them, True by default; False keeps each rank's own.
        two_hop: Whether gradients are reduced over replicas at the boundary only, True by default; False does so in
            every micro-step, as hybrid sharding does. For measurements.
        allow_unused: Whether ranks may use different blocks in training, as with layer drop, early exit or experts by
            rank, False by default; True trains them as DistributedDataParallel does with
            ``find_unused_parameters=True``, and takes the bytes of all parameters and all gradients on each rank.
        rail_max_ctas: Largest number of blocks of threads that NCCL runs for collectives between nodes; None, the
            default, is NCCL's own. A few are enough for a network, and leave the device to what runs beside them.
        certify_every_n_steps: Number of optimizer steps between two comparisons of the replicas, bit for bit, by a
            small all-reduce that is read one step later; a difference stops all ranks. None, the default, compares them
            at start and after loading only.
    """

    partition_size: int | Literal["auto"]
    ranks_per_node: int | None
    hierarchical: bool | Literal["auto"]
    cache_parameters: CacheParameters
    accumulate_gradients: AccumulateGradients
    frozen_on_ranks: FrozenOnRanks
    inter_node_reduce_dtype: torch.dtype | str | None
    inter_node_prefetch: int | Literal["auto"]
    cache_offload: bool
    reduce_dtype: torch.dtype | str | None
    block_classes: ModuleClasses | None
    activation_checkpointing: bool | float | ModuleClasses
    activation_offload: bool
    offload: Offload
    broadcast_buffers: bool
    two_hop: bool
    allow_unused: bool
    rail_max_ctas: int | None
    certify_every_n_steps: int | None


Documented = TypeVar("Documented", bound=Callable[..., object])


def documented(taker: Documented) -> Documented:
    """Decorate a class or constructor that takes ``**policy``: its docstring lists the options in place of that entry.

    Args:
        taker: A class or its constructor, with a line ``policy:`` in the ``Args:`` of its docstring.
    """
    _, _, options = (inspect.getdoc(PolicyOptions) or "").partition("Attributes:\n")
    lines: list[str] = []
    for line in (taker.__doc__ or "").splitlines():
        entry = line.lstrip()
        is_policy = entry.startswith("policy: ")
        margin = " " * (len(line) - len(entry))
        lines += indent(dedent(options), margin).splitlines() if is_policy else [line]
    taker.__doc__ = "\n".join(lines) or None
    return taker


def check_names(owner: type, options: Mapping[str, object]) -> None:
    """Check that all options exist.

    Args:
        owner: Class that takes the options as ``**policy``, in addition to options of its own.
        options: Options that it was given, by name.

    Raises:
        TypeError: If an option does not exist; the message names the nearest.
    """
    known = [name for name in inspect.signature(owner).parameters if name != "policy"]
    known += PolicyOptions.__annotations__
    for name in options:
        if name not in PolicyOptions.__annotations__:
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise TypeError(f"{owner.__name__} has no option {name!r}; {advice}")
