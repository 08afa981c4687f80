"""Choosing the values that are "auto" in a configuration, from the model, the cluster and the global batch.

The order is devices, precision, partition size, caches, micro-batch, accumulation. The policy of the strategy chooses
the options of the strategy. No value depends on the rank, so all ranks choose the same.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from lightning_mics.cost.batches import split_global_batch
from lightning_mics.planning import Workload
from lightning_mics.planning.planner import LEFT_FREE
from lightning_mics.policy.choice import Choice
from lightning_mics.policy.memory import device_memory_bytes, in_gib
from lightning_mics.policy.options import PolicyOptions
from lightning_mics.policy.policy import Policy
from recipes.job.machine import Launched
from recipes.job.workload import measure_run
from recipes.models.language_model import LanguageModel

CPU_PROCESSES = 4  # two "nodes" of two: the smallest job with all kinds of groups


@dataclass
class Choices:
    """Values and where they come from, for display."""

    rows: dict[str, str] = field(default_factory=dict)

    def take(self, name: str, given: Any, chosen: Any, why: str) -> Any:
        """Return ``given``, or ``chosen`` if it is "auto", and record the reason.

        Args:
            name: Name of the value, for display.
            given: Value in the configuration.
            chosen: Value in place of "auto".
            why: Reason of ``chosen``.
        """
        value, reason = (chosen, f'"auto": {why}') if given == "auto" else (given, "given")
        self.rows[name] = f"{value} ({reason})"
        return value

    def table(self) -> str:
        width = max(map(len, self.rows))
        return "\n".join(["Job", *(f"  {name:<{width}}  {value}" for name, value in self.rows.items())])


@dataclass(frozen=True, kw_only=True)
class ChosenJob:
    """A run without "auto".

    Attributes:
        config: Configuration without "auto".
        choices: Table of the chosen values and their reasons, for display.
        sharding: Sharding of the model; the strategy will choose the same.
        workload: Sizes of the model, and memory and FLOPs of a sequence.
    """

    config: DictConfig
    choices: str
    sharding: Choice
    workload: Workload


def choose_automatically(config: DictConfig, model: LanguageModel) -> ChosenJob:
    """Replace "auto" in a copy of ``config``.

    Args:
        config: Configuration, as composed by ``conf/train.yaml``.
        model: Model of the run, not built yet.

    Raises:
        ValueError: If the global batch cannot be split as asked; the message names the nearest that can.
    """
    config, choices = copy.deepcopy(config), Choices()
    cluster = config.cluster
    cluster.devices = choices.take("devices per node", cluster.devices, *_devices(cluster))
    cluster.precision = choices.take("precision", cluster.precision, *_precision(cluster))
    workload = measure_run(config, model)
    sharding = policy_of(config).choose(
        workload.size,
        world_size=cluster.num_nodes * cluster.devices,
        local_size=cluster.devices,
        capacity_bytes=_capacity_bytes(cluster),
    )
    chosen = {"partition_size": sharding.topology.partition_size, **sharding.communication.keywords()}
    for option in ("partition_size", "cache_parameters", "accumulate_gradients"):
        why = sharding.reasons[option].removeprefix('"auto": ')
        config.strategy[option] = choices.take(option.replace("_", " "), config.strategy[option], chosen[option], why)
    _choose_batches(config, choices, _largest_micro_batch(sharding, workload))
    _choose_validation(config)
    choices.rows["memory per rank"] = _memory_report(sharding, workload, config.data.batch_size)
    return ChosenJob(config=config, choices=choices.table(), sharding=sharding, workload=workload)


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


def _capacity_bytes(cluster: DictConfig) -> int:
    if cluster.memory_gib is not None:
        return int(cluster.memory_gib * 2**30)
    return device_memory_bytes(
        torch.device("cuda" if cluster.accelerator == "gpu" else "cpu"), processes=cluster.devices
    )


def policy_of(config: DictConfig) -> Policy:
    """The policy that the strategy of ``config`` creates from its options."""
    strategy = OmegaConf.to_container(config.strategy, resolve=True)
    return Policy(**{name: strategy[name] for name in PolicyOptions.__annotations__ if name in strategy})


def _largest_micro_batch(sharding: Choice, workload: Workload) -> int:
    """Number of sequences whose activations fit with the model states; 0 if none does."""
    return workload.size.largest_micro_batch(
        sharding.topology.partition_size,
        workload.sample,
        free_bytes=int((1 - LEFT_FREE) * sharding.capacity_bytes),
        cached_bytes=sharding.cached_bytes,
    )


def _memory_report(sharding: Choice, workload: Workload, micro_batch: int) -> str:
    total = workload.size.rank_bytes(
        sharding.topology.partition_size, workload.sample * micro_batch, cached_bytes=sharding.cached_bytes
    )
    text = f"about {in_gib(total)} of {in_gib(sharding.capacity_bytes)}"
    return text if total <= (1 - LEFT_FREE) * sharding.capacity_bytes else f"{text}: this may not fit"


def _choose_batches(config: DictConfig, choices: Choices, largest_micro_batch: int) -> None:
    data, trainer = config.data, config.trainer
    batches = split_global_batch(
        config.global_batch_size,
        ranks=config.cluster.num_nodes * config.cluster.devices,
        micro=None if data.batch_size == "auto" else data.batch_size,
        accumulation=None if trainer.accumulate_grad_batches == "auto" else trainer.accumulate_grad_batches,
        largest_micro=max(1, largest_micro_batch),
    )
    choices.rows["global batch"] = f"{config.global_batch_size} sequences of {data.sequence_length} tokens"
    fitting = f"up to {largest_micro_batch} fit with the model states"
    data.batch_size = choices.take("micro-batch", data.batch_size, batches.micro, fitting)
    trainer.accumulate_grad_batches = choices.take(
        "accumulation", trainer.accumulate_grad_batches, batches.accumulation, "it makes up the global batch"
    )
    if data.val_batch_size == "auto":
        data.val_batch_size = data.batch_size


def _choose_validation(config: DictConfig) -> None:
    """Convert the interval of validations from optimizer steps to micro-steps, which Lightning counts."""
    trainer = config.trainer
    if config.validate_every_n_steps == "auto":
        config.validate_every_n_steps = max(1, min(500, trainer.max_steps // 10))
    if trainer.val_check_interval == "auto":
        trainer.val_check_interval = config.validate_every_n_steps * trainer.accumulate_grad_batches
