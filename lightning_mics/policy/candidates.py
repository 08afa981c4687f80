"""All ways to run a job, each with its memory, its traffic and the predicted time of a step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Literal

from lightning_mics._torch.host_memory import USABLE_SHARE as HOST_SHARE
from lightning_mics.collectives.traffic import Sent
from lightning_mics.cost.batches import Batches, split_global_batch
from lightning_mics.cost.hardware import Hardware
from lightning_mics.cost.step_time import Arithmetic, Seconds, step_seconds
from lightning_mics.cost.step_traffic import StepTraffic, step_traffic
from lightning_mics.policy.choice import Choice, ShardingJob, choose
from lightning_mics.policy.memory import usable_bytes
from lightning_mics.policy.places import largest_share
from lightning_mics.policy.step_memory import step_bytes
from lightning_mics.policy.workload import Workload
from lightning_mics.sharding.modules.frozen_blocks import frozen_blocks
from lightning_mics.sharding.options import CommunicationOptions, share_of
from lightning_mics.topology import Topology, partition_sizes


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run the job.

    Attributes:
        system: "MiCS", or the name of the baseline.
        recomputed_share: Share of the blocks that are recomputed in backward; None if nobody has counted them.
        activation_offload: Whether the inputs of recomputed blocks wait for the backward in host memory.
        topology: Topology of the job.
        batches: Division of the global batch.
        communication: Options of the collectives, without "auto".
        states_bytes: Model states of a rank, with the unsharded parameters and gradients of the peak, in bytes.
        cached_bytes: Cached parameters and accumulated gradients of a rank, in bytes.
        memory_bytes: Tensors of a rank at the peak of a step, in bytes.
        fits: Whether ``memory_bytes`` leave the reserve of the device free, and the host holds what is moved there.
        node_sent: Bytes that a node sends per optimizer step.
        seconds: Predicted seconds of an optimizer step.
        hfu_tflops: TFLOP/s of one GPU at the expected time, with recomputation.
        mfu_tflops: TFLOP/s of one GPU at the expected time, without recomputation.
    """

    system: str
    topology: Topology
    batches: Batches
    communication: CommunicationOptions
    states_bytes: int
    cached_bytes: int
    memory_bytes: int
    fits: bool
    node_sent: Sent
    seconds: Seconds
    hfu_tflops: float
    mfu_tflops: float
    recomputed_share: float | None = None
    activation_offload: bool = False

    @property
    def in_stages(self) -> bool:
        """Whether inter-node collectives of the partition group are a stage of their own."""
        return self.communication.hierarchical is True


