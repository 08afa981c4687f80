"""The plan of a run: what its configuration says of cluster, batches and options, for the planner."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_mics.planning import Hardware, Plan, Workload, plan, with_measured
from lightning_mics.policy.options import PolicyOptions
from lightning_mics.policy.policy import Policy


def plan_run(config: DictConfig, workload: Workload, hardware: Hardware) -> Plan:
    """The plan of the run, with whatever ``config`` leaves to "auto".

    Args:
        config: Configuration of the run, with devices and precision chosen.
        workload: Workload of the run.
        hardware: Hardware of each node.
    """
    cluster, data, trainer = config.cluster, config.data, config.trainer
    return plan(
        workload,
        hardware,
        nodes=cluster.num_nodes,
        ranks_per_node=cluster.ranks_per_node or cluster.devices,
        global_batch_size=config.global_batch_size,
        micro_batch=None if data.batch_size == "auto" else data.batch_size,
        accumulation=None if trainer.accumulate_grad_batches == "auto" else trainer.accumulate_grad_batches,
        **asked(config),
    )


def asked(config: DictConfig) -> dict[str, Any]:
    """What the user asks of a plan: the partition size, and the options of the collectives."""
    policy = policy_of(config)
    return {"partition_size": policy.partition_size, "communication": policy.communication}


def policy_of(config: DictConfig) -> Policy:
    """The policy that the strategy of ``config`` creates from its options."""
    strategy = OmegaConf.to_container(config.strategy, resolve=True)
    return Policy(**{name: strategy[name] for name in PolicyOptions.__annotations__ if name in strategy})


def hardware_of(cluster: DictConfig) -> Hardware:
    """What ``conf/cluster`` says of a node, and the user's own measurements."""
    names = {field.name for field in dataclasses.fields(Hardware)} - {"gpus_per_node"}
    hardware = Hardware(gpus_per_node=cluster.devices, **{name: cluster[name] for name in names})
    return with_measured(
        hardware,
        in_node=cluster.in_node_nccl_tests and Path(cluster.in_node_nccl_tests),
        between_nodes=cluster.network_nccl_tests and Path(cluster.network_nccl_tests),
        nodes=cluster.num_nodes,
    )
