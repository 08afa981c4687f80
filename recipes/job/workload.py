"""The workload of a run, measured once and without weights, for "auto", the plan and the dry run."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_mics.cost.step_traffic import find_units
from lightning_mics.planning import Workload
from lightning_mics.planning.rehearsal.activations import peak_activations
from lightning_mics.policy.memory import Activations, measure_model
from lightning_mics.sharding.activation_checkpointing import find_recomputed, recompute_in_backward
from lightning_mics.sharding.blocks import find_blocks
from lightning_mics.sharding.shard_model import autocast_dtype, mixed_precision_policy
from recipes.models.flops import shape_of
from recipes.models.language_model import LanguageModel


def measure_run(config: DictConfig, model: LanguageModel) -> Workload:
    """Measure the model of the run and one sequence of it.

    Activations are extrapolated from networks of two and four blocks, because blocks are alike. So the full network is
    built only once, on the meta device.

    Args:
        config: Configuration of the run, with devices and precision chosen.
        model: Model of the run, not built yet.
    """
    precision, length = config.cluster.precision, config.data.sequence_length
    reduce_dtype = config.strategy.reduce_dtype and getattr(torch, config.strategy.reduce_dtype)
    policy = mixed_precision_policy(precision, reduce_dtype=reduce_dtype)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    with torch.device("meta"):
        network = _as_in_training(model.build_network())
    recompute = OmegaConf.to_object(OmegaConf.create({"": config.strategy.activation_checkpointing}))[""]
    blocks = find_blocks(network)
    shape, share = shape_of(network, model.config, recompute)
    fixed, sample = _activations(model, network, length, recompute=recompute, share=share, precision=precision)
    return Workload(
        units=tuple(find_units(network, blocks)),
        size=measure_model(
            network, blocks.values(), gathered_dtype=policy.param_dtype, reduce_dtype=policy.reduce_dtype
        ),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        sample=sample,
        fixed=fixed,
        sample_tokens=length,
        model_flops=shape.training_flops(length),
        hardware_flops=shape.training_flops(length, recomputed_share=share),
        gathered_dtype=policy.param_dtype or dtype,
        reduce_dtype=policy.reduce_dtype or dtype,
    )


def _activations(
    model: LanguageModel, network: nn.Module, length: int, *, recompute: Any, share: float, precision: str
) -> tuple[Activations, Activations]:
    """Activations of a rank that do not depend on the number of sequences, and those of one sequence."""
    dims = {dim for parameter in network.parameters() for dim in parameter.shape}
    free = (count for count in itertools.count(3) if count * length not in dims)
    few = next(free)
    many = next(count for count in free if count >= 2 * few)
    taken = partial(_taken, model, length, computed=autocast_dtype(precision))
    small = taken(2, few, recompute=share > 0)
    more = taken(2, many, recompute=share > 0) + small * -1
    head = max(0.0, small.at_head - few * more.at_head / (many - few))  # the loss works in pieces of a bounded size
    fixed = Activations(at_head=head)

    def of_sequence(recompute: Any, two: Activations) -> Activations:
        """Extrapolate from networks of two and four blocks: each further block takes the same."""
        four = taken(4, few, recompute=recompute)
        return (two + (four + two * -1) * ((model.config.num_hidden_layers - 2) / 2) + fixed * -1) * (1 / few)

    if share == 0:
        return fixed, of_sequence(recompute, taken(2, few, recompute=recompute) if recompute else small)
    recomputed = of_sequence(True, small)
    if share == 1:
        return fixed, recomputed
    return fixed, recomputed * share + of_sequence(False, taken(2, few, recompute=False)) * (1 - share)


def _taken(
    model: LanguageModel, length: int, blocks: int, sequences: int, *, computed: torch.dtype | None, recompute: Any
) -> Activations:
    return peak_activations(
        lambda: _make_network(_with_blocks(model, blocks), recompute=recompute),
        model.example_batch(sequences, length),
        loss=lambda network, batch: model.loss_of(network["network"], batch),
        dtype=computed or torch.float32,
        autocast_dtype=computed,
    )


def _make_network(model: LanguageModel, *, recompute: Any) -> nn.ModuleDict:
    network = _as_in_training(model.build_network())
    recompute_in_backward(find_recomputed(network, find_blocks(network), recompute))
    return network


def _as_in_training(network: nn.Module) -> nn.ModuleDict:
    """Give blocks the FQNs that they have in a LanguageModel, for patterns."""
    return nn.ModuleDict({"network": network})


def _with_blocks(model: LanguageModel, blocks: int) -> LanguageModel:
    small = copy.copy(model)
    small.config = copy.deepcopy(model.config)
    small.config.num_hidden_layers = blocks
    return small
