"""Memory of the forward and backward of a micro-step, in addition to the model states.

The step runs on fake tensors, which have shapes but no values, and every allocation and release is counted. So it holds
for any model and loss, for recomputed blocks, and for the tensors that attention saves on the CPU; CUDA's flash
attention saves the same: queries, keys, values, the output and one sum per query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_mics._torch.fake import FakeTensorMode, moving_modules, tree_leaves, tree_map_only
from lightning_mics.planning.rehearsal.allocations import UNKNOWN, Allocations
from lightning_mics.planning.rehearsal.observed import WithoutValues
from lightning_mics.policy.activations import Activations, Line, Phase
from lightning_mics.sharding.blocks import find_blocks

LIKE_PARAMETERS = "gradients"  # tensors with the shape of a parameter


def measure_activations(
    make_model: Callable[[], nn.Module],
    batch: Any,
    *,
    samples: float,
    loss: Callable[[nn.Module, Any], Tensor],
    dtype: torch.dtype,
    autocast_dtype: torch.dtype | None = None,
    find_blocks: Callable[[nn.Module], Mapping[str, nn.Module]] = find_blocks,
) -> Activations:
    """Measure the peaks of a forward and backward of ``batch``, phase by phase.

    Parameters are not counted, and gradients until FSDP2 would reduce them: those of a block after its backward, those
    of the root at the end. Every tensor with the shape of a parameter is taken for a gradient, whose size does not
    depend on the number of samples, so the number of tokens in the batch should differ from all dimensions of
    parameters.

    Args:
        make_model: Function that builds the model. It is called under fake tensors, so the model may have any size.
        batch: Tensors in any nest of lists and dictionaries; only shapes matter.
        samples: Number of samples in ``batch``: less than one where it has a part of the tokens of a sample.
        loss: Function of model and batch that returns the loss, a scalar.
        dtype: Dtype of the parameters in the forward.
        autocast_dtype: Dtype of autocast; None disables autocast.
        find_blocks: Function that returns the blocks of the model by FQN, the last one first.
    """
    with FakeTensorMode() as fake:
        with default_dtype(dtype), moving_modules():
            model = make_model()
        batch = tree_map_only(Tensor, fake.from_tensor, batch)
        shapes = {_unordered(parameter) for parameter in model.parameters()}
        moments = _Moments(lambda tensor: LIKE_PARAMETERS if _unordered(tensor) in shapes else UNKNOWN)
        blocks = list(find_blocks(model).values())[::-1]
        _follow(blocks, moments)
        with moments, WithoutValues(moments), torch.autocast("cpu", autocast_dtype, enabled=autocast_dtype is not None):
            value = loss(model, batch)
            saved = moments.saved_by(len(blocks))
            moments.begin("head")
            value.backward()  # type: ignore[no-untyped-call]
            del value
            moments.begin("reduced")
    return Activations(
        moments.lines(samples),
        saved=saved / samples,
        on_host=moments.on_host_bytes / samples,
    )


class _Moments(Allocations):
    """The moments of each phase that may be its peak, for any number of samples."""

    def __init__(self, category: Callable[[Tensor], str]) -> None:
        self._phases: dict[Phase, dict[int, int]] = {}  # bytes of activations by those of gradients
        super().__init__(category=category)
        self._before_blocks = 0  # bytes of activations
        self._after_blocks: int | None = None
        self.begin("start")

    def begin(self, phase: Phase) -> None:
        """Count what follows to ``phase``, and what is there now."""
        self._moments = self._phases.setdefault(phase, {})
        self._note()

    def note_before_blocks(self) -> None:
        """Note that the forward of the first block begins."""
        self._before_blocks = self._live[UNKNOWN]

    def saved_by(self, blocks: int) -> float:
        """Bytes of activations that a block saves, if there are so many; those of all the model without blocks."""
        now = self._live[UNKNOWN]
        after = now if self._after_blocks is None else self._after_blocks
        return (after - self._before_blocks) / blocks if blocks else now

    def lines(self, samples: float) -> dict[Phase, tuple[Line, ...]]:
        """Bytes in each phase as functions of the number of samples, measured with ``samples``."""
        return {
            phase: tuple(Line(gradients, taken / samples) for gradients, taken in sorted(moments.items()))
            for phase, moments in self._phases.items()
        }

    @override
    def _grow(self, category: str, size_bytes: int) -> None:
        if self._after_blocks is None and "loss" in self._phases:  # the frames of the last block are gone
            self._after_blocks = self._live[UNKNOWN]
        super()._grow(category, size_bytes)
        self._note()

    def _note(self) -> None:
        gradients, taken = self._live[LIKE_PARAMETERS], self._live[UNKNOWN]
        self._moments[gradients] = max(taken, self._moments.get(gradients, 0))


def _follow(blocks: Sequence[nn.Module], moments: _Moments) -> None:
    """Tell ``moments`` which phase begins, and drop the gradients of blocks whose backward has ended."""

    def last_forward_begins(*_: Any) -> None:
        moments.begin("gather")
        moments.begin("forward")

    def forward_begins(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        moments.begin("forward")
        moments.note_before_blocks()
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: backward_begins(-1))  # type: ignore[no-untyped-call]

    def forward_ends(number: int, output: Any) -> None:
        if number == len(blocks) - 1:
            moments.begin("loss")
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: backward_begins(number))  # type: ignore[no-untyped-call]

    def backward_begins(number: int) -> None:
        for block in blocks[number + 1 :]:
            block.zero_grad()
        if number == 0:
            moments.begin("between")
        moments.begin(_phase(number, len(blocks)))

    if blocks:
        blocks[0].register_forward_pre_hook(forward_begins, with_kwargs=True)
    if len(blocks) > 1:
        blocks[-1].register_forward_pre_hook(last_forward_begins)
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda _, __, output, number=number: forward_ends(number, output))


def _phase(number: int, blocks: int) -> Phase:
    """The phase of the backward of a block; -1 is what follows the first."""
    near: tuple[Phase, ...] = ("first", "second")
    if number < 0:
        return "end"
    if number < len(near) and (number < blocks - 1 or number == 0):
        return near[number]
    return "last" if number == blocks - 1 else "blocks"


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
