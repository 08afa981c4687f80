"""How to shard a model, once model and job are known: the part that all integrations have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from typing_extensions import Unpack

from lightning_mics._torch.host_memory import host_memory_bytes
from lightning_mics.collectives.agreement import on_rank_0
from lightning_mics.collectives.control_plane import ControlPlane, control_plane
from lightning_mics.cost.communication_time import UNKNOWN_MICRO_STEPS, Pricing
from lightning_mics.cost.hardware import Links
from lightning_mics.cost.probe import measure_links
from lightning_mics.cost.step_traffic import find_units
from lightning_mics.policy.choice import Choice, ShardingJob, choose, fitting_ways, options_that_may_be_auto
from lightning_mics.policy.hosts import check_hosts, hosts_of_ranks
from lightning_mics.policy.memory import ModelSize, device_memory_bytes, in_gib, measure_model
from lightning_mics.policy.options import PolicyOptions, check_names
from lightning_mics.policy.out_of_memory import memory_advice
from lightning_mics.policy.resumed import choice_of_checkpoint
from lightning_mics.policy.start_report import start_report
from lightning_mics.sharding.activation_checkpointing import find_recomputed
from lightning_mics.sharding.blocks import find_blocks
from lightning_mics.sharding.modules.caches_on_host import check_caches_fit
from lightning_mics.sharding.modules.initializers import describe_initializers
from lightning_mics.sharding.optimizers.offload import Offload, check_host_memory, checked_offload
from lightning_mics.sharding.options import CommunicationOptions, floating_dtype
from lightning_mics.sharding.ranks.replicas import checked_every
from lightning_mics.sharding.shard_model import mixed_precision_policy, shard_model
from lightning_mics.sharding.sharded import Sharded
from lightning_mics.techniques.partition_groups import create_partition_groups
from lightning_mics.topology import Topology


class Policy:
    """MiCS: which ranks share the model states, and when parameters and gradients are communicated.

    Args:
        timeout: Longest duration of a collective of any group; None is the backend's default: 10 minutes with NCCL, 30
            with gloo, over which ranks agree and save.
        policy: Options of sharding, as in :class:`~lightning_mics.policy.options.PolicyOptions`.

    Attributes:
        given: Options as they were given.
        offload: Which model states are in host memory.

    Raises:
        TypeError: If an option does not exist.
        ValueError: If the value of an option is invalid.
    """

    def __init__(self, *, timeout: timedelta | None = None, **policy: Unpack[PolicyOptions]) -> None:
        check_names(type(self), policy)
        self.given = policy
        partition_size = policy.get("partition_size", "auto")
        if isinstance(partition_size, str) and partition_size != "auto":
            raise ValueError(f'partition_size={partition_size!r} is neither "auto" nor a number of ranks')
        self.partition_size = partition_size
        self.communication = CommunicationOptions(
            hierarchical=policy.get("hierarchical", "auto"),
            cache_parameters=policy.get("cache_parameters", "auto"),
            accumulate_gradients=policy.get("accumulate_gradients", "auto"),
            frozen_on_ranks=policy.get("frozen_on_ranks", "auto"),
            inter_node_reduce_dtype=floating_dtype("inter_node_reduce_dtype", policy.get("inter_node_reduce_dtype")),
            inter_node_prefetch=policy.get("inter_node_prefetch", 0),
            cache_offload=policy.get("cache_offload", False),
            two_hop=policy.get("two_hop", True),
            allow_unused=policy.get("allow_unused", False),
        )
        self._ranks_per_node = policy.get("ranks_per_node")
        self._reduce_dtype = floating_dtype("reduce_dtype", policy.get("reduce_dtype"))
        self._block_classes = policy.get("block_classes")
        self._activation_checkpointing = policy.get("activation_checkpointing", False)
        self._activation_offload = policy.get("activation_offload", False)
        self.offload = checked_offload(policy.get("offload", False))
        self._broadcast_buffers = policy.get("broadcast_buffers", True)
        self._certify_every_n_steps = checked_every(policy.get("certify_every_n_steps"))
        self._rail_max_ctas = policy.get("rail_max_ctas")
        self._timeout = timeout

    def check(self, *, world_size: int, local_size: int) -> None:
        """Reject a job that cannot work, with the same error on every rank and before any rank waits for another.

        Args:
            world_size: Ranks in the job.
            local_size: Ranks that the launcher has started on each machine.

        Raises:
            ValueError: If the options do not fit the job.
            RuntimeError: If the options need a newer torch.
        """
        node_size = self._node_size(local_size)
        size = node_size if self.partition_size == "auto" else self.partition_size
        topology = Topology(world_size=world_size, ranks_per_node=node_size, partition_size=size)
        if self.partition_size != "auto":
            self.communication.check(topology)

    def shard(
        self,
        model: nn.Module,
        *,
        precision: str,
        device: torch.device,
        local_size: int,
        training: bool = True,
        micro_steps: int | None = None,
        resumed: Mapping[str, Any] | None = None,
        averages: int = 0,
    ) -> Sharded:
        """Shard ``model`` in place; every rank calls it, once the process group is initialized.

        Args:
            model: Module that is not sharded; see :func:`~lightning_mics.sharding.shard_model.shard_model`.
            precision: ``"32-true"``, ``"bf16-true"``, ``"bf16-mixed"`` or ``"16-mixed"``.
            device: Device of this rank.
            local_size: Ranks that the launcher has started on each machine.
            training: Whether the model is trained; one that is only evaluated may have no parameters.
            micro_steps: Micro-steps per optimizer step; None if nobody knows.
            resumed: Entries of the sharded checkpoint that training resumes from, whose choice is kept; None or empty
                if there is none.
            averages: Number of averages of the weights that are kept.

        Raises:
            TypeError: If the model cannot be sharded.
            ValueError: If an option does not fit the job or the model, ranks of one node run on several hosts, or
                weights are in float16, whose gradients cannot be unscaled.
            HostMemoryError: If model states, or caches and sums, that go to the host do not fit its memory.
        """
        if precision == "16-mixed":
            _check_unscalable(model)
        mixed_precision = mixed_precision_policy(precision, reduce_dtype=self._reduce_dtype)
        blocks = find_blocks(model, self._block_classes, may_be_empty=not training)
        if not isinstance(self._activation_offload, bool):
            raise ValueError(
                f"activation_offload={self._activation_offload!r} is neither True nor False; only the recipes, whose "
                'plan knows what activations take, have "auto"'
            )
        self.communication.check_not_for_plans()
        # raises before ranks wait for each other
        recomputed = find_recomputed(model, blocks, self._activation_checkpointing)
        size = measure_model(
            model,
            blocks.values(),
            gathered_dtype=mixed_precision.param_dtype,
            reduce_dtype=mixed_precision.reduce_dtype,
            offload=self.offload,
            averages=averages,
        )
        half = torch.bfloat16 if precision == "bf16-true" else torch.float32
        reduce_dtype = mixed_precision.reduce_dtype or half
        control = control_plane(self._timeout)

        def price(links: Links) -> Pricing:
            return Pricing(
                units=tuple(find_units(model, blocks)),
                gathered_dtype=mixed_precision.param_dtype or half,
                reduce_dtype=reduce_dtype,
                links=links,
                micro_steps=micro_steps or UNKNOWN_MICRO_STEPS,
            )

        choice = self._choose_on_ranks(
            size,
            device=device,
            local_size=local_size,
            control=control,
            resumed=resumed or {},
            price=price if training else None,
        )
        if self._block_classes is None and not blocks and size.gathered_bytes:
            _check_one_unit(model, choice)
        self.communication.check(choice.topology)
        moves = self.offload or choice.host_bytes
        host_bytes = _smallest(host_memory_bytes(), control, "compares the memory of hosts") if moves else 0
        rank_host_bytes = size.per_rank_host_bytes(choice.topology.partition_size)
        check_host_memory(self.offload, rank_bytes=rank_host_bytes, host_bytes=host_bytes, processes=local_size)
        check_caches_fit(choice.host_bytes, states_bytes=rank_host_bytes, host_bytes=host_bytes, processes=local_size)
        initializers = describe_initializers(model)
        frozen_bytes = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        groups = create_partition_groups(
            choice.topology,
            device_type=device.type,
            hierarchical=choice.communication.hierarchical,
            timeout=self._timeout,
            rail_max_ctas=self._rail_max_ctas,
            caches_on_nodes=choice.communication.caches_on_nodes,
            serve_host=self.offload is not False,
        )
        schedule = shard_model(
            model,
            groups,
            communication=choice.communication,
            block_classes=self._block_classes,
            activation_checkpointing=self._activation_checkpointing,
            activation_offload=self._activation_offload,
            offload=self.offload,
            mixed_precision=mixed_precision,
            broadcast_buffers=self._broadcast_buffers,
            certify_every_n_steps=self._certify_every_n_steps,
        )
        report = start_report(
            choice,
            reduce_dtype=reduce_dtype,
            initializers=initializers,
            frozen_bytes=frozen_bytes,
            on_host=_on_host(self.offload, rank_bytes=rank_host_bytes, host_bytes=host_bytes, processes=local_size),
        )
        advice = memory_advice(
            choice, recomputes=bool(recomputed), offloads=self._activation_offload, states_on_host=self.offload
        )
        asked = options_that_may_be_auto(self.partition_size, self.communication)
        chosen = {name: value for name, value in choice.options.items() if asked.get(name) == "auto"}
        return Sharded(groups, schedule, report, tuple(blocks.values()), advice, chosen)

    def choose(
        self,
        size: ModelSize,
        *,
        world_size: int,
        local_size: int,
        capacity_bytes: int,
        pricing: Pricing | None = None,
    ) -> Choice:
        """Choose how to shard a model: these options, with "auto" replaced by what memory allows, or the fastest of it.

        Args:
            size: Size of the model, from :func:`~lightning_mics.policy.memory.measure_model`.
            world_size: Ranks in the job.
            local_size: Ranks that the launcher starts on each machine.
            capacity_bytes: Memory of one rank's device.
            pricing: The model on links with known rates; None chooses by memory alone.

        Raises:
            TypeError: If the partition size is not an integer.
            ValueError: If an option does not fit the job.
        """
        job = self._job(size, world_size=world_size, local_size=local_size, capacity_bytes=capacity_bytes)
        choice = choose(job, pricing)
        self.communication.check(choice.topology)
        return choice

    def _choose_on_ranks(
        self,
        size: ModelSize,
        *,
        device: torch.device,
        local_size: int,
        control: ControlPlane,
        resumed: Mapping[str, Any],
        price: Callable[[Links], Pricing] | None,
    ) -> Choice:
        """Choose in the running job: as in the checkpoint, else by time if there are several hosts, else by memory.

        Args:
            size: Size of the model.
            device: Device of this rank.
            local_size: Ranks that the launcher has started on each machine.
            control: Control plane of all ranks.
            resumed: Entries of the checkpoint that training resumes from.
            price: What prices the model on links whose rates were measured; None if the time does not matter.

        Raises:
            ValueError: If an option does not fit the job, or ranks of one node run on several hosts.
        """
        hosts = hosts_of_ranks(control)
        if self._ranks_per_node is None:
            check_hosts(hosts, local_size)
        job = self._job(
            size,
            world_size=dist.get_world_size(),
            local_size=local_size,
            capacity_bytes=_capacity_bytes(device, local_size=local_size, control=control),
        )
        by_memory = choose(job)  # raises on all ranks alike
        self.communication.check(by_memory.topology)
        kept, note = choice_of_checkpoint(resumed, job)
        if kept is not None:
            return replace(kept, resumed=note)
        if price is None or len(set(hosts)) < 2 or len(fitting_ways(job)) < 2:
            return replace(by_memory, resumed=note)
        links = measure_links(
            control,
            ranks_per_node=self._node_size(local_size),
            device=device,
            timeout=self._timeout,
            rail_max_ctas=None if device.type == "cpu" else self._rail_max_ctas,
        )
        by_time = on_rank_0(lambda: choose(job, price(links)))
        return replace(by_time, resumed=note)

    def _job(self, size: ModelSize, *, world_size: int, local_size: int, capacity_bytes: int) -> ShardingJob:
        return ShardingJob(
            size=size,
            world_size=world_size,
            ranks_per_node=self._node_size(local_size),
            capacity_bytes=capacity_bytes,
            partition_size=self.partition_size,
            communication=self.communication,
        )

    def check_kept(self, model: nn.Module, sharded: Sharded) -> None:
        """Check that an already sharded model is still fully sharded, and with this partition size.

        Args:
            model: The sharded model.
            sharded: Groups and schedule that it was sharded with.

        Raises:
            RuntimeError: If parameters were added after it was sharded.
            ValueError: If its partition groups have another size than this policy's.
        """
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor):
                raise RuntimeError(
                    f"parameter {name!r} appeared after the model was sharded; let `configure_model` return at once if "
                    "the model exists already"
                )
        topology = sharded.groups.topology
        if self.partition_size not in ("auto", topology.partition_size):
            raise ValueError(
                f"the model is already sharded with partition_size={topology.partition_size} by another strategy; "
                f"partition_size={self.partition_size} needs a new instance of the model"
            )

    def _node_size(self, local_size: int) -> int:
        return self._ranks_per_node or local_size


def _check_unscalable(model: nn.Module) -> None:
    """Check that gradients will be in a dtype with the range of float32, in which they are unscaled.

    Raises:
        ValueError: If a trained parameter is in float16.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(
                f"parameter {name!r} is in float16, and precision='16-mixed' trains weights in float32, of which it "
                "gathers float16 copies: gradients of float16 weights cannot be unscaled; leave out `.half()`, or call "
                "`model.float()` before the model is sharded"
            )