@dataclass(frozen=True, kw_only=True)
class Job:
    """A workload on a cluster, with what is given of its batches.

    Attributes:
        workload: The work of the model, with the alternatives to choose from.
        hardware: Hardware of each node.
        world_size: Ranks in the job.
        ranks_per_node: Ranks on each node.
        global_batch_size: Samples per optimizer step, over all ranks.
        micro_batch: Samples per rank and micro-step; None is free.
        accumulation: Micro-steps per optimizer step; None is free.
    """

    workload: Workload
    hardware: Hardware
    world_size: int
    ranks_per_node: int
    global_batch_size: int
    micro_batch: int | None = None
    accumulation: int | None = None

    def __post_init__(self) -> None:
        self.all_batches()  # raises

    @cached_property
    def _usable_bytes(self) -> int:
        return usable_bytes(self.hardware.memory_bytes)

    @cached_property
    def _usable_host_bytes(self) -> float:
        """Bytes of host memory for each rank."""
        return HOST_SHARE * self.hardware.host_memory_gib * 2**30 / self.ranks_per_node

    def all_batches(self) -> list[Batches]:
        """All divisions of the global batch, small micro-batches first.

        Raises:
            ValueError: If the global batch cannot be split as given.
        """
        first = split_global_batch(
            self.global_batch_size, ranks=self.world_size, micro=self.micro_batch, accumulation=self.accumulation
        )
        if self.micro_batch or self.accumulation:
            return [first]
        of_rank = first.micro * first.accumulation
        return [Batches(micro, of_rank // micro) for micro in range(1, of_rank + 1) if of_rank % micro == 0]

    def candidates(
        self, partition_size: int | Literal["auto"], communication: CommunicationOptions
    ) -> Iterator[Candidate]:
        """All ways to run the job that the options allow; what is given is never changed.

        Args:
            partition_size: Ranks per partition group, or "auto" for all sizes.
            communication: Options of the user, with "auto" where they are free.

        Raises:
            ValueError: If the partition size or an option does not fit the job.
        """
        if communication.inter_node_prefetch == "auto" and self.workload.size.offload is True:
            communication = replace(communication, inter_node_prefetch=0)  # shards are on the host
        sizes = partition_sizes(world_size=self.world_size, ranks_per_node=self.ranks_per_node)
        if communication.cache_offload is True:  # not every size allows it
            largest = self.world_size if partition_size == "auto" else partition_size
            communication.check(
                Topology(world_size=self.world_size, ranks_per_node=self.ranks_per_node, partition_size=largest)
            )
        for size in sizes if partition_size == "auto" else (partition_size,):
            topology = Topology(world_size=self.world_size, ranks_per_node=self.ranks_per_node, partition_size=size)
            for options in _allowed(topology, communication, is_free=partition_size == "auto"):
                choice = self.choice_of(topology, options)
                whole = list(self.priced("MiCS", topology, choice.communication))
                yield from whole
                for candidate in whole:
                    in_part = list(self._in_part(candidate, communication))
                    yield from in_part
                    for each in (candidate, *in_part):
                        yield from self._with_frozen(each, communication)
                if communication.cache_offload == "auto":
                    yield from self._on_host(whole)

    def _on_host(self, whole: Sequence[Candidate]) -> Iterator[Candidate]:
        """Those of some candidates that do not fit, with caches and sums on the host; others would gain nothing.

        Args:
            whole: Ways to run the job, with one division of the model.
        """
        tight = [candidate for candidate in whole if not candidate.fits]
        if not tight:
            return
        topology, options = tight[0].topology, tight[0].communication
        can_move = tight[0].in_stages or topology.local_ranks_per_partition_group == 1  # flat caches stay on the device
        if can_move and "node" in (options.cache_parameters, options.accumulate_gradients):
            ways = [(self._work_of(candidate), candidate.batches) for candidate in tight]
            yield from self.priced("MiCS", topology, replace(options, cache_offload=True), only=ways)

    def _work_of(self, candidate: Candidate) -> Workload:
        return self.workload.way(candidate.recomputed_share, activation_offload=candidate.activation_offload)

    def _in_part(self, whole: Candidate, asked: CommunicationOptions) -> Iterator[Candidate]:
        """A candidate that does not fit, with as many blocks on nodes as fit in place of all.

        Args:
            whole: A way to run the job.
            asked: Options of the user.
        """
        options = whole.communication
        if whole.fits or options.allow_unused or options.cache_offload:
            return
        work, topology, part = self._work_of(whole), whole.topology, None
        k, blocks = topology.local_ranks_per_partition_group, work.elements(topology.partition_size).blocks
        if asked.accumulate_gradients == "auto" and options.accumulate_gradients == "node":
            options = replace(options, accumulate_gradients="shard")
            sizes = [count * work.reduce_dtype.itemsize for count in blocks]
            part = largest_share(sizes, k, self._left_bytes(work, whole, options))
            options = replace(options, accumulate_gradients=part or "shard")
        elif asked.cache_parameters == "auto" and options.cache_parameters == "node":
            options = replace(options, cache_parameters="never")
            sizes = [count * work.gathered_dtype.itemsize for count in blocks]
            part = largest_share(sizes, k, self._left_bytes(work, whole, options))
            options = replace(options, cache_parameters=part or "never")
        if part is not None:
            yield from self.priced("MiCS", topology, options, only=[(work, whole.batches)])

    def _with_frozen(self, candidate: Candidate, asked: CommunicationOptions) -> Iterator[Candidate]:
        """A candidate that fits, with frozen weights of as many blocks on ranks as fit beside it.

        Args:
            candidate: A way to run the job.
            asked: Options of the user.
        """
        options, topology, batches = candidate.communication, candidate.topology, candidate.batches
        blocks = len(frozen_blocks(self.workload.sizes)) if asked.frozen_on_ranks == "auto" else 0
        on_ranks = topology.partition_size == 1 or options.cache_parameters == "rank" or options.allow_unused
        if not blocks or on_ranks or not candidate.fits:
            return
        work = self._work_of(candidate)

        def taken(count: int) -> int:
            wanted = replace(options, frozen_on_ranks=share_of(count, blocks))
            return step_bytes(work, topology, wanted, samples=batches.micro, micro_steps=batches.accumulation)

        count = bisect_right(range(1, blocks + 1), self._usable_bytes, key=taken)
        if count:
            wanted = replace(options, frozen_on_ranks=share_of(count, blocks))
            yield from self.priced("MiCS", topology, wanted, only=[(work, batches)])

    def _left_bytes(self, work: Workload, candidate: Candidate, options: CommunicationOptions) -> int:
        """Memory that a candidate with other options leaves, in bytes."""
        batches = candidate.batches
        taken = step_bytes(work, candidate.topology, options, samples=batches.micro, micro_steps=batches.accumulation)
        return self._usable_bytes - taken

    def choice_of(self, topology: Topology, options: CommunicationOptions) -> Choice:
        """What the strategy makes of options without "auto".

        Args:
            topology: Topology of the job.
            options: Options without "auto".
        """
        job = ShardingJob(
            size=self.workload.size,
            world_size=topology.world_size,
            ranks_per_node=topology.ranks_per_node,
            capacity_bytes=self.hardware.memory_bytes,
            partition_size=topology.partition_size,
            communication=options,
        )
        return choose(job)

    def priced(
        self,
        system: str,
        topology: Topology,
        options: CommunicationOptions,
        *,
        traffic_of: Callable[..., StepTraffic] = step_traffic,
        reshard_after_forward: bool | int = True,
        only: Sequence[tuple[Workload, Batches]] | None = None,
    ) -> Iterator[Candidate]:
        """One way to divide the model over ranks, with all batches and all recomputation that the job allows.

        Args:
            system: Name of the system that runs so.
            topology: Topology of the job.
            options: Options without "auto".
            traffic_of: Function that computes the collectives of a step.
            reshard_after_forward: What FSDP2 frees after a forward: all, nothing, or all but a shard of so many ranks.
            only: Ways of the workload, with batches, to price alone; None prices all.
        """
        cached_bytes = self.choice_of(topology, options).cached_bytes
        if reshard_after_forward is not True:
            cached_bytes += -(-self.workload.size.gathered_bytes // (int(reshard_after_forward) or 1))
        traffic = traffic_of(
            self.workload.units,
            topology,
            communication=options,
            gathered_dtype=self.workload.gathered_dtype,
            reduce_dtype=self.workload.reduce_dtype,
        )
        ways = list(product(self.workload.ways, self.all_batches())) if only is None else only
        predicted = step_seconds(
            traffic,
            self.hardware,
            [
                Arithmetic(
                    micro_steps=batches.accumulation,
                    micro_step_flops=batches.micro * work.hardware_flops,
                    recomputed_share=work.recomputed_share or 0.0,
                    host_bytes=batches.micro * work.activations.on_host,
                )
                for work, batches in ways
            ],
            ranks_per_node=topology.ranks_per_node,
            units_ahead=options.units_ahead,
        )
        for (work, batches), seconds in zip(ways, predicted, strict=True):
            memory_bytes = step_bytes(
                work,
                topology,
                options,
                samples=batches.micro,
                micro_steps=batches.accumulation,
                reshard_after_forward=reshard_after_forward,
            )
            host_bytes = batches.micro * work.activations.on_host
            host_bytes += work.size.per_rank_host_bytes(topology.partition_size)
            host_bytes += traffic.on_host_bytes(batches.accumulation)
            of_rank = traffic.sent(batches.accumulation)
            samples = batches.micro * batches.accumulation
            yield Candidate(
                system=system,
                topology=topology,
                batches=batches,
                communication=options,
                states_bytes=work.size.per_rank_bytes(topology.partition_size),
                cached_bytes=cached_bytes,
                memory_bytes=memory_bytes,
                fits=memory_bytes <= self._usable_bytes and host_bytes <= self._usable_host_bytes,
                node_sent=Sent(
                    of_rank.inside_bytes * topology.ranks_per_node, of_rank.between_bytes * topology.ranks_per_node
                ),
                seconds=seconds,
                hfu_tflops=samples * work.hardware_flops / seconds.expected / 1e12,
                mfu_tflops=samples * work.model_flops / seconds.expected / 1e12,
                recomputed_share=work.recomputed_share,
                activation_offload=work.activation_offload,
            )


def _allowed(
    topology: Topology, communication: CommunicationOptions, *, is_free: bool
) -> Iterator[CommunicationOptions]:
    """The options without "auto" that fit ``topology``.

    Args:
        topology: Topology of the job.
        communication: Options of the user.
        is_free: Whether the partition size is free, so that options which do not fit this one are left out.
    """
    both = topology.spans_nodes and topology.local_ranks_per_partition_group > 1
    given = communication.hierarchical
    if given is True and not both and is_free:
        given = "auto" if not topology.spans_nodes else False
    stages = ((True, False) if both else (False,)) if given == "auto" else (given,)
    single, on_nodes = topology.partition_size == 1, topology.spans_nodes
    for in_stages in stages:
        on_node = ("node",) if in_stages or (on_nodes and not both) else ()
        caches = ("never",) if single else ("never", *(("node",) if on_nodes else ()), "rank")
        sums = ("shard",) if single or not communication.two_hop else ("shard", *on_node, "rank")
        if communication.cache_parameters != "auto":
            caches = (communication.cache_parameters,)
        if communication.accumulate_gradients != "auto":
            sums = (communication.accumulate_gradients,)
        if communication.inter_node_prefetch == "auto":
            ahead = (0, 1) if in_stages else (0,)
        else:
            ahead = (communication.units_ahead,)
        offload = communication.cache_offload is True
        for cache, accumulate, units_ahead in product(caches, sums, ahead):
            options = replace(
                communication,
                hierarchical=in_stages,
                cache_parameters=cache,
                accumulate_gradients=accumulate,
                inter_node_prefetch=units_ahead,
                cache_offload=offload,
            )
            if options.frozen_on_ranks == "auto":  # as much as fits beside all else, later
                options = replace(options, frozen_on_ranks=0.0)
            if communication.allow_unused:
                options = options.on_ranks()
            try:
                options.check(topology)
            except ValueError:
                if len(stages) == 1 and not is_free and not (offload and len(caches) * len(sums) > 1):
                    raise
                continue
            yield options
