"""Choosing the values that are "auto" in a configuration, from the model, the cluster and the global batch.

Devices and precision come first. Where the rates of the cluster are known, the plan then chooses partition size,
stages, caches, micro-batch and accumulation together, by the time of a step; elsewhere memory chooses them one after
the other. No value depends on the rank, so all ranks choose the same.
"""

from __future__ import annotations

import copy
import os
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from omegaconf import DictConfig

from lightning_mics.cost.batches import split_global_batch
from lightning_mics.integrations._precision import check_precision
from lightning_mics.planning import Plan, Workload
from lightning_mics.policy.choice import Choice
from lightning_mics.policy.fastest import LEAST_TOKENS
from lightning_mics.policy.memory import device_memory_bytes, in_gib, usable_bytes
from lightning_mics.policy.step_memory import step_bytes
from recipes.job.cluster_plan import hardware_of, plan_run, policy_of
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
        planned: All ways to run it by time; None if the rates of the cluster are unknown.
    """

    config: DictConfig
    choices: str
    sharding: Choice
    workload: Workload
    planned: Plan | None


def choose_automatically(config: DictConfig, model: LanguageModel) -> ChosenJob:
    """Replace "auto" in a copy of ``config``.

    Args:
        config: Configuration, as composed by ``conf/train.yaml``.
        model: Model of the run, not built yet.

    Raises:
        ValueError: If the global batch cannot be split as asked, where the message names the nearest that can, or if
            an option has none of its values.
    """
    config, choices = copy.deepcopy(config), Choices()
    cluster = config.cluster
    cluster.devices = choices.take("devices per node", cluster.devices, *_devices(cluster))
    cluster.precision = choices.take("precision", cluster.precision, *_precision(cluster))
    _check(config)
    workload = measure_run(config, model)
    planned, asked = None, copy.deepcopy(config)
    if cluster.network_rate_gbits_per_s is not None:
        planned = plan_run(config, workload, hardware_of(cluster))
        _take_way(config, planned)
        chosen = planned.chosen
        workload = workload.way(chosen.recomputed_share, activation_offload=chosen.activation_offload)
    else:
        for option, plain in {"inter_node_prefetch": 0, "cache_offload": False}.items():
            if config.strategy[option] == "auto":
                config.strategy[option] = plain
    sharding = policy_of(config).choose(
        workload.size,
        world_size=cluster.num_nodes * cluster.devices,
        local_size=cluster.devices,
        capacity_bytes=_capacity_bytes(cluster),
    )
    options = {"partition_size": sharding.topology.partition_size, **sharding.communication.keywords()}
    reasons = {option: why.removeprefix('"auto": ') for option, why in sharding.reasons.items()}
    if planned is not None:
        reasons["partition_size"] = _why_fastest(planned)
    reasons["inter_node_prefetch"] = _why_ahead(planned)
    for option in ("partition_size", "cache_parameters", "accumulate_gradients", "inter_node_prefetch"):
        why = reasons[option]
        config.strategy[option] = choices.take(option.replace("_", " "), asked.strategy[option], options[option], why)
    if "frozen_on_ranks" in reasons:
        given, why = asked.strategy.frozen_on_ranks, reasons["frozen_on_ranks"]
        choices.take("frozen on ranks", given, options["frozen_on_ranks"], why)
    config.strategy.frozen_on_ranks = options["frozen_on_ranks"]
    if asked.strategy.activation_checkpointing == "auto":
        why = "as fast as any that fits"
        if planned is None:
            workload, why = _fewest_recomputed(sharding, workload, config), "the fewest with which the micro-batch fits"
        choices.rows["recomputed blocks"] = f'{workload.recomputed_share:.0%} ("auto": {why})'
        config.strategy.activation_checkpointing = _share(workload)
    unknown = "the rates of the cluster are unknown"
    if asked.strategy.cache_offload == "auto":
        where = "host" if config.strategy.cache_offload else "device"
        why = unknown if planned is None else "as fast as any that fits"
        choices.rows["caches and sums of nodes"] = f'on the {where} ("auto": {why})'
    if asked.strategy.activation_offload == "auto":
        where = "host" if workload.activation_offload else "device"
        why = unknown if planned is None else "as fast as any that fits"
        choices.rows["inputs of recomputed blocks"] = f'on the {where} ("auto": {why})'
        config.strategy.activation_offload = workload.activation_offload
    if planned is None:
        most = _largest_micro_batch(sharding, workload)
        _choose_batches(config, choices, most, why=f"up to {most} fit with the model states")
    else:
        _choose_batches(config, choices, planned.chosen.batches.micro, why="as fast as any that fits")
    _choose_validation(config)
    choices.rows["memory per rank"] = _memory_report(sharding, workload, config)
    return ChosenJob(config=config, choices=choices.table(), sharding=sharding, workload=workload, planned=planned)


def _take_way(config: DictConfig, planned: Plan) -> None:
    """Put the options of the chosen candidate in place of "auto"; :class:`Policy` then has nothing left to choose."""
    way, strategy = planned.chosen, config.strategy
    strategy.partition_size = way.topology.partition_size
    strategy.cache_parameters = way.communication.cache_parameters
    strategy.accumulate_gradients = way.communication.accumulate_gradients
    strategy.inter_node_prefetch = way.communication.inter_node_prefetch
    strategy.cache_offload = way.communication.cache_offload
    strategy.frozen_on_ranks = way.communication.frozen_on_ranks
    if way.topology.spans_nodes and strategy.hierarchical == "auto":
        strategy.hierarchical = way.in_stages


def _why_fastest(planned: Plan) -> str:
    ours, theirs = planned.chosen.seconds.expected, planned.baseline.seconds.expected
    simple = "" if planned.chosen is planned.candidates[0] else ", and the simplest of those"
    return (
        f"as fast as any that fits, within 1 %{simple}, with what follows: {ours:.3g} s per step; "
        f"full sharding takes {theirs:.3g} s"
    )


def _why_ahead(planned: Plan | None) -> str:
    if planned is None:
        return "the rates of the cluster are unknown"
    ahead = planned.chosen.communication.inter_node_prefetch
    return "faster by more than 1 % for a slice of a block" if ahead else "as fast without"


def _devices(cluster: DictConfig) -> tuple[int, str]:
    launched = Launched.read(os.environ).ranks_per_node
    if launched is not None:
        return launched, "as launched"
    if cluster.accelerator == "gpu":
        return torch.cuda.device_count(), "the GPUs of this machine"
    return CPU_PROCESSES, "CPU processes, enough for each kind of group"


def _check(config: DictConfig) -> None:
    """Check options whose wrong values a plan would not notice, or would fail on without their names."""
    cluster, strategy = config.cluster, config.strategy
    check_precision(cluster.precision)
    if strategy.activation_offload not in (True, False, "auto"):
        raise ValueError(f"strategy.activation_offload={strategy.activation_offload} is not one of true, false, auto")
    rate = cluster.network_rate_gbits_per_s
    if rate is not None and not isinstance(rate, int | float):
        raise ValueError(f"cluster.network_rate_gbits_per_s={rate} must be a number of Gbit/s, or null")


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


def _largest_micro_batch(sharding: Choice, workload: Workload) -> int:
    """Number of sequences whose activations fit with the model states; 0 if none does."""

    def taken(sequences: int) -> int:
        return step_bytes(workload, sharding.topology, sharding.communication, samples=sequences, micro_steps=None)

    return bisect_right(range(1, 2**30), usable_bytes(sharding.capacity_bytes), key=taken)


def _fewest_recomputed(sharding: Choice, workload: Workload, config: DictConfig) -> Workload:
    """The workload with the fewest recomputed blocks with which a micro-batch fits, as given or with enough tokens."""
    given, length = config.data.batch_size, config.data.sequence_length
    wanted = max(1, LEAST_TOKENS // length) if given == "auto" else given
    by_share = sorted(workload.ways, key=lambda each: each.recomputed_share or 0.0)
    fitting = (each for each in by_share if _largest_micro_batch(sharding, each) >= wanted)
    return replace(next(fitting, by_share[-1]), alternatives=())


def _share(workload: Workload) -> bool | float:
    """The share of recomputed blocks, as the strategy takes it."""
    share = workload.recomputed_share or 0.0
    return bool(share) if share in (0, 1) else share


def _memory_report(sharding: Choice, workload: Workload, config: DictConfig) -> str:
    total = step_bytes(
        workload,
        sharding.topology,
        sharding.communication,
        samples=config.data.batch_size,
        micro_steps=config.trainer.accumulate_grad_batches,
    )
    text = f"about {in_gib(total)} of {in_gib(sharding.capacity_bytes)}"
    return text if total <= usable_bytes(sharding.capacity_bytes) else f"{text}: this may not fit"


def _choose_batches(config: DictConfig, choices: Choices, largest_micro_batch: int, *, why: str) -> None:
    data, trainer = config.data, config.trainer
    batches = split_global_batch(
        config.global_batch_size,
        ranks=config.cluster.num_nodes * config.cluster.devices,
        micro=None if data.batch_size == "auto" else data.batch_size,
        accumulation=None if trainer.accumulate_grad_batches == "auto" else trainer.accumulate_grad_batches,
        largest_micro=max(1, largest_micro_batch),
    )
    choices.rows["global batch"] = f"{config.global_batch_size} sequences of {data.sequence_length} tokens"
    data.batch_size = choices.take("micro-batch", data.batch_size, batches.micro, why)
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
