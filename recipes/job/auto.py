"""What "auto" stands for in a configuration: it follows from the model, the cluster and the global batch.

In this order: devices, precision, partition size, caches, micro-batch, accumulation. The strategy's own options are
chosen by the strategy's own policy. Nothing here depends on what a rank sees alone, so all ranks come to the same.
"""

from __future__ import annotations

import copy
import itertools
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_mics.cost.batches import split_global_batch
from lightning_mics.planning.planner import LEFT_FREE
from lightning_mics.planning.rehearsal.activations import peak_activations
from lightning_mics.policy.choice import Choice
from lightning_mics.policy.memory import Activations, ModelSize, device_memory_bytes, in_gib, measure_model
from lightning_mics.policy.options import PolicyOptions
from lightning_mics.policy.policy import Policy
from lightning_mics.sharding.activation_checkpointing import find_recomputed, recompute_in_backward
from lightning_mics.sharding.blocks import find_blocks
from recipes.job.machine import Launched
from recipes.models.flops import measure_shape
from recipes.models.language_model import LanguageModel

CPU_PROCESSES = 4  # two "nodes" of two: the smallest job that has all kinds of groups


@dataclass
class Choices:
    """Values with where they come from, for people to read."""

    rows: dict[str, str] = field(default_factory=dict)

    def take(self, name: str, given: Any, chosen: Any, why: str) -> Any:
        """``given``, or what is ``chosen`` for "auto"."""
        value, reason = (chosen, f'"auto": {why}') if given == "auto" else (given, "given")
        self.rows[name] = f"{value} ({reason})"
        return value

    def table(self) -> str:
        width = max(map(len, self.rows))
        return "\n".join(["Job", *(f"  {name:<{width}}  {value}" for name, value in self.rows.items())])


def choose_automatically(config: DictConfig, model: LanguageModel) -> tuple[DictConfig, str]:
    """A copy of ``config`` without "auto", and a table of what was chosen and why.

    Args:
        config: As ``conf/train.yaml`` composes it.
        model: The model of the run, not built yet.

    Raises:
        ValueError: If the global batch cannot be split as asked; the message names the nearest that can.
    """
    config, choices = copy.deepcopy(config), Choices()
    cluster = config.cluster
    cluster.devices = choices.take("devices per node", cluster.devices, *_devices(cluster))
    cluster.precision = choices.take("precision", cluster.precision, *_precision(cluster))
    ranks = cluster.num_nodes * cluster.devices
    memory = _Memory.of(config, model, ranks=ranks)
    chosen = {"partition_size": memory.choice.topology.partition_size, **memory.choice.communication.keywords()}
    for option in ("partition_size", "cache_parameters", "accumulate_gradients"):
        why = memory.choice.reasons[option].removeprefix('"auto": ')
        config.strategy[option] = choices.take(option.replace("_", " "), config.strategy[option], chosen[option], why)
    _choose_batches(config, choices, memory, ranks=ranks)
    _choose_validation(config)
    choices.rows["memory per rank"] = memory.report(config.data.batch_size)
    return config, choices.table()


def _devices(cluster: DictConfig) -> tuple[int, str]:
    launched = Launched.read(os.environ).ranks_per_node
    if launched is not None:
        return launched, "as launched"
    if cluster.accelerator == "gpu":
        return torch.cuda.device_count(), "the GPUs of this machine"
    return CPU_PROCESSES, "CPU processes, enough for each kind of group"


def _precision(cluster: DictConfig) -> tuple[str, str]:
    if cluster.accelerator == "gpu" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16-mixed", "the GPUs compute in bfloat16"
    if cluster.accelerator == "cpu" and _cpu_has_bfloat16():
        return "bf16-mixed", "this processor multiplies in bfloat16"
    return "32-true", "nothing here computes in bfloat16"


def _cpu_has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch 2.13 has it
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@dataclass(frozen=True, kw_only=True)
class _Memory:
    """What takes memory on a rank."""

    choice: Choice
    size: ModelSize
    sequence: Activations  # of one

    @classmethod
    def of(cls, config: DictConfig, model: LanguageModel, *, ranks: int) -> _Memory:
        cluster = config.cluster
        with torch.device("meta"):
            network = _as_in_training(model.build_network())
        mixed = cluster.precision == "bf16-mixed"
        size = measure_model(
            network,
            find_blocks(network).values(),
            gathered_dtype=torch.bfloat16 if mixed else None,
            reduce_dtype=torch.float32 if mixed else None,
        )
        choice = policy_of(config).choose(
            size, world_size=ranks, local_size=cluster.devices, capacity_bytes=_capacity_bytes(cluster)
        )
        return cls(choice=choice, size=size, sequence=sequence_activations(config, model))

    @property
    def largest_micro(self) -> int:
        """Sequences whose activations fit beside the model states; 0 if not even one does."""
        return self.size.largest_micro_batch(
            self.choice.topology.partition_size,
            self.sequence,
            free_bytes=int((1 - LEFT_FREE) * self.choice.capacity_bytes),
            cached_bytes=self.choice.cached_bytes,
        )

    def report(self, micro: int) -> str:
        total = self.size.rank_bytes(
            self.choice.topology.partition_size, self.sequence * micro, cached_bytes=self.choice.cached_bytes
        )
        text = f"about {in_gib(total)} of {in_gib(self.choice.capacity_bytes)}"
        return text if total <= (1 - LEFT_FREE) * self.choice.capacity_bytes else f"{text}: this may not fit"


