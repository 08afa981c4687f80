"""The workload of a run, measured once and without weights, for "auto", the plan and the dry run."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_mics.cost.step_traffic import find_units
from lightning_mics.planning import Workload
from lightning_mics.planning.rehearsal.activations import measure_activations
from lightning_mics.policy.activations import Activations, Line, Phase, essential, partly_recomputed
from lightning_mics.policy.memory import measure_model
from lightning_mics.sharding.activation_checkpointing import find_recomputed, inputs_on_host, recompute_in_backward
from lightning_mics.sharding.blocks import find_blocks
from lightning_mics.sharding.optimizers.offload import checked_offload
from lightning_mics.sharding.options import floating_dtype
from lightning_mics.sharding.shard_model import autocast_dtype, mixed_precision_policy
from recipes.models.flops import shape_of
from recipes.models.language_model import LanguageModel
from recipes.models.token_loss import PART_ELEMENTS

FEW = 4  # blocks: the first two, the last, and one between


def measure_run(config: DictConfig, model: LanguageModel) -> Workload:
    """Measure the model of the run and one sequence of it; with ``activation_checkpointing: auto`` for five shares.

    Activations are extrapolated from networks of four and six blocks, because blocks are alike. So the full network is
    built only once, on the meta device.

    Args:
        config: Configuration of the run, with devices and precision chosen.
        model: Model of the run, not built yet.
    """
    precision, length = config.cluster.precision, config.data.sequence_length
    reduce_dtype = floating_dtype("reduce_dtype", config.strategy.reduce_dtype)
    policy = mixed_precision_policy(precision, reduce_dtype=reduce_dtype)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    with torch.device("meta"):
        network = _as_in_training(model.build_network())
    recompute = OmegaConf.to_object(OmegaConf.create({"": config.strategy.activation_checkpointing}))[""]
    offload = config.strategy.activation_offload
    blocks = find_blocks(network)
    shape, share = shape_of(network, model.config, True if recompute == "auto" else recompute)
    activations_of = _by_share(model, network, length, recompute=recompute, computed=autocast_dtype(precision))
    work = Workload(
        units=tuple(find_units(network, blocks)),
        size=measure_model(
            network,
            blocks.values(),
            gathered_dtype=policy.param_dtype,
            reduce_dtype=policy.reduce_dtype,
            offload=checked_offload(config.strategy.offload),
        ),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        activations=activations_of(share, offload is True),
        sample_tokens=length,
        model_flops=shape.training_flops(length),
        hardware_flops=shape.training_flops(length, recomputed_share=share),
        gathered_dtype=policy.param_dtype or dtype,
        reduce_dtype=policy.reduce_dtype or dtype,
        recomputed_share=share,
        activation_offload=offload is True,
    )
    quarters = {round(number / 4 * len(blocks)) / len(blocks) for number in range(5)}
    others = (
        replace(
            work,
            activations=activations_of(other, on_host),
            hardware_flops=shape.training_flops(length, recomputed_share=other),
            recomputed_share=other,
            activation_offload=on_host,
        )
        for other in (sorted(quarters) if recompute == "auto" else [share])
        for on_host in ((False, True) if offload == "auto" else (offload,))
        if (other, on_host) != (share, offload is True) and (other or not on_host)
    )
    return replace(work, alternatives=tuple(others))


def _by_share(
    model: LanguageModel, network: nn.Module, length: int, *, recompute: Any, computed: torch.dtype | None
) -> Callable[[float, bool], Activations]:
    """Activations by the share of recomputed blocks, and whether their inputs are on the host, from few blocks."""
    dims = {dim for parameter in network.parameters() for dim in parameter.shape}
    of_depths = partial(_of_depths, model, length, dims=dims, computed=computed)
    of_all_or_none = cache(lambda every, offload: of_depths(recompute=every, offload=offload))
    names_modules = not isinstance(recompute, bool | int | float) and recompute != "auto"

    def of_share(share: float, offload: bool) -> Activations:
        if share == 0 and names_modules:
            return of_depths(recompute=recompute, offload=offload)
        if share in (0, 1):
            return of_all_or_none(share == 1, offload and share == 1)
        return partly_recomputed(
            of_all_or_none(False, False),
            of_all_or_none(True, offload),
            blocks=model.config.num_hidden_layers,
            share=share,
        )

    return of_share


def _of_depths(
    model: LanguageModel, length: int, *, dims: set[int], computed: torch.dtype | None, recompute: Any, offload: bool
) -> Activations:
    """Extrapolate from networks of few blocks, of which each further one takes the same."""
    blocks = model.config.num_hidden_layers
    depth = min(FEW, blocks)
    whole = PART_ELEMENTS // model.config.vocab_size // length  # sequences whose loss is computed in one piece
    sizes = (count for count in itertools.count(max(3, 2 * whole + 1)) if count * length not in dims)
    few = next(sizes)
    many = next(count for count in sizes if count >= 2 * few)
    taken = partial(_taken, model, length, computed=computed, recompute=recompute, offload=offload)
    found = _apart(taken(depth, few), few, taken(depth, many), many)
    if whole:
        in_one = [count for count in range(1, whole + 1) if count * length not in dims]
        if not in_one:  # as many tokens as there are positions to learn: a part of a sequence stands for it
            in_one = [next(tokens for tokens in range(length - 1, 0, -1) if tokens not in dims) / length]
        one, most = in_one[0], in_one[-1]
        found = replace(found, few=_apart(taken(depth, one), one, taken(depth, most), most).phases, few_samples=whole)
    if blocks == depth:
        return found
    deeper = taken(depth + 2, few)
    saved = (deeper.saved * (depth + 2) - found.saved * depth) / 2
    on_host = found.on_host + (deeper.on_host - found.on_host) / 2 * (blocks - depth)
    return replace(found.with_saved(saved * (blocks - depth)), saved=saved, on_host=on_host)


def _apart(one: Activations, few: float, other: Activations, many: float) -> Activations:
    """Tell apart what depends on the number of sequences: losses are computed in pieces of a bounded size.

    Args:
        one: Activations measured with few sequences.
        few: Number of them.
        other: Activations measured with many.
        many: Number of them.
    """
    phases: dict[Phase, tuple[Line, ...]] = {}
    for phase, lines in one.phases.items():
        of_few = {line.fixed: line.per_sample * few for line in lines}
        of_many = {line.fixed: line.per_sample * many for line in other.phases[phase]}
        moments = []
        for gradients in sorted(of_few.keys() | of_many.keys()):  # moments with as many gradients
            if gradients in of_few and gradients in of_many and many > few:
                slope = (of_many[gradients] - of_few[gradients]) / (many - few)
            else:
                slope = of_many.get(gradients, 0.0) / many
            constant = max(0.0, of_few.get(gradients, 0.0) - few * slope)
            moments.append(Line(gradients + constant, slope))
        phases[phase] = essential(moments)
    return Activations(phases, saved=one.saved, on_host=one.on_host)


def _taken(
    model: LanguageModel,
    length: int,
    blocks: int,
    sequences: float,
    *,
    computed: torch.dtype | None,
    recompute: Any,
    offload: bool,
) -> Activations:
    return measure_activations(
        lambda: _make_network(_with_blocks(model, blocks), recompute=recompute, offload=offload),
        model.example_batch(math.ceil(sequences), round(length * min(1, sequences))),
        samples=sequences,
        loss=lambda network, batch: model.loss_of(network["network"], batch),
        dtype=computed or torch.float32,
        autocast_dtype=computed,
    )


def _make_network(model: LanguageModel, *, recompute: Any, offload: bool) -> nn.ModuleDict:
    network = _as_in_training(model.build_network())
    recomputed = find_recomputed(network, find_blocks(network), recompute)
    recompute_in_backward(recomputed, on_host=inputs_on_host(recomputed) if offload and recomputed else None)
    return network


def _as_in_training(network: nn.Module) -> nn.ModuleDict:
    """Give blocks the FQNs that they have in a LanguageModel, for patterns."""
    return nn.ModuleDict({"network": network})


def _with_blocks(model: LanguageModel, blocks: int) -> LanguageModel:
    small = copy.copy(model)
    small.config = copy.deepcopy(model.config)
    small.config.num_hidden_layers = blocks
    return small
