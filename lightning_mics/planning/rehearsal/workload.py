"""The workload of a job, independent of the cluster: sizes of its model, activations and FLOPs of a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_mics._torch.fake import FakeTensorMode, moving_modules, tree_map_only
from lightning_mics.cost.step_traffic import find_units
from lightning_mics.planning.rehearsal.activations import default_dtype, measure_activations
from lightning_mics.planning.rehearsal.observed import WithoutValues, naming_values
from lightning_mics.policy.activations import essential
from lightning_mics.policy.memory import measure_model
from lightning_mics.policy.workload import Workload
from lightning_mics.sharding.activation_checkpointing import find_recomputed, inputs_on_host, recompute_in_backward
from lightning_mics.sharding.blocks import ModuleClasses, find_blocks
from lightning_mics.sharding.optimizers.offload import Offload
from lightning_mics.sharding.shard_model import autocast_dtype, mixed_precision_policy


def measure_workload(
    make_model: Callable[[], nn.Module],
    batch: Any,
    *,
    samples: int,
    loss: Callable[[nn.Module, Any], Tensor],
    precision: str = "32-true",
    reduce_dtype: torch.dtype | None = None,
    block_classes: ModuleClasses | None = None,
    activation_checkpointing: bool | float | ModuleClasses = False,
    activation_offload: bool = False,
    offload: Offload = False,
    averages: int = 0,
) -> Workload:
    """Measure a model of any size on fake tensors, which take no memory.

    Args:
        make_model: Function that builds the model.
        batch: Tensors in any nest of lists and dictionaries; only shapes matter.
        samples: Number of samples in ``batch``.
        loss: Function of model and batch that returns the loss, a scalar.
        precision: ``"32-true"``, ``"bf16-true"``, ``"bf16-mixed"`` or ``"16-mixed"``.
        reduce_dtype: Dtype in which gradients are reduced; None follows the precision.
        block_classes: Classes of the blocks; see :func:`~lightning_mics.sharding.blocks.find_blocks`.
        activation_checkpointing: Whether blocks are recomputed in backward, or which; see
            :func:`~lightning_mics.sharding.shard_model.shard_model`.
        activation_offload: Whether inputs of recomputed blocks wait for the backward in host memory.
        offload: Which model states are in host memory; see :mod:`~lightning_mics.sharding.optimizers.offload`.
        averages: Number of averages of the weights that are kept.

    Raises:
        TypeError: If the model has no parameters, or such that cannot be sharded.
        ValueError: If ``samples`` is not positive, or shapes in the model depend on values.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    half = precision == "bf16-true"
    dtype = torch.bfloat16 if half else torch.float32
    with torch.device("meta"), default_dtype(dtype):
        model = make_model()
    blocks = find_blocks(model, block_classes)
    policy = mixed_precision_policy(precision, reduce_dtype=reduce_dtype)

    def recomputing() -> nn.Module:
        built = make_model()
        own = find_blocks(built, block_classes)
        recomputed = find_recomputed(built, own, activation_checkpointing)
        on_host = inputs_on_host(recomputed) if activation_offload else None
        recompute_in_backward(recomputed, on_host=on_host)
        return built

    gathered_dtype = policy.param_dtype or dtype
    computed = autocast_dtype(precision)
    flops = partial(_flops, batch=batch, loss=loss, dtype=gathered_dtype, autocast_dtype=computed)
    with naming_values():
        activations = measure_activations(
            recomputing,
            batch,
            samples=samples,
            loss=loss,
            dtype=gathered_dtype,
            autocast_dtype=computed,
            find_blocks=partial(find_blocks, block_classes=block_classes),
        )
        model_flops, hardware_flops = flops(make_model), flops(recomputing)
    phases = {phase: essential(lines) for phase, lines in activations.phases.items()}
    return Workload(
        units=tuple(find_units(model, blocks)),
        size=measure_model(
            model,
            blocks.values(),
            gathered_dtype=policy.param_dtype,
            reduce_dtype=policy.reduce_dtype,
            offload=offload,
            averages=averages,
        ),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        activations=replace(activations, phases=phases),
        model_flops=model_flops / samples,
        hardware_flops=hardware_flops / samples,
        gathered_dtype=gathered_dtype,
        reduce_dtype=policy.reduce_dtype or dtype,
        activation_offload=activation_offload,
    )


def _flops(
    make_model: Callable[[], nn.Module],
    *,
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    dtype: torch.dtype,
    autocast_dtype: torch.dtype | None,
) -> float:
    """FLOPs of a forward and backward, recurrent layers included: without MKLDNN they run as products."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_product_flops})
    with torch.backends.mkldnn.flags(enabled=False), FakeTensorMode() as fake:
        with default_dtype(dtype), moving_modules():
            model = make_model()
        autocast = torch.autocast("cpu", autocast_dtype, enabled=autocast_dtype is not None)
        with counter, WithoutValues(), autocast:
            loss(model, tree_map_only(Tensor, fake.from_tensor, batch)).backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops())


def _grouped_product_flops(one: Sequence[int], other: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """FLOPs of products of groups of rows, each by the matrix of its group.

    Args:
        one: Shape of the first factor, [rows, inner], or [groups, rows, inner] with a matrix per group.
        other: Shape of the second factor, [inner, columns], or [groups, inner, columns].
        out_shape: Shape of the product.
    """
    groups = one[0] if len(one) == len(other) == 3 else 1  # else one of the factors has the rows of all groups
    return int(2 * groups * one[-2] * one[-1] * other[-1])