def _capacity_bytes(cluster: DictConfig) -> int:
    if cluster.memory_gib is not None:
        return int(cluster.memory_gib * 2**30)
    return device_memory_bytes(
        torch.device("cuda" if cluster.accelerator == "gpu" else "cpu"), processes=cluster.devices
    )


def policy_of(config: DictConfig) -> Policy:
    """The policy that the strategy of ``config`` makes of its options."""
    strategy = OmegaConf.to_container(config.strategy, resolve=True)
    return Policy(**{name: strategy[name] for name in PolicyOptions.__annotations__ if name in strategy})


def sequence_activations(config: DictConfig, model: LanguageModel) -> Activations:
    """What training on one more sequence takes on a rank."""
    choice = OmegaConf.to_object(OmegaConf.create({"": config.strategy.activation_checkpointing}))[""]
    _, share = measure_shape(model, choice)
    if share == 0:
        return _extrapolated(config, model, recompute=choice)
    kept, recomputed = (_extrapolated(config, model, recompute=all_blocks) for all_blocks in (False, True))
    return recomputed * share + kept * (1 - share)


def _extrapolated(config: DictConfig, model: LanguageModel, *, recompute: Any) -> Activations:
    """From networks of two and of four blocks: each block more takes the same."""
    blocks, length = model.config.num_hidden_layers, config.data.sequence_length
    with torch.device("meta"):
        dims = {dim for parameter in _with_blocks(model, 1).build_network().parameters() for dim in parameter.shape}
    sequences = next(count for count in itertools.count(3) if count * length not in dims)
    mixed = config.cluster.precision == "bf16-mixed"

    def taken(few: int) -> Activations:
        return peak_activations(
            lambda: _make_network(_with_blocks(model, few), recompute=recompute),
            model.example_batch(sequences, length),
            loss=lambda network, batch: model.loss_of(network["network"], batch),
            dtype=torch.bfloat16 if mixed else torch.float32,
            autocast_dtype=torch.bfloat16 if mixed else None,
        )

    two, four = taken(2), taken(4)
    return (two + (four + two * -1) * ((blocks - 2) / 2)) * (1 / sequences)


def _make_network(model: LanguageModel, *, recompute: Any) -> nn.ModuleDict:
    network = _as_in_training(model.build_network())
    recompute_in_backward(find_recomputed(network, find_blocks(network), recompute))
    return network


def _as_in_training(network: nn.Module) -> nn.ModuleDict:
    """Blocks have the names that they have in a LanguageModel, for patterns."""
    return nn.ModuleDict({"network": network})


def _with_blocks(model: LanguageModel, blocks: int) -> LanguageModel:
    small = copy.copy(model)
    small.config = copy.deepcopy(model.config)
    small.config.num_hidden_layers = blocks
    return small


def _choose_batches(config: DictConfig, choices: Choices, memory: _Memory, *, ranks: int) -> None:
    data, trainer = config.data, config.trainer
    batches = split_global_batch(
        config.global_batch_size,
        ranks=ranks,
        micro=None if data.batch_size == "auto" else data.batch_size,
        accumulation=None if trainer.accumulate_grad_batches == "auto" else trainer.accumulate_grad_batches,
        largest_micro=max(1, memory.largest_micro),
    )
    choices.rows["global batch"] = f"{config.global_batch_size} sequences of {data.sequence_length} tokens"
    fitting = f"up to {memory.largest_micro} fit beside the model states"
    data.batch_size = choices.take("micro-batch", data.batch_size, batches.micro, fitting)
    trainer.accumulate_grad_batches = choices.take(
        "accumulation", trainer.accumulate_grad_batches, batches.accumulation, "what makes up the global batch"
    )
    if data.val_batch_size == "auto":
        data.val_batch_size = data.batch_size


def _choose_validation(config: DictConfig) -> None:
    """Lightning counts micro-steps between validations; people count steps."""
    trainer = config.trainer
    if config.validate_every_n_steps == "auto":
        config.validate_every_n_steps = max(1, min(500, trainer.max_steps // 10))
    if trainer.val_check_interval == "auto":
        trainer.val_check_interval = config.validate_every_n_steps * trainer.accumulate_grad_batches
