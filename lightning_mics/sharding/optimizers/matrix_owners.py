"""The matrices of a sharded model that have owners: who they are, their gradients, and their rows in weight caches.

See :mod:`~lightning_mics.techniques.matrix_owners`. An optimizer that needs whole matrices asks for owners once it
holds the parameters of the model; until then gradients are reduced as for any other. A matrix is reduced to its owner's
node where hop 2 is at the boundary, and where sums between nodes wait until then; otherwise its gradient is in the
shards, and the step moves it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_mics._torch.dtensors.owned_rows import OwnedRows, owned_rows
from lightning_mics._torch.fsdp import sharded_parameters
from lightning_mics._torch.process_groups import new_group, reduce_over_all_axes_at_once
from lightning_mics._torch.streams import keep_for_current_stream
from lightning_mics._torch.units.param_groups import note_reductions
from lightning_mics._torch.units.reduced import (
    divided_afterwards,
    is_row_sharded_matrix,
    may_be_owned,
    reduced_segments,
)
from lightning_mics.collectives.counted_group import CountedGroup
from lightning_mics.techniques.matrix_owners import OwnedMatrix, RowsOfRanks, choose_owners
from lightning_mics.techniques.once_per_step import NodeCache
from lightning_mics.techniques.owner_exchange import ROWS, OwnedReduction, OwnerExchange
from lightning_mics.techniques.partition_groups import PartitionGroups, check_same_count_of_groups

Install = Callable[[str, OwnedReduction], None]


class MatrixOwners:
    """Owners of matrices, for the optimizers of one sharded model.

    Args:
        modules: FSDP modules by fully qualified name.
        groups: Process groups of this rank.
        counted: Makes a group whose collectives are counted.
        explained: Returns the error to raise in place of one of a collective.
        caches: Caches of the modules' parameters on nodes, by name.
        install: Called as ``install(name, reduction)`` to reduce the matrices of a module to their owners.
        wire_dtype: Dtype of inter-node messages of gradients; None is that of the gradients.
    """

    def __init__(
        self,
        modules: Mapping[str, FSDPModule],
        groups: PartitionGroups,
        *,
        counted: Callable[[dist.ProcessGroup], CountedGroup],
        explained: Callable[[BaseException], BaseException],
        caches: Mapping[str, NodeCache],
        install: Install,
        wire_dtype: torch.dtype | None,
    ) -> None:
        self._modules = modules
        self._groups = groups
        self._counted = counted
        self._explained = explained
        self._with_gradient: dict[str, int] = {}  # parameters in the latest reduction of a module, as bits, by name
        self._caches = caches
        self._install = install
        self._wire_dtype = wire_dtype
        self._exchange: OwnerExchange | None = None
        self._reductions: dict[str, OwnedReduction] = {}
        self._taken: list[tuple[nn.Parameter, OwnedMatrix, Tensor, bool]] = []
        self._loads = [0.0] * groups.topology.world_size
        self._node_bytes = [0] * groups.topology.nodes

    @property
    def exchange(self) -> OwnerExchange:
        """Exchange of the ranks, once a matrix has an owner."""
        assert self._exchange is not None
        return self._exchange

    @property
    def loads(self) -> Sequence[float]:
        """Floating-point operations per step of each rank: [ranks]."""
        return self._loads

    def own(self, parameters: Iterable[nn.Parameter], flops: Callable[[int, int], float]) -> dict[Tensor, OwnedMatrix]:
        """Give matrices owners; every rank calls it with the same parameters.

        Args:
            parameters: Parameters of an optimizer.
            flops: Floating-point operations of a matrix, as ``flops(rows, columns)``.

        Returns:
            The matrix of each parameter that has an owner now, in the order of the model. Others are no matrices of the
            model that are sharded by rows, or collectives are flat over nodes.
        """
        topology = self._groups.topology
        if topology.spans_nodes and self._groups.rail is None:
            return {}
        wanted = set(parameters)
        found = [
            (name, index, parameter)
            for name, module in self._modules.items()
            for index, parameter in enumerate(sharded_parameters(module))
            if parameter in wanted and is_row_sharded_matrix(module, index)
        ]
        if not found:
            return {}
        if self._exchange is None:
            self._exchange = self._made_exchange()
        costs = [(flops(*parameter.shape), parameter.numel() * parameter.element_size()) for _, _, parameter in found]
        owners = choose_owners(costs, topology, self._loads, self._node_bytes)
        owned: dict[Tensor, OwnedMatrix] = {}
        for (name, index, parameter), owner in zip(found, owners, strict=True):
            rows, columns = parameter.shape
            matrix = OwnedMatrix(rows=rows, columns=columns, owner=owner, unit=name, index=index)
            owned[parameter] = matrix
            self._reduction(name).matrices[index] = matrix
        return owned

    def attach_gradients(self) -> None:
        """Set ``.grad`` of the matrices that the backward has reduced to their owners; runs where FSDP2 ends one.

        See :mod:`~lightning_mics._torch.dtensors.owned_rows`.
        """
        taken, self._taken = self._taken, []
        for unit in {matrix.unit for _, matrix, _, _ in taken}:
            self._free_reduced(unit)
        for parameter, matrix, held, is_added in taken:
            keep_for_current_stream(held)
            gradient = self.rows(parameter, matrix, held)
            if is_added:
                assert isinstance(parameter.grad, DTensor)
                parameter.grad._local_tensor += gradient.by_rows().to_local()
            elif parameter.grad is not None:  # else nothing has used it
                parameter.grad = gradient

    def _free_reduced(self, unit: str) -> None:
        """Copy the gradients of a module that are views of its reduction, which has zeros for all matrices besides."""
        matrices = self._reductions[unit].matrices
        for index, parameter in enumerate(sharded_parameters(self._modules[unit])):
            if index not in matrices and isinstance(parameter.grad, DTensor):
                parameter.grad._local_tensor = parameter.grad._local_tensor.clone()

    def forget(self) -> None:
        """Drop gradients that were reduced in a backward which does not end."""
        self._taken = []

    def rows(self, parameter: Tensor, matrix: OwnedMatrix, held: Tensor) -> OwnedRows:
        """A tensor of the shape of a parameter, whose rows are with the holders.

        Args:
            parameter: The sharded parameter: [rows, columns].
            matrix: Matrix of the parameter.
            held: Rows that this rank holds: [held, columns].
        """
        return owned_rows(parameter, held, partial(_to_shard, self.exchange, matrix))

    def held(self, matrices: Sequence[OwnedMatrix], tensors: Sequence[Tensor]) -> list[Tensor]:
        """The rows that this rank holds of tensors, which are moved to holders where they are not; all call it.

        Args:
            matrices: The matrices.
            tensors: Tensors of their shapes, sharded by rows or with the holders, all of one dtype: [rows, columns].
        """
        held = [tensor.held if isinstance(tensor, OwnedRows) else None for tensor in tensors]
        moved = [index for index, each in enumerate(held) if each is None]
        if moved:
            shards = [_local(tensors[index]) for index in moved]
            for index, rows in zip(
                moved, self.exchange.to_holders([matrices[index] for index in moved], shards), strict=True
            ):
                held[index] = rows
        return [rows for rows in held if rows is not None]

    def add(
        self,
        parameters: Sequence[nn.Parameter],
        matrices: Sequence[OwnedMatrix],
        updates: Sequence[Tensor],
        apply: Callable[[nn.Parameter, Tensor, Tensor], None],
    ) -> None:
        """Update matrices of one parameter group, in the shards and in what is cached of them on the node.

        Args:
            parameters: The sharded parameters: [rows, columns] each.
            matrices: Matrices of the parameters.
            updates: The rows of each update that this rank holds: [held, columns].
            apply: Called as ``apply(parameter, weights, rows)`` to change some rows of a parameter in place.
        """
        cache = self._caches.get(matrices[0].unit)
        shards = [_local(parameter) for parameter in parameters]
        cached = [
            None if cache is None else cache.segment(matrix.index, shard)
            for matrix, shard in zip(matrices, shards, strict=True)
        ]
        in_cache = all(segment is not None for segment in cached)
        rows = self.exchange.spread(matrices, updates, slices=in_cache)
        for parameter, matrix, shard, segment, update in zip(parameters, matrices, shards, cached, rows, strict=True):
            if segment is None or not in_cache:
                apply(parameter, shard, update)
                continue
            values = segment.reshape(-1, matrix.columns)  # [nodes * shard's rows, columns], a copy
            own, begin = self.exchange.own_rows(matrix), self.exchange.slice_rows(matrix).start
            mine = values[own.start - begin : own.stop - begin]
            if cache is not None and len(own):
                cache.compare([(mine.view(-1), shard.reshape(-1))])
            apply(parameter, values[: len(update)], update)
            segment.copy_(values.view(segment.shape))
            shard.copy_(mine)
        if in_cache and cache is not None:
            cache.mark_updated([matrix.index for matrix in matrices])
        if cache is not None:
            cache.close_segments()

    def _reduction(self, name: str) -> OwnedReduction:
        if name not in self._reductions:
            self._reductions[name] = OwnedReduction(
                self.exchange,
                reduced=partial(self._reduced, name),
                take=self._take,
                wire_dtype=self._wire_dtype,
            )
            self._install(name, self._reductions[name])
            note = partial(self._note_reduction, name)
            note_reductions(self._modules[name], before=note, explained=self._explained)
        return self._reductions[name]

    def _note_reduction(self, name: str, with_gradient: int, _all_reduced: bool) -> None:
        self._with_gradient[name] = with_gradient

    def _reduced(self, name: str) -> list[tuple[int, int, int, bool]]:
        module = self._modules[name]
        return [
            (index, begin, end, may_be_owned(module, index))
            for index, begin, end in reduced_segments(module, self._with_gradient[name])
        ]

    def _take(self, matrix: OwnedMatrix, held: Tensor) -> None:
        module = self._modules[matrix.unit]
        parameter = sharded_parameters(module)[matrix.index]
        divisor = divided_afterwards(module, held.dtype)
        rows = (held if divisor == 1 else held / divisor).to(parameter.dtype)
        self._taken.append((parameter, matrix, rows, parameter.grad is not None))

    def _made_exchange(self) -> OwnerExchange:
        """Make the groups that the job has not made yet; every rank calls it."""
        groups, rank, rows = self._groups, dist.get_rank(), RowsOfRanks(self._groups.topology)
        topology, slices = groups.topology, rows.slices
        k, node = topology.ranks_per_node, rows.node(rank)
        across = tuple(range(rank % k, topology.world_size, k))
        beside = tuple(range(node * k + rows.slice_of(rank), (node + 1) * k, slices))
        first = node * k + rows.replica_in_node(rank) * slices
        inside = tuple(range(first, first + slices))
        existing = [groups.rail, groups.node, groups.partition, groups.replication]
        known = {tuple(dist.get_process_group_ranks(group)): group for group in existing if group is not None}
        check_same_count_of_groups(groups.control)
        reduce_over_all_axes_at_once(groups.mesh)  # norms of gradients, whose rows are on all axes

        def counted(ranks: tuple[int, ...], name: str) -> CountedGroup | None:
            if len(ranks) == 1:
                return None
            group = known.get(ranks)
            return self._counted(new_group(ranks, name=f"owners {name}", timeout=None) if group is None else group)

        return OwnerExchange(
            rows,
            rank=rank,
            across=counted(across, "across"),
            beside=counted(beside, "beside"),
            inside=counted(inside, "inside"),
        )


def _to_shard(exchange: OwnerExchange, matrix: OwnedMatrix, held: Tensor) -> Tensor:
    return exchange.spread([matrix], [held], slices=False, technique=ROWS)[0]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