def _on_host(offload: Offload, *, rank_bytes: int, host_bytes: int, processes: int) -> str:
    """Model states in host memory, in words; empty if there are none."""
    if not offload:
        return ""
    what = "weights, gradients and optimizer states" if offload is True else "optimizer states, and copies in a step"
    taken = in_gib(processes * rank_bytes)
    return f"about {taken} of {in_gib(host_bytes)} per host of {processes} ranks: {what} (Adam)"


def _check_one_unit(model: nn.Module, choice: Choice) -> None:
    """Check that a model in which no blocks were found fits as one parameter group; rank 0 warns that it is one.

    Raises:
        TypeError: If it does not fit.
    """
    found = (
        f"found no blocks to shard in {type(model).__name__}: it has no `_no_split_modules` and no list of modules of "
        "one class"
    )
    if not choice.fits:
        raise TypeError(f"{found}, and as one parameter group it does not fit; pass block_classes=[BlockClass]")
    if dist.get_rank() == 0:
        warnings.warn(
            f"{found}, so it is one parameter group, unsharded during the whole step; pass block_classes=[BlockClass] "
            "to shard it block by block, or block_classes=[] for this without a warning",
            stacklevel=2,
        )


def _capacity_bytes(device: torch.device, *, local_size: int, control: ControlPlane) -> int:
    """Memory of the smallest device of the job: all ranks must choose the same partition size."""
    return _smallest(device_memory_bytes(device, processes=local_size), control, "compares the memory of devices")


def _smallest(own: int, control: ControlPlane, entry: str) -> int:
    """The smallest of a number of each rank."""
    return -int(control.largest(torch.tensor(-own), entry))
