"""Private names of FSDP2's parameter groups that agreement of ranks and unused parameters need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from lightning_mics._torch.fsdp import AllGather, _param_groups, fsdp_modules, own_grad

ADDS_ZEROS = hasattr(FSDPModule, "set_reduce_scatter_unused_params")  # for unused parameters, since torch 2.13


def in_backward(module: FSDPModule) -> bool:
    """Whether the parameters of ``module`` itself are being gathered for a backward."""
    return any(group._training_state == TrainingState.PRE_BACKWARD for group in _param_groups(module))


class NotedAllGather:
    """An all-gather of FSDP2 with a function that is called before it, at every call.

    Args:
        gather: The all-gather.
        before: Called before each.
        explained: Returns the error to raise in place of one of a collective.
    """

    def __init__(
        self, gather: AllGather, *, before: Callable[[], None], explained: Callable[[BaseException], BaseException]
    ) -> None:
        self._gather = gather
        self._before = before
        self._explained = explained

    def allocate(self, size: Any, *, dtype: Any, device: Any) -> Tensor:
        """Memory for the result, [size].

        Args:
            size: Number of elements.
            dtype: Type of the elements.
            device: Device of this rank.
        """
        memory: Tensor = self._gather.allocate(size, dtype=dtype, device=device)
        return memory

    def __call__(self, *args: Any, **kwargs: Any) -> dist.Work | None:
        """Call the function, and gather."""
        self._before()
        try:
            work: dist.Work | None = self._gather(*args, **kwargs)
        except RuntimeError as error:
            raise self._explained(error) from error
        return work


def note_reductions(
    module: FSDPModule,
    *,
    before: Callable[[int, bool], None],
    explained: Callable[[BaseException], BaseException],
) -> None:
    """Call functions at the end of each backward of ``module`` itself, where its gradients are reduced.

    Args:
        module: FSDP module.
        before: Called as ``before(with_gradient, all_reduced)`` before a reduction: the parameters that take part in
            it, as bits in their order, and whether it goes on over the replicas.
        explained: Returns the error to raise in place of one of a collective.
    """
    for group in _param_groups(module):

        def wait_for_unshard(group: FSDPParamGroup = group) -> None:
            try:
                with _outside_of_inference_mode():
                    type(group).wait_for_unshard(group)
            except RuntimeError as error:
                raise explained(error) from error

        def post_backward(*_: Any, group: FSDPParamGroup = group, inner: Any = group.post_backward) -> None:
            if group.reduce_grads and (bits := _with_gradient(group)):
                before(bits, group.all_reduce_grads)
                if not ADDS_ZEROS and _reduces_unused(group):
                    _add_zero_gradients(group)
            try:
                inner()
            except RuntimeError as error:
                raise explained(error) from error

        group.wait_for_unshard = wait_for_unshard  # type: ignore[method-assign]
        group.post_backward = post_backward  # type: ignore[method-assign]


def _outside_of_inference_mode() -> AbstractContextManager[Any]:
    """FSDP2 reads versions of the memory that it allocates here, where a shard is not rows (up to torch 2.13)."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _reduces_unused(group: FSDPParamGroup) -> bool:
    return getattr(group, "reduce_scatter_unused_params", False)  # FSDP2 has it since 2.13


def _add_zero_gradients(group: FSDPParamGroup) -> None:
    """Give the unused parameters of ``group`` zero gradients, as FSDP2 does since torch 2.13."""
    for parameter in group.fsdp_params:
        unsharded = getattr(parameter, "_unsharded_param", None)
        if unsharded is None or not unsharded.requires_grad or parameter.unsharded_accumulated_grad is not None:
            continue
        if own_grad.__get__(unsharded) is None:
            own_grad.__set__(unsharded, torch.zeros_like(unsharded))


