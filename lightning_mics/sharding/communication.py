"""Which collectives each parameter group uses: the techniques, joined for one topology and one choice of options.

A parameter group is what FSDP2 gathers and reduces together: a block, or the root's own parameters. The collectives of
each where a partition group spans nodes, by where parameters are cached and gradients accumulated::

                    cached: never                   on each node                   on each rank
    gather          rail, then node                 rail once, then node           rail, then node, once
    gather, flat    all ranks                       all ranks once, then node      all ranks once

                    accumulated: as shards          on each node                   on each rank
    reduce          node, then rail                 node; at the boundary rail     at the boundary node, then rail
    hop 2           all-reduce over replicas, at the boundary, in all
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch.collective_operations import CollectiveOperation
from lightning_mics._torch.fsdp import ReduceScatter, fsdp_modules, replace_all_reduce, sharded_parameters
from lightning_mics._torch.streams import SideStream
from lightning_mics._torch.units.direct_use import serve_direct_use
from lightning_mics._torch.units.own_collectives import reject_options, serve_options
from lightning_mics._torch.units.param_groups import around_end_of_backward
from lightning_mics._torch.units.unit_hooks import UnitHooks
from lightning_mics.collectives.counted_group import CountedGroup
from lightning_mics.collectives.traffic import Kind, Traffic, sent_by
from lightning_mics.sharding.accumulation_window import AccumulationWindow
from lightning_mics.sharding.modules.frozen_blocks import UnitSize
from lightning_mics.sharding.optimizers.matrix_owners import MatrixOwners
from lightning_mics.sharding.options import CommunicationOptions
from lightning_mics.sharding.ranks.agreement import RankAgreement
from lightning_mics.sharding.ranks.never_used import NeverUsed
from lightning_mics.sharding.ranks.unused import UnusedUnits
from lightning_mics.sharding.schedule import AccumulationSchedule
from lightning_mics.techniques.cache_offload import HeldOnHost, HostCopies
from lightning_mics.techniques.flat import FlatAllGather, FlatReduceScatter
from lightning_mics.techniques.flat_cache import FlatNodeCache
from lightning_mics.techniques.hierarchical import HierarchicalAllGather, HierarchicalReduceScatter
from lightning_mics.techniques.inter_node_prefetch import InterNodePrefetch
from lightning_mics.techniques.micro_step_order import MicroStepOrder
from lightning_mics.techniques.once_per_step import NodeCache, NodeReduceScatter, RankCache
from lightning_mics.techniques.owner_exchange import OwnedReduction
from lightning_mics.techniques.partition_groups import PartitionGroups
from lightning_mics.techniques.pending_gradients import PendingGradients
from lightning_mics.techniques.two_hop import SecondHop


class Communication:
    """Gives each parameter group of a sharded model its collectives.

    Args:
        groups: Process groups of this rank.
        options: Options of communication, with ``hierarchical`` as the groups were made.
        broadcast_buffers: Whether all ranks get the buffers of rank 0 where they are used or saved.
        traffic: Counter of the collectives, which copies of a model share with it; None makes a new one.
    """

    def __init__(
        self,
        groups: PartitionGroups,
        options: CommunicationOptions,
        *,
        broadcast_buffers: bool = True,
        traffic: Traffic | None = None,
    ) -> None:
        self._broadcast_buffers = broadcast_buffers
        self._groups = groups
        self._topology = groups.topology
        self._mesh = groups.mesh
        self._options = options
        self._options_of: dict[str, CommunicationOptions] = {}  # by name of the unit, without shares
        self._backend = groups.backend
        self._traffic = traffic or Traffic()
        self._partition = self._counted(groups.partition)
        self._replication = self._counted(groups.replication) if groups.replication else None
        self._rail = self._counted(groups.rail) if groups.rail else None
        self._node = self._counted(groups.node) if groups.node else None
        self._gathers_begin_on, self._reductions_begin_on = SideStream(), SideStream()
        self._pending_gradients: dict[str, PendingGradients] = {}
        self._on_node: dict[str, NodeCache] = {}
        self._on_node_flat: dict[str, FlatNodeCache] = {}
        self._reduce_scatters: dict[str, ReduceScatter] = {}
        self._on_rank: dict[str, RankCache] = {}
        self._control = groups.control
        self._agreement = RankAgreement(groups)
        ahead = options.units_ahead if self._rail else 0
        offload = bool(options.cache_offload) and self._rail is not None
        self._order = MicroStepOrder() if ahead or offload else None
        self._prefetch = InterNodePrefetch(ahead, self._order) if self._order is not None else None
        self._slices_on_host, self._sums_on_host = (HostCopies() if offload else None for _ in range(2))

    def install(self, root: FSDPModule) -> AccumulationSchedule:
        """Set the collectives of every parameter group under ``root``; returns the schedule that drives them."""
        modules = fsdp_modules(root)
        self._options_of = dict(
            zip(modules, self._options.by_unit(sizes=[_size_of(module) for module in modules.values()]), strict=True)
        )
        for name, module in modules.items():
            if self._topology.partition_size > 1:
                gather, reduce = self._all_gather(name, module), self._reduce_scatter(name, module)
                module.set_custom_all_gather(self._agreement.before_gathers(name, module, gather))
                if self._options_of[name].cache_parameters == "rank" or self._options.allow_unused:
                    self._on_rank[name] = RankCache(module, self._agreement.before_some(name, gather))
                module.set_custom_reduce_scatter(reduce)
                self._reduce_scatters[name] = reduce
                if type(gather) is FlatAllGather and isinstance(reduce, FlatReduceScatter):
                    serve_options(module, gather, reduce)
                else:
                    reject_options(module)
            if self._replication is not None:
                self._set_second_hop(name, module, self._replication)
        serve_direct_use(root, self._mesh, around=self._around_direct_use)
        self._agreement.follow(root)
        if self._order is not None:
            self._order.follow(root)  # before the schedule: see [Note: Hooks on the root, in order]
            for copies in (self._slices_on_host, self._sums_on_host):
                if copies is not None:
                    self._order.when_over(copies.release)
        all_ranks = dist.group.WORLD
        assert all_ranks is not None
        schedule = AccumulationSchedule(
            root,
            replicas=self._topology.replicas,
            traffic=self._traffic,
            pending_gradients=self._pending_gradients,
            caches=[*self._on_node.values(), *self._on_node_flat.values(), *self._on_rank.values()],
            unsharded_gradients=self._options.accumulate_gradients == "rank" and self._topology.partition_size > 1,
            two_hop=self._options.two_hop,
            control=self._control,
            all_ranks=self._counted(all_ranks) if self._broadcast_buffers else None,
        )
        if self._order is not None:
            schedule.cache.when_invalidated(self._order.begin_window)
            schedule.window.when_abandoned(self._order.abandon)
        schedule.optimizer_hooks.count = self._count_of_optimizer
        if not self._options.allow_unused:
            schedule.window.never_used = NeverUsed(root, self._control)
            around_end_of_backward(root, after=schedule.window.after_reductions)
            schedule.optimizer_hooks.owners = self._matrix_owners(root, schedule)
        else:
            kept = {name for name, options in self._options_of.items() if options.cache_parameters == "rank"}
            dropped = [cache for name, cache in self._on_rank.items() if name not in kept]
            unused = UnusedUnits(
                root,
                control=self._control,
                caches=self._on_rank,
                dropped=dropped,
                before_forward=schedule.window.before_forward,
            )
            schedule.window.when_abandoned(unused.forget)
        schedule.units = UnitHooks(root)  # around what was set above
        return schedule

    def _all_gather(self, name: str, module: FSDPModule) -> FlatAllGather | HierarchicalAllGather:
        if self._rail is None:
            return self._flat_all_gather(name, module)
        rail, node = self._rail.of_unit(name), self._node and self._node.of_unit(name)
        prefetch = self._prefetch.unit(name, module, rail) if self._prefetch is not None else None
        if self._options_of[name].cache_parameters != "node":
            return HierarchicalAllGather(rail=rail, node=node, first_stage=self._gathers_begin_on, prefetch=prefetch)
        cache = NodeCache(
            rail=rail,
            node=node,
            module=module,
            first_stage=self._gathers_begin_on,
            prefetch=prefetch,
            held=HeldOnHost(self._slices_on_host) if self._slices_on_host is not None else None,
        )
        self._on_node[name] = cache
        return cache

    def _flat_all_gather(self, name: str, module: FSDPModule) -> FlatAllGather:
        partition = self._partition.of_unit(name)
        if self._node is None or self._options_of[name].cache_parameters != "node":
            return FlatAllGather(partition)
        node = self._node.of_unit(name)
        cache = FlatNodeCache(partition=partition, node=node, module=module, beside=self._gathers_begin_on)
        self._on_node_flat[name] = cache
        return cache

    def _reduce_scatter(self, name: str, module: FSDPModule) -> ReduceScatter:
        if self._rail is None:
            return FlatReduceScatter(self._partition.of_unit(name))
        rail, node = self._rail.of_unit(name), self._node and self._node.of_unit(name)
        wire_dtype = self._options.inter_node_reduce_dtype
        if self._options_of[name].accumulate_gradients != "node":
            return HierarchicalReduceScatter(
                rail=rail, node=node, first_stage=self._reductions_begin_on, wire_dtype=wire_dtype
            )
        return NodeReduceScatter(
            rail=rail,
            node=node,
            pending_gradients=self._pending_gradients_of(name, module, copies=self._sums_on_host),
            first_stage=self._reductions_begin_on,
            wire_dtype=wire_dtype,
        )

    def _matrix_owners(self, root: FSDPModule, schedule: AccumulationSchedule) -> MatrixOwners:
        modules = fsdp_modules(root)

        def install(name: str, owned: OwnedReduction) -> None:
            self._reduce_to_owners(name, modules[name], owned, schedule.window)

        owners = MatrixOwners(
            modules,
            self._groups,
            counted=self._counted,
            explained=self._control.explained,
            caches=self._on_node,
            install=install,
            wire_dtype=self._options.inter_node_reduce_dtype,
        )
        around_end_of_backward(root, after=owners.attach_gradients)  # those that are left
        schedule.window.when_abandoned(owners.forget)
        return owners

    def _reduce_to_owners(
        self, name: str, module: FSDPModule, owned: OwnedReduction, window: AccumulationWindow
    ) -> None:
        """Reduce owned matrices to their owners at the boundary, where sums between nodes wait until then."""
        reduce = self._reduce_scatters.get(name)
        if self._topology.spans_nodes:
            if not isinstance(reduce, NodeReduceScatter):
                return
            reduce.owned = owned
        if self._replication is not None and self._options.two_hop:
            self._set_second_hop(name, module, self._replication, owned)
            window.accumulate_in(name, self._pending_gradients[name])

    def _set_second_hop(
        self, name: str, module: FSDPModule, replicas: CountedGroup, owned: OwnedReduction | None = None
    ) -> None:
        replication = replicas.of_unit(name)
        wire_dtype = self._options.inter_node_reduce_dtype
        if wire_dtype is None and owned is None:

            def count(shard: torch.Tensor) -> None:
                replication.count_all_reduce(shard, technique="all-reduce over replicas")

            module.set_all_reduce_hook(count)  # called after FSDP2's own all-reduce
            return
        hop_1_accumulates = isinstance(self._reduce_scatters.get(name), NodeReduceScatter)
        pending_gradients = self._pending_gradients_of(name, module)
        hop = SecondHop(
            replication=replication,
            wire_dtype=wire_dtype,
            pending_gradients=pending_gradients,
            hop_1_accumulates=hop_1_accumulates,
            owned=owned,
            owned_by_hop_1=self._topology.spans_nodes,
        )
        replace_all_reduce(module, hop)

    def _pending_gradients_of(
        self, name: str, module: FSDPModule, *, copies: HostCopies | None = None
    ) -> PendingGradients:
        held = None if copies is None else HeldOnHost(copies)
        pending_gradients = PendingGradients(lambda: sharded_parameters(module), held=held, order=self._order)
        return self._pending_gradients.setdefault(name, pending_gradients)

    def _around_direct_use(self, kind: Kind, axis: str, total_bytes: int, name: str) -> AbstractContextManager[None]:
        group = self._partition if axis == "shard" else self._replication
        if group is not None:
            group.count_direct_use(kind, total_bytes)
        return self._agreement.direct_use(kind, axis, name)

    def _count_of_optimizer(self, collective: CollectiveOperation) -> None:
        ranks = dist.get_process_group_ranks(collective.group)
        sent = sent_by(
            collective.kind,
            collective.elements * collective.dtype.itemsize,
            nodes=[self._topology.node_of(rank) for rank in ranks],
            position=collective.group.rank(),
            gloo=self._backend == "gloo",
        )
        self._traffic.record("inside of optimizers", sent)

    def _counted(self, group: dist.ProcessGroup) -> CountedGroup:
        ranks = dist.get_process_group_ranks(group)
        nodes = [self._topology.node_of(rank) for rank in ranks]
        return CountedGroup(group, nodes=nodes, traffic=self._traffic, backend=self._backend)


def _size_of(module: FSDPModule) -> UnitSize:
    parameters = sharded_parameters(module)
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
