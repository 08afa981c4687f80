"""The schedule of a sharded model: its accumulation window, its weight cache and its optimizer hooks, put together.

[Note: Hooks on the root, in order]

The hooks that run before the root's forward, in order, and where they are registered. Hooks with a condition exist only
if it holds::

    hook                    registered by                               condition
    enter                   sharding.evaluation                         Fabric, Accelerate
    _drop_cached_weights    sharding.schedule                           parameters are cached
    _begin_forward          techniques.micro_step_order                 units are fetched ahead
    _pre_forward            FSDP2, `fully_shard`
    (the user's)            hooks on the model before it was sharded
    _defer_reductions       sharding.schedule
    _before_forward         sharding.modules.broadcast_buffers          the model has buffers
    _note_forward           integrations.fabric                         Fabric
    (the user's)            hooks on the model after it was sharded

``_pre_forward`` unshards the root, so what decides how it is unsharded runs before it: ``enter`` leaves inference mode,
in which FSDP2 would allocate tensors that cannot be trained, ``_drop_cached_weights`` drops outdated weights, and
``_begin_forward`` notes which kind of forward begins. What
the backward will do is decided after it: before the boundary ``_defer_reductions`` lets FSDP2 defer reductions, or
include parameters without a gradient in them as zeros, ``_before_forward`` gives all ranks rank 0's buffers where a
window or an evaluation begins, and ``_note_forward`` lists the model for ``fabric.backward``.
The first three are registered with ``prepend=True``, as FSDP2's is, the others without.

FSDP2's hook and ``_defer_reductions`` are on every block as well, in the same order. Activation checkpointing is no
hook: it wraps the ``forward`` of a block, inside of all of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch.fsdp import fsdp_modules
from lightning_mics._torch.units.unit_hooks import UnitHooks
from lightning_mics.collectives.control_plane import ControlPlane
from lightning_mics.collectives.counted_group import CountedGroup
from lightning_mics.collectives.traffic import Traffic
from lightning_mics.sharding.accumulation_window import AccumulationWindow
from lightning_mics.sharding.modules.base_weights import BaseWeights
from lightning_mics.sharding.modules.broadcast_buffers import BufferBroadcast
from lightning_mics.sharding.optimizer_hooks import OptimizerHooks
from lightning_mics.sharding.ranks.replicas import ReplicaCheck
from lightning_mics.sharding.weight_cache import WeightCache
from lightning_mics.techniques.parameter_cache import ParameterCache
from lightning_mics.techniques.pending_gradients import PendingGradients


class AccumulationSchedule:
    """What is reduced and gathered in each micro-step of a model sharded by ``shard_model``.

    A training loop of your own needs three methods: :meth:`micro_step` around each forward and backward,
    :meth:`cached_weights` around an evaluation, and :meth:`invalidate_cache` after changes of weights that torch does
    not record. Without a call of :meth:`micro_step` every backward is a boundary, as in FSDP2 itself.

    An integration, where the framework decides when the parts of a step run, uses the three parts instead.

    Args:
        root: The sharded model, from :func:`lightning_mics.sharding.shard_model.shard_model`.
        replicas: Number of replicas; with one there is no hop 2.
        traffic: Counter of the collectives of all parameter groups.
        pending_gradients: Gradients accumulated in addition to FSDP2's own, by the fully qualified name of the FSDP
            module.
        caches: Caches of parameters, one per parameter group; empty where parameters are gathered at every use.
        unsharded_gradients: Whether FSDP2 accumulates unsharded gradients until the boundary, and runs hop 1 there.
        two_hop: Whether hop 2 runs at the boundary only; False runs it in every micro-step, as hybrid sharding does.
        control: Control plane of all ranks.
        all_ranks: Process group of all ranks, over which buffers are broadcast; None keeps each rank's own.

    Attributes:
        traffic: Counter of what this rank's collectives have sent.
        window: Accumulation window, for integrations.
        cache: Weight cache, for integrations.
        optimizer_hooks: Hooks on optimizers, for integrations.
        buffers: Broadcast of buffers that ranks change from their own samples, for integrations.
        replicas: Comparison of the replicas while training; None if there is none.
        units: Parameter groups left unsharded for another backward, for integrations; set when all else is.
        base_weights: Frozen parameters without weights of a base model, for integrations; None for a copy.
    """

    def __init__(
        self,
        root: FSDPModule,
        *,
        replicas: int,
        traffic: Traffic,
        pending_gradients: Mapping[str, PendingGradients] | None = None,
        caches: Sequence[ParameterCache] = (),
        unsharded_gradients: bool = False,
        two_hop: bool = True,
        control: ControlPlane,
        all_ranks: CountedGroup | None = None,
    ) -> None:
        self.units: UnitHooks
        self.replicas: ReplicaCheck | None = None
        self.base_weights: BaseWeights | None = None
        self.traffic = traffic
        self.cache = WeightCache(caches)
        self.window = AccumulationWindow(
            root,
            cache=self.cache,
            pending_gradients=pending_gradients or {},
            replicas=replicas,
            unsharded_gradients=unsharded_gradients,
            two_hop=two_hop,
        )
        self.optimizer_hooks = OptimizerHooks(root, window=self.window, cache=self.cache)
        self._register_hooks(root)
        assert isinstance(root, nn.Module)
        self.buffers = BufferBroadcast(
            root, group=all_ranks, control=control, at_boundary=lambda: self.window.at_boundary
        )

    def micro_step(self, *, boundary: bool) -> AbstractContextManager[None]:
        """Run the forward and backward of one micro-step inside; hop 2 runs only if it is the ``boundary``.

        Where ``requires_grad`` changes inside accumulation windows, as when optimizers take turns, call
        ``schedule.window.before_backward()`` before each backward.

        Args:
            boundary: Whether this is the gradient accumulation boundary, the last micro-step before a step of the
                optimizer.

        Raises:
            RuntimeError: After a boundary, if gradients are still pending that this torch version cannot reduce, or
                weights changed unrecorded while they were cached; on a GPU perhaps some boundaries later.
        """
        return self.window.micro_step(boundary=boundary)

    def cached_weights(self) -> AbstractContextManager[None]:
        """Share cached parameters between all forwards inside, as in an evaluation; weights must not change there.

        Each parameter is communicated once, not once per forward. Nothing changes where no parameters are cached. See
        [Note: When cached weights are dropped].

        Raises:
            RuntimeError: At the end, if weights did change in a way that torch does not record.
        """
        return self.cache.cached_weights(wait=not self.window.is_open)

    def invalidate_cache(self) -> None:
        """Drop cached parameters after weights were changed in a way that torch does not record; every rank calls it.

        Needed inside an accumulation window or :meth:`cached_weights`, and for frozen weights, after changes in raw
        memory. See [Note: When cached weights are dropped].
        """
        self.cache.invalidate()

    def _register_hooks(self, root: FSDPModule) -> None:
        """See [Note: Hooks on the root, in order]. The hooks keep the schedule alive for as long as the model."""
        assert isinstance(root, nn.Module)
        for module in fsdp_modules(root).values():
            assert isinstance(module, nn.Module)
            module.register_forward_pre_hook(self._defer_reductions)
        if self.cache.enabled:
            root.register_forward_pre_hook(self._drop_cached_weights, prepend=True)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _drop_cached_weights(self, _module: nn.Module, _inputs: Any) -> None:
        if not (self.window.is_open or self.cache.shared_by_forwards):
            self.cache.drop_trained()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _defer_reductions(self, module: nn.Module, _inputs: Any) -> None:
        if isinstance(module, FSDPModule):
            self.window.before_forward(module)
