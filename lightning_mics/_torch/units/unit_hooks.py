"""What a parameter group does around a forward and backward, in addition to FSDP2.

FSDP2 learns from the outputs of a block's forward that its weights are needed for a backward, and from its inputs that
they are no longer. Here that also holds where

* a block changes its input in place: it gets the input itself, not a view that must not be changed;
* a block's output is a view, or more was computed after it, or no output leads to the block's weights at all;
* a backward is itself differentiated (``create_graph=True``): weights stay unsharded until the next backward has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup, RegisterPostBackwardFunction
from torch.optim import Optimizer

from lightning_mics._torch.fsdp import _param_groups, fsdp_modules
from lightning_mics._torch.optimizers.steps import call_after_steps

try:
    from torch.distributed.fsdp._common_utils import collect_grad_tensors, replace_grad_tensors
except ImportError:  # before torch 2.13
    from torch.utils._pytree import tree_leaves, tree_map_only

    def collect_grad_tensors(output: Any) -> tuple[Tensor, ...]:
        return tuple(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad)

    def replace_grad_tensors(output: Any, tensor_iter: Iterator[Tensor]) -> Any:
        return tree_map_only(Tensor, lambda t: next(tensor_iter) if t.requires_grad else t, output)


class UnitHooks:
    """Wraps the steps of FSDP2 for each parameter group of a model.

    Args:
        root: Root FSDP module.
    """

    def __init__(self, root: FSDPModule) -> None:
        self._root: Any = root._get_fsdp_state()
        self._groups: list[FSDPParamGroup] = []
        self._differentiates_backward = False
        self._left_unsharded = False
        self._handles: list[Any] = []
        for module in fsdp_modules(root).values():
            state: Any = module._get_fsdp_state()
            if state is not self._root:  # a block that runs alone must not become a root of its own
                state._lazy_init = self._root._lazy_init
            end = state._root_post_backward_final_callback
            state._root_post_backward_final_callback = partial(self._end_backward, end)
            self._groups += _param_groups(module)
        for group in self._groups:
            self._wrap(group)
        call_after_steps(self._after_step)

    def reshard(self) -> None:
        """Reshard the parameter groups that were left unsharded for a backward, if there are any."""
        if self._left_unsharded:
            self._release()
            for group in self._groups:
                if group._training_state == TrainingState.IDLE:
                    group._to_sharded()  # type: ignore[no-untyped-call]

    def _after_step(self, _optimizer: Optimizer) -> None:
        self.reshard()  # of whichever model: the weights may be outdated

    def _reduce_at_end(self, group: FSDPParamGroup) -> None:
        """Reduce the gradients of ``group`` at the end of this backward, even if it was reduced in it before."""
        self._root._lazy_init()
        self._root._register_root_post_backward_final_callback()
        if group._training_state == TrainingState.POST_BACKWARD:
            group._training_state = TrainingState.IDLE

    def _wrap(self, group: Any) -> None:
        aliases: list[tuple[Tensor, Tensor, int]] = []
        group._register_post_backward_hook = partial(_alias_inputs, group, aliases)
        group.post_forward = partial(self._post_forward, group, group.post_forward, aliases)
        group.post_backward = partial(self._post_backward, group, group.post_backward)

    def _post_forward(
        self, group: Any, post_forward: Callable[..., Any], aliases: list[Any], module: Any, args: Any, output: Any
    ) -> Any:
        mesh_info, keep = group.post_forward_mesh_info, self._differentiates_backward
        try:
            if torch.is_grad_enabled():
                _return_changes(aliases)
                output, has_gradient = _fresh(output)
                if not has_gradient and any(p.sharded_param.requires_grad for p in group.fsdp_params):
                    keep = True
                    self._leave_unsharded(group)
            aliases.clear()
            if keep:
                group.post_forward_mesh_info = None  # FSDP2 then leaves the weights unsharded
            return post_forward(module, args, output)
        finally:
            group.post_forward_mesh_info = mesh_info

    def _post_backward(self, group: Any, post_backward: Callable[..., None], *unused: Any) -> None:
        reshards = group.reshard_after_backward
        try:
            if torch.is_grad_enabled():
                self._differentiates_backward = True
                self._leave_unsharded(group)
            if self._differentiates_backward:
                group.reshard_after_backward = False
            post_backward(*unused)
        finally:
            group.reshard_after_backward = reshards

    def _leave_unsharded(self, group: Any) -> None:
        """Leave weights unsharded until a backward has ended, and see that one which reaches them reduces gradients."""
        self._left_unsharded = True
        for parameter in group.fsdp_params:
            unsharded = getattr(parameter, "_unsharded_param", None)
            if unsharded is not None and unsharded.requires_grad:
                self._handles.append(unsharded.register_hook(lambda _: self._reduce_at_end(group)))

    def _end_backward(self, end: Callable[[], None]) -> None:
        if torch.is_grad_enabled() or not self._left_unsharded:
            end()
            return
        self._release()
        end()
        for group in self._groups:
            group._to_sharded()  # type: ignore[no-untyped-call]

    def _release(self) -> None:
        self._differentiates_backward = self._left_unsharded = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


# -- inputs that are changed in place ----------------------------------------------------------------------------------


class _Input(RegisterPostBackwardFunction):
    """FSDP2's function, with outputs that may be changed in place."""

    @staticmethod
    def forward(param_group: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.detach() for tensor in inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # before 2.13 FSDP2 has it in `forward`
        ctx.param_group = inputs[0]


def _alias_inputs(group: Any, aliases: list[Any], args: Any, kwargs: Any) -> Any:
    """FSDP2's ``_register_post_backward_hook`` with another function; ``aliases`` gets the inputs and their aliases."""
    aliases.clear()
    inputs = collect_grad_tensors((args, kwargs)) if torch.is_grad_enabled() else []
    if not inputs:
        return args, kwargs
    outputs = _Input.apply(group, *inputs)  # type: ignore[no-untyped-call]
    aliases += [(tensor, alias, alias._version) for tensor, alias in zip(inputs, outputs, strict=True)]
    return replace_grad_tensors((args, kwargs), iter(outputs))


def _return_changes(aliases: Iterable[tuple[Tensor, Tensor, int]]) -> None:
    """Give inputs that a forward has changed the history of the change: their memory has it, autograd does not."""
    for tensor, alias, version in aliases:
        if alias._version != version and not isinstance(alias.grad_fn, _Input._backward_cls):
            with _unsafe_preserve_version_counter((tensor, alias)):
                tensor.copy_(alias)


# -- outputs -----------------------------------------------------------------------------------------------------------


class _Output(torch.autograd.Function):
    """Outputs as the last step of a forward, and no views, so that their gradients come before all others' inside."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Any:
        return tuple(tensor.detach() for tensor in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients


def _fresh(output: Any) -> tuple[Any, bool]:
    """The output of a forward for FSDP2's hook on it, and whether it has a gradient at all."""
    tensors = [output] if isinstance(output, Tensor) and output.requires_grad else collect_grad_tensors(output)
    if not tensors:
        return output, False
    last = torch._C._autograd._get_sequence_nr() - 1
    if all(t._base is None for t in tensors) and any(_sequence_number(t) == last for t in tensors):
        return output, True
    return replace_grad_tensors(output, iter(_Output.apply(*tensors))), True  # type: ignore[no-untyped-call]


def _sequence_number(tensor: Tensor) -> int:
    node: Any = tensor.grad_fn
    return -1 if node is None else int(node._sequence_nr())
