"""Peak memory of the forward and backward of a micro-step, in addition to the model states.

The step runs on fake tensors, which have shapes but no values, and every allocation and release is counted. So it holds
for any model and loss, for recomputed blocks, and for the tensors that attention saves on the CPU; CUDA's flash
attention saves the same: queries, keys, values, the output and one sum per query.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mics._torch.fake import FakeTensorMode, tree_map_only
from lightning_mics.planning.rehearsal.allocations import Allocations
from lightning_mics.planning.rehearsal.observed import WithoutValues
from lightning_mics.policy.memory import Activations
from lightning_mics.sharding.blocks import find_blocks


def peak_activations(
    make_model: Callable[[], nn.Module],
    batch: Any,
    *,
    loss: Callable[[nn.Module, Any], Tensor],
    dtype: torch.dtype,
    autocast_dtype: torch.dtype | None = None,
    find_blocks: Callable[[nn.Module], Mapping[str, nn.Module]] = find_blocks,
) -> Activations:
    """Measure the peak memory of a forward and backward of ``batch``.

    Parameters and their gradients are not counted: they are model states. Every tensor with the shape of a parameter is
    taken for a gradient, so the number of tokens in the batch should differ from all dimensions of parameters.

    Args:
        make_model: Function that builds the model. It is called under fake tensors, so the model may have any size.
        batch: Tensors in any nest of lists and dictionaries; only shapes matter.
        loss: Function of model and batch that returns the loss, a scalar.
        dtype: Dtype of the parameters in the forward.
        autocast_dtype: Dtype of autocast; None disables autocast.
        find_blocks: Function that returns the blocks of the model by FQN, the last one first.
    """
    peaks: list[int] = []  # until the backward of the last block, then until that of the first
    with FakeTensorMode() as fake:
        with default_dtype(dtype):
            model = make_model()
        batch = tree_map_only(Tensor, fake.from_tensor, batch)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
        shapes = {_unordered(parameter) for parameter in model.parameters()}
        allocations = Allocations(counts=lambda tensor: _unordered(tensor) not in shapes)

        def next_peak(*_: Any) -> None:
            peaks.append(allocations.peak_bytes)
            allocations.reset_peak()

        blocks = list(find_blocks(model).values())
        for block in (blocks[0], blocks[-1]) if len(blocks) > 1 else blocks:
            block.register_full_backward_pre_hook(next_peak)
        with (
            warnings.catch_warnings(),
            allocations,
            WithoutValues(allocations),
            torch.autocast("cpu", autocast_dtype, enabled=autocast_dtype is not None),
        ):
            warnings.filterwarnings("ignore", message="Full backward hook is firing")  # only when it fires counts
            loss(model, batch).backward()  # type: ignore[no-untyped-call]
    at_end = allocations.peak_bytes
    at_head = peaks[0] if peaks else at_end
    return Activations(at_head, max(at_end, *peaks[1:], 0), at_end)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the default dtype to ``dtype`` inside the context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _unordered(tensor: Tensor) -> tuple[int, ...]:
    return tuple(sorted(tensor.shape))


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
