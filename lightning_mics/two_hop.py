"""Technique 3: two-hop gradient synchronisation. What is reduced in a micro-step, and what waits for the boundary.

MiCS, section 3.4. Hop 1, every micro-step: reduce-scatter inside the partition group; each rank adds up its shard.
Hop 2, at the boundary only: all-reduce of that sum over the replication group::

    micro-step      1    2    3    4 = boundary
    hop 1           RS   RS   RS   RS             inside each partition group
    hop 2                          AR             over the replication groups

FSDP2 runs both hops and keeps the sums in the reduce dtype; this module tells it when the second is due.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch_compat import (
    deferred_sums,
    forget_iteration,
    fsdp_modules,
    reduce_unused_parameters,
    trainable,
)


class TwoHopSchedule:
    """Decides for every micro-step which hops run.

    Without a call of :meth:`micro_step` every backward is a boundary, as in plain FSDP2.

    A block whose sums wait is reduced at the boundary even if the boundary's own forward skips it: otherwise they would
    stay behind. A parameter of such a block without a gradient counts as zero. Blocks that no forward of the window
    uses keep ``grad=None``. The blocks used may differ from micro-step to micro-step, not from rank to rank.

    Args:
        root: The sharded model, from :func:`lightning_mics.sharding.shard_model`.
        replicas: How many there are; with one there is no second hop.
    """

    def __init__(self, root: FSDPModule, *, replicas: int) -> None:
        self._root = root
        self._replicas = replicas
        self._modules = fsdp_modules(root)
        self._at_boundary = True
        self._ever_trainable = {name: trainable(module) for name, module in self._modules.items()}
        for module in self._modules.values():
            assert isinstance(module, nn.Module)
            module.register_forward_pre_hook(self._take_part_in_reductions)

    @contextmanager
    def micro_step(self, *, boundary: bool) -> Iterator[None]:
        """Run the forward and backward of one micro-step; hop 2 runs only if it is the ``boundary``.

        Raises:
            RuntimeError: After a boundary, if sums stayed behind that this torch version cannot reduce.
        """
        self._set_boundary(boundary)
        try:
            yield
            self.after_backward()
        finally:
            self._set_boundary(True)

    def before_backward(self) -> None:
        """Reduce at once what cannot wait: blocks of which some parameters are frozen for this backward only.

        FSDP2 adds up a block's deferred gradients as one flat tensor, so all must be of the same parameters. Call it
        before a backward if ``requires_grad`` changes inside accumulation windows, as when optimizers take turns.

        Raises:
            RuntimeError: If such a block has sums that wait already.
        """
        for name, module in self._modules.items():
            now = trainable(module)
            ever_trainable = [a or b for a, b in zip(self._ever_trainable[name], now, strict=True)]
            self._ever_trainable[name] = ever_trainable
            if now == ever_trainable or not any(now):
                continue
            if deferred_sums(module):
                raise RuntimeError(
                    f"{name or 'the root'} has parameters that were trainable earlier in this accumulation window and "
                    "are frozen now; switch `requires_grad` (`toggle_model`) in all micro-steps of a window or none"
                )
            module.set_requires_all_reduce(True, recurse=False)

    def after_backward(self) -> None:
        """Close the accumulation window if the backward that has just run was its boundary.

        :meth:`micro_step` calls it; call it where a boundary runs outside of one.

        Raises:
            RuntimeError: If sums stayed behind that this torch version cannot reduce (before 2.13).
        """
        if not self._at_boundary:
            return
        left_behind = [name for name, m in self._modules.items() if deferred_sums(m) and any(trainable(m))]
        if left_behind:
            raise RuntimeError(
                f"{', '.join(left_behind)} got gradients earlier in this accumulation window and none at its "
                f"boundary; reducing them needs torch >= 2.13, this is torch {torch.__version__}"
            )
        self._forget_who_took_part()

    def abandon_window(self) -> None:
        """Drop what an unfinished window has accumulated, so that it cannot leak into the next one.

        Dropping is local: no rank waits for another.
        """
        forget_iteration(self._root)
        self._forget_who_took_part()

    def _set_boundary(self, boundary: bool) -> None:
        self._at_boundary = boundary
        self._root.set_requires_all_reduce(boundary)

    def _forget_who_took_part(self) -> None:
        for module in self._modules.values():
            if not deferred_sums(module):  # a frozen block may have a window of its own, still open
                reduce_unused_parameters(module, False)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _take_part_in_reductions(self, module: nn.Module, _inputs: Any) -> None:
        deferring = self._replicas > 1 and not self._at_boundary
        if deferring and torch.is_grad_enabled() and isinstance(module, FSDPModule):
            reduce_unused_parameters(module, True)