def _with_gradient(group: FSDPParamGroup) -> int:
    """The parameters that FSDP2 will reduce, as bits in their order."""
    bits = 0
    for index, parameter in enumerate(group.fsdp_params):
        if not hasattr(parameter, "_unsharded_param"):
            continue
        unsharded = parameter._unsharded_param
        if (
            parameter.unsharded_accumulated_grad is not None
            or unsharded.grad is not None
            or (_reduces_unused(group) and unsharded.requires_grad)
        ):
            bits |= 1 << index
    return bits


def around_end_of_backward(
    root: FSDPModule, *, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None
) -> None:
    """Call functions around the end of each backward, where FSDP2 ends the last units.

    Args:
        root: The sharded model.
        before: Called before it.
        after: Called after it.
    """
    for module in fsdp_modules(root).values():  # the one whose backward begins first calls it
        state: Any = module._get_fsdp_state()

        def wrapped(end: Callable[[], None] = state._root_post_backward_final_callback) -> None:
            if before is not None:
                before()
            end()
            if after is not None:
                after()

        state._root_post_backward_final_callback = wrapped


def gather_and_keep(module: FSDPModule) -> None:
    """Gather the parameters of ``module`` itself, if they are sharded, and show their shards again."""
    for group in _param_groups(module):
        if group.is_sharded:
            group.unshard()
            group.wait_for_unshard()
            group._to_sharded()  # type: ignore[no-untyped-call]


class NotedUse:
    """Which parameters of one module itself have had a gradient in any backward since the beginning.

    Args:
        module: FSDP module.

    Attributes:
        used: Whether each parameter had one: [parameters].
    """

    def __init__(self, module: FSDPModule) -> None:
        self._groups = list(_param_groups(module))
        self._noting = False
        self.used = [False] * sum(len(group.fsdp_params) for group in self._groups)
        for group in self._groups:

            def post_backward(*_: Any, reduce: Any = group.post_backward) -> None:
                if self._noting:
                    self.used = [a or b for a, b in zip(self.used, _unreduced(self._groups), strict=True)]
                reduce()

            group.post_backward = post_backward  # type: ignore[method-assign]

    def begin(self) -> None:
        """Begin to note them."""
        self._noting = True

    def end(self) -> None:
        """Forget them, and note no more."""
        self._noting, self.used = False, [False] * len(self.used)


def _unreduced(groups: Iterable[FSDPParamGroup]) -> list[bool]:
    return [
        hasattr(parameter, "_unsharded_param")
        and (parameter.unsharded_accumulated_grad is not None or parameter.unsharded_param.grad is not None)
        for group in groups
        for parameter in group.fsdp_params
    ]


class DeferredReductions:
    """The reductions of one module itself, which wait until they are asked for.

    FSDP2 accumulates unsharded gradients until then, as it does without gradient synchronization.

    Args:
        module: FSDP module, whose reductions are noted already.
    """

    def __init__(self, module: FSDPModule) -> None:
        self._groups = list(_param_groups(module))
        self._reduce = [group.post_backward for group in self._groups]

    @property
    def at_boundary(self) -> bool:
        """Whether the gradients of this backward are reduced over all ranks."""
        return any(group.reduce_grads and group.all_reduce_grads for group in self._groups)

    def parameters(self) -> list[nn.Parameter]:
        """The sharded parameters of the module itself, each [any]."""
        return [parameter.sharded_param for group in self._groups for parameter in group.fsdp_params]

    def used(self) -> list[bool]:
        """Whether each parameter has a gradient that is not reduced yet: [parameters]."""
        return _unreduced(self._groups)

    def defer(self) -> None:
        """Accumulate where FSDP2 would reduce."""
        for group in self._groups:

            def accumulate(*_: Any, group: FSDPParamGroup = group) -> None:
                reduce, group.reduce_grads = group.reduce_grads, False
                try:
                    type(group).post_backward(group)
                finally:
                    group.reduce_grads = reduce

            group.post_backward = accumulate  # type: ignore[method-assign]

    def reduce(self) -> None:
        """Reduce the gradients of all trainable parameters, zeros where there are none, unless they accumulate."""
        for group, reduce in zip(self._groups, self._reduce, strict=True):
            if group.reduce_grads:
                group.reduce_scatter_unused_params = True
                reduce()
