"""Gradients accumulated on this rank until the boundary, in addition to FSDP2's own partial reductions.

FSDP2 defers one reduction: the all-reduce over replicas. Where a reduction before it is deferred as well, inside nodes,
or where hop 2 is ours, the sums are accumulated here.

[Note: Zero gradients before the boundary]

FSDP2 treats the result of a custom reduce-scatter, or of the hook after it, as reduced, and adds it to the gradient. So
before the boundary the result is moved here, and FSDP2 is handed zeros in its place::

    after a micro-step          1            2            3         boundary
    accumulated here [any]     g1        g1 + g2   g1 + g2 + g3        -
    FSDP2 adds to .grad         0            0            0       g1 + ... + g4
    .grad then is             None         None         None      g1 + ... + g4

Zeros do not change an existing gradient. But where ``.grad`` was None they would create one, and None has a meaning. An
optimizer skips the parameter; with zeros, momentum and weight decay would change it. For users, and for ``zero_grad()``
in an open window, it means that all gradients are pending. Therefore gradients that were None before a backward are set
to None after it.

At the boundary a parameter without a gradient takes part in the reduction as zeros if it had one earlier in the window.
Otherwise the pending gradients of its parameter group would have no flat tensor to be added to.

The memory of the sums stays from one window to the next: it belongs to the stream that reduces, and freed it would
serve nothing else. Sums that wait on the host (:mod:`~lightning_mics.techniques.cache_offload`) are on the device while
they are added to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lightning_mics.techniques.cache_offload import HeldOnHost
from lightning_mics.techniques.micro_step_order import MicroStepOrder, UseOrder


class PendingGradients:
    """The pending gradients of one parameter group, and whether the current micro-step is the boundary.

    Used on the one stream that the parameter group reduces gradients on.

    Args:
        parameters: Returns the sharded parameters of the group.
        held: Place of the sum on the host; None leaves it on the device.
        order: Order of the sums of the model, by which the next one is fetched from the host; None where none is there.

    Attributes:
        at_boundary: Whether the current micro-step is the boundary, where pending gradients are reduced.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[nn.Parameter]],
        *,
        held: HeldOnHost | None = None,
        order: MicroStepOrder | None = None,
    ) -> None:
        self.at_boundary = True
        self._parameters = parameters
        self._held = held
        self._order = order
        self._sum: Tensor | None = None  # [any], the shape of the accumulated tensors
        self._pending = False
        self._without_gradient: list[nn.Parameter] = []

    @property
    def pending(self) -> bool:
        """Whether any gradients are pending."""
        return self._pending

    def tensors(self) -> list[Tensor]:
        """Memory of the sum of pending gradients, [any], once there is some: of the device, or of the host."""
        memory = self._sum if self._held is None else self._held.values
        return [] if memory is None else [memory]

    def accumulate(self, part: Tensor) -> None:
        """Add ``part`` to the pending gradients; the caller hands FSDP2 zeros in its place.

        See [Note: Zero gradients before the boundary].

        Args:
            part: Flat gradients of the parameter group: [any], the same shape in all micro-steps of a window. Copied.
        """
        self._without_gradient += [p for p in self._parameters() if p.grad is None]
        if self._held is not None:
            self._accumulate_on_host(part, self._held)
        elif self._sum is None or (
            not self._pending and (self._sum.shape, self._sum.dtype) != (part.shape, part.dtype)
        ):
            self._sum = part.clone()
        elif self._pending:
            self._sum += part
        else:
            self._sum.copy_(part)
        self._pending = True

    def add_into(self, part: Tensor) -> None:
        """Add the pending gradients to ``part``, in place; none are pending afterwards.

        Args:
            part: Flat gradients of the boundary's micro-step: [any], the shape of the accumulated tensors.
        """
        if self._pending and self._held is not None:
            total = self._held.take()
            self._fetch_next()
            part += total
            self._held.leave(total)
        elif self._pending:
            assert self._sum is not None
            part += self._sum
        self._pending = False

    @torch.no_grad()
    def remove_zeros(self) -> None:
        """Set gradients that were None before this backward to None again.

        See [Note: Zero gradients before the boundary].
        """
        for parameter in self._without_gradient:
            parameter.grad = None
        self._without_gradient.clear()

    def drop(self) -> None:
        """Drop the pending gradients, and free their memory."""
        self._sum, self._pending = None, False
        if self._held is not None:
            self._held.drop()
        self._without_gradient.clear()

    def _accumulate_on_host(self, part: Tensor, held: HeldOnHost) -> None:
        if self._pending:
            total = held.take()
            self._fetch_next()
            total += part
        else:
            total = held.allocate(part.shape, dtype=part.dtype, device=part.device)
            self._fetch_next()
            total.copy_(part)
        held.put(total)
        held.leave(total)

    def _fetch_next(self) -> None:
        """Begin to fetch the sum that the backward adds to next, if it is expected to."""
        if self._order is None:
            return
        order: UseOrder[PendingGradients] = self._order.sums()
        order.add((self, True))
        for following in order.coming(1):
            if following is not self and following._pending and following._held is not None:
                following._held.fetch()
