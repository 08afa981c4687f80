"""How a model is to be sharded, once it and the job are known: what all adapters to frameworks have in common."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from lightning_mics._torch.process_groups import check_order
from lightning_mics.policy.memory import ModelSize, device_memory_bytes, fits, measure_model, smallest_partition_size
from lightning_mics.policy.once_per_step import Auto, OncePerStep, choose_once_per_step
from lightning_mics.policy.start_report import start_report
from lightning_mics.sharding.activation_checkpointing import find_recomputed
from lightning_mics.sharding.blocks import ModuleClasses, find_blocks
from lightning_mics.sharding.options import (
    WIRE_DTYPES,
    Gather,
    Reduce,
    check_choice,
    check_traffic_options,
    check_two_hop,
)
from lightning_mics.sharding.shard_model import mixed_precision_policy, shard_model
from lightning_mics.sharding.sharded import Sharded
from lightning_mics.techniques.partition_groups import (
    check_hierarchical,
    choose_hierarchical,
    create_partition_groups,
)
from lightning_mics.topology import Topology


class Policy:
    """MiCS: which ranks share the model states, and when parameters and gradients travel where.

    Args:
        partition_size: Ranks per partition group; ``"auto"`` is the smallest whole number of nodes whose memory holds
            the model states.
        ranks_per_node: None takes it from the launcher. An integer pretends that nodes are smaller, for tests and for
            runs on one machine.
        hierarchical: Two-stage collectives; ``"auto"`` uses them where a partition group spans nodes.
        cross_node_gather: Where a partition group spans nodes: parameters cross nodes ``"once_per_step"``, for a copy
            on each node, or at ``"every_use"``; ``"auto"`` keeps the copy if memory allows.
        cross_node_reduce: Likewise gradients: ``"once_per_step"``, for sums on each node, or ``"every_micro_step"``.
        in_node_gather: Inside nodes: parameters travel ``"once_per_step"``, and so no more often between nodes, for a
            whole copy on each rank, or at ``"every_use"``; ``"auto"`` keeps the copy if a rank's memory would hold the
            whole model states.
        in_node_reduce: Likewise gradients: ``"once_per_step"``, for whole sums on each rank, or ``"every_micro_step"``.
        inter_node_reduce_dtype: What gradients travel in between nodes, a dtype or its name; None is ``reduce_dtype``,
            in which they are summed in any case.
        two_hop: Gradients are reduced over replicas at the boundary only; False does so in every micro-step, as hybrid
            sharding by itself does, to see what two hops save.
        reduce_dtype: What gradients are reduced and summed in, a dtype or its name; None follows the precision:
            float32 for float32 and mixed precision, bfloat16 for a model in bfloat16.
        block_classes: The blocks to shard, classes or class names; None takes the model's ``_no_split_modules``, else
            the longest list of equal modules.
        activation_checkpointing: True recomputes each block in backward; classes or names choose other modules,
            patterns some of the blocks by their names: ``"network.transformer.h.*[02468]"``.
        timeout: For the collectives of all groups.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option's value cannot be.
    """

    def __init__(
        self,
        *,
        partition_size: int | Literal["auto"] = "auto",
        ranks_per_node: int | None = None,
        hierarchical: bool | Literal["auto"] = "auto",
        cross_node_gather: Gather | Auto = "auto",
        cross_node_reduce: Reduce | Auto = "auto",
        in_node_gather: Gather | Auto = "auto",
        in_node_reduce: Reduce | Auto = "auto",
        inter_node_reduce_dtype: torch.dtype | str | None = None,
        two_hop: bool = True,
        reduce_dtype: torch.dtype | str | None = None,
        block_classes: ModuleClasses | None = None,
        activation_checkpointing: bool | ModuleClasses = False,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if isinstance(partition_size, str) and partition_size != "auto":
            raise ValueError(f'partition_size={partition_size!r} is neither "auto" nor a number of ranks')
        check_hierarchical(hierarchical)
        check_choice("cross_node_gather", cross_node_gather, ("auto", *get_args(Gather)))
        check_choice("cross_node_reduce", cross_node_reduce, ("auto", *get_args(Reduce)))
        check_choice("in_node_gather", in_node_gather, ("auto", *get_args(Gather)))
        check_choice("in_node_reduce", in_node_reduce, ("auto", *get_args(Reduce)))
        _check_agreement("gather", cross_node=cross_node_gather, in_node=in_node_gather)
        _check_agreement("reduce", cross_node=cross_node_reduce, in_node=in_node_reduce)
        check_two_hop(two_hop, cross_node_reduce=cross_node_reduce, in_node_reduce=in_node_reduce)
        self._partition_size = partition_size
        self._ranks_per_node = ranks_per_node
        self._hierarchical = hierarchical
        self._cross_node_gather = cross_node_gather
        self._cross_node_reduce = cross_node_reduce
        self._in_node_gather = in_node_gather
        self._in_node_reduce = in_node_reduce
        self._cross_node_dtype = _floating_dtype("inter_node_reduce_dtype", inter_node_reduce_dtype)
        self._two_hop = two_hop
        self._reduce_dtype = _floating_dtype("reduce_dtype", reduce_dtype)
        self._shard_modules = block_classes
        self._activation_checkpointing = activation_checkpointing
        self._timeout = timeout

    def check(self, *, world_size: int, local_size: int) -> None:
        """Refuse a job that cannot work, with the same error on every rank and before any rank waits for another.

        Args:
            world_size: Ranks in all.
            local_size: Ranks that the launcher has started on each machine.

        Raises:
            ValueError: If the options do not fit the job.
            RuntimeError: If they need a newer torch.
        """
        size = self._node_size(local_size) if self._partition_size == "auto" else self._partition_size
        topology = self._topology(size, world_size=world_size, local_size=local_size)
        if self._partition_size != "auto":
            self._check_collectives(topology)

    def shard(self, model: nn.Module, *, precision: str, device: torch.device, local_size: int) -> Sharded:
        """Shard ``model`` in place; every rank calls it, after all have met.

        Args:
            model: A plain module, as of :func:`~lightning_mics.sharding.shard_model.shard_model`.
            precision: ``"32-true"``, ``"bf16-true"`` or ``"bf16-mixed"``.
            device: Of this rank.
            local_size: As of :meth:`check`.

        Raises:
            TypeError: If the model cannot be sharded.
            ValueError: If an option does not fit the job or the model.
        """
        mixed_precision = mixed_precision_policy(precision, reduce_dtype=self._reduce_dtype)
        blocks = find_blocks(model, self._shard_modules)
        find_recomputed(model, blocks, self._activation_checkpointing)  # refuses before ranks wait for each other
        size = measure_model(
            model,
            blocks.values(),
            gathered_dtype=mixed_precision.param_dtype,
            reduce_dtype=mixed_precision.reduce_dtype,
        )
        capacity_bytes = _capacity_bytes(device, local_size=local_size)
        topology = self.choose_topology(size, capacity_bytes, world_size=dist.get_world_size(), local_size=local_size)
        self._check_collectives(topology)
        groups = create_partition_groups(
            topology, device_type=device.type, hierarchical=self._hierarchical, timeout=self._timeout
        )
        once_per_step = self._choose_once_per_step(topology, size, capacity_bytes)
        schedule = shard_model(
            model,
            groups,
            block_classes=self._shard_modules,
            **once_per_step.options(),
            inter_node_reduce_dtype=self._cross_node_dtype,
            two_hop=self._two_hop,
            activation_checkpointing=self._activation_checkpointing,
            mixed_precision=mixed_precision,
        )
        report = self._report(topology, once_per_step, size, capacity_bytes, mixed_precision, precision)
        return Sharded(groups, schedule, report, tuple(blocks.values()))

    def choose_topology(self, size: ModelSize, capacity_bytes: int, *, world_size: int, local_size: int) -> Topology:
        """Where every rank is, with partition groups as small as a model of that ``size`` allows, or as asked."""
        partition_size = self._partition_size
        if partition_size == "auto":
            partition_size = smallest_partition_size(
                size,
                world_size=world_size,
                ranks_per_node=self._node_size(local_size),
                capacity_bytes=capacity_bytes,
            )
        return self._topology(partition_size, world_size=world_size, local_size=local_size)

    def check_kept(self, model: nn.Module, sharded: Sharded) -> None:
        """Refuse a model that is sharded already and no longer, or not in this way.

        Raises:
            RuntimeError: If it has got parameters since.
            ValueError: If its partition groups have another size than this policy's.
        """
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor):
                raise RuntimeError(
                    f"parameter {name!r} appeared after the model was sharded; let `configure_model` return at once if "
                    "the model is there already"
                )
        topology = sharded.groups.topology
        if self._partition_size not in ("auto", topology.partition_size):
            raise ValueError(
                f"the model is already sharded with partition_size={topology.partition_size} by another strategy; "
                f"partition_size={self._partition_size} needs a new instance of the model"
            )

    def _topology(self, partition_size: int, *, world_size: int, local_size: int) -> Topology:
        return Topology(
            world_size=world_size, ranks_per_node=self._node_size(local_size), partition_size=partition_size
        )

    def _node_size(self, local_size: int) -> int:
        return self._ranks_per_node or local_size

    def _choose_once_per_step(self, topology: Topology, size: ModelSize, capacity_bytes: int) -> OncePerStep:
        return choose_once_per_step(
            size,
            topology,
            cross_node_gather=self._cross_node_gather,
            cross_node_reduce=self._cross_node_reduce,
            in_node_gather=self._in_node_gather,
            in_node_reduce=self._in_node_reduce,
            two_hop=self._two_hop,
            hierarchical=choose_hierarchical(self._hierarchical, topology),
            capacity_bytes=capacity_bytes,
        )

    def _check_collectives(self, topology: Topology) -> None:
        hierarchical = choose_hierarchical(self._hierarchical, topology)
        if hierarchical:
            check_order(topology.partition_group(0))
        check_traffic_options(
            topology,
            hierarchical=hierarchical,
            cross_node_gather="every_use" if self._cross_node_gather == "auto" else self._cross_node_gather,
            cross_node_reduce="every_micro_step" if self._cross_node_reduce == "auto" else self._cross_node_reduce,
            in_node_gather="every_use" if self._in_node_gather == "auto" else self._in_node_gather,
            in_node_reduce="every_micro_step" if self._in_node_reduce == "auto" else self._in_node_reduce,
            inter_node_reduce_dtype=self._cross_node_dtype,
            two_hop=self._two_hop,
        )

    def _report(
        self,
        topology: Topology,
        once_per_step: OncePerStep,
        size: ModelSize,
        capacity_bytes: int,
        mixed_precision: MixedPrecisionPolicy,
        precision: str,
    ) -> str:
        half = precision == "bf16-true"
        return start_report(
            topology,
            chosen_automatically=self._partition_size == "auto",
            hierarchical=choose_hierarchical(self._hierarchical, topology),
            once_per_step=once_per_step,
            two_hop=self._two_hop,
            inter_node_reduce_dtype=self._cross_node_dtype,
            reduce_dtype=mixed_precision.reduce_dtype or (torch.bfloat16 if half else torch.float32),
            states_bytes=size.per_rank_bytes(topology.partition_size) + once_per_step.kept_bytes,
            capacity_bytes=capacity_bytes,
            fits=fits(size, topology.partition_size, capacity_bytes, kept_bytes=once_per_step.kept_bytes),
        )


def _capacity_bytes(device: torch.device, *, local_size: int) -> int:
    """Memory of the smallest device of the job: all ranks must come to the same partition size."""
    smallest = torch.tensor(device_memory_bytes(device, processes=local_size), device=device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return int(smallest)


def _check_agreement(verb: str, *, cross_node: str, in_node: str) -> None:
    if in_node == "once_per_step" and cross_node not in ("auto", "once_per_step"):
        raise ValueError(
            f"in_node_{verb}='once_per_step' leaves nothing to cross nodes more often, but cross_node_{verb}="
            f"{cross_node!r}; use 'once_per_step' or 'auto'"
        )


def _floating_dtype(option: str, value: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if value is not None and not (isinstance(dtype, torch.dtype) and dtype in WIRE_DTYPES):
        raise ValueError(f"{option}={value!r} is not one of {', '.join(map(str, WIRE_DTYPES))}")
    return dtype
