"""From ``Trainer(strategy="mics")`` to process groups: names, launchers, backends, timeouts, and errors."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.environments import KubeflowEnvironment, LightningEnvironment
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors import accelerator_connector
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_mics import MiCSStrategy
from lightning_mics.integrations import _lightning
from lightning_mics.integrations.accelerate import MiCSPlugin
from lightning_mics.integrations.fabric import MiCSFabricStrategy
from lightning_mics.policy.memory import measure_model
from lightning_mics.topology import Topology
from tests.support.models import TinyModule
from tests.support.trainers import loader, make_trainer, mics, on_ranks

TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "some-run",
}


SLURM = {
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
}


KUBEFLOW = {
    "KUBERNETES_PORT": "tcp://127.0.0.1:443",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
    "WORLD_SIZE": "2",
    "RANK": "1",
}


# -- names --


@pytest.mark.parametrize("name", ["mics", "MiCS", "MICS"])
def test_mics_is_found_by_name_in_any_case(tmp_path: Path, name: str) -> None:
    assert type(make_trainer(tmp_path, strategy=name, devices=2).strategy) is MiCSStrategy


def test_an_instance_is_used_unchanged(tmp_path: Path) -> None:
    strategy = MiCSStrategy(partition_size=2)
    assert make_trainer(tmp_path, strategy=strategy, devices=2).strategy is strategy


def test_a_registered_variant_keeps_its_options(tmp_path: Path) -> None:
    StrategyRegistry.register("mics_one", MiCSStrategy, partition_size=1, state_dict_type="full")
    try:
        strategy = make_trainer(tmp_path, strategy="mics_one", devices=2).strategy
    finally:
        StrategyRegistry.remove("mics_one")
    assert topology_of(strategy).partition_size == 1
    assert not strategy._save_distributed_checkpoint


def topology_of(strategy: MiCSStrategy) -> Topology:
    """Of a model that one node holds."""
    size = measure_model(TinyModule(), [])
    job = {"world_size": strategy.world_size, "local_size": strategy.num_processes, "capacity_bytes": 2**30}
    return strategy._policy.choose(size, **job).topology


@pytest.mark.parametrize("strategy", ["mics", MiCSStrategy(partition_size=2)], ids=["by name", "instance"])
def test_the_number_of_nodes_reaches_the_topology(tmp_path: Path, strategy: Any) -> None:
    trainer = make_trainer(tmp_path, strategy=strategy, devices=2, num_nodes=3)
    topology = topology_of(trainer.strategy)
    assert (topology.world_size, topology.nodes, topology.ranks_per_node) == (6, 3, 2)
    assert topology.partition_size == 2  # "auto", too: one node holds the model


# -- launchers --


@pytest.mark.parametrize(
    ("variables", "plugins", "environment"),
    [
        ({}, [], "LightningEnvironment"),
        (TORCHRUN, [], "TorchElasticEnvironment"),
        (SLURM, [], "SLURMEnvironment"),
        ({**SLURM, **TORCHRUN}, [], "TorchElasticEnvironment"),
        ({**SLURM, "SLURM_JOB_NAME": "bash"}, [], "LightningEnvironment"),
        (KUBEFLOW, [KubeflowEnvironment()], "KubeflowEnvironment"),
        (SLURM, [LightningEnvironment()], "LightningEnvironment"),
    ],
    ids=["nothing", "torchrun", "slurm", "torchrun in slurm", "interactive slurm", "kubeflow", "plugin"],
)
def test_the_launcher_is_recognized_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], plugins: list[Any], environment: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    strategy = make_trainer(tmp_path, strategy="mics", devices=2, plugins=plugins).strategy
    assert type(strategy.cluster_environment).__name__ == environment
    if environment != "LightningEnvironment":
        assert (strategy.world_size, strategy.global_rank) == (2, 1)


def test_processes_started_from_outside_are_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_trainer(tmp_path, strategy="mics", devices=2).strategy.launcher, _SubprocessScriptLauncher)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert make_trainer(tmp_path, strategy="mics", devices=2).strategy.launcher is None


def test_a_notebook_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator_connector, "_IS_INTERACTIVE", True)
    with pytest.raises(MisconfigurationException, match=r"strategy='mics'\)` is not compatible with an interactive"):
        make_trainer(tmp_path, strategy="mics", devices=2)


# -- devices and backends --


def strategy_on(device: str, **options: Any) -> MiCSStrategy:
    strategy = MiCSStrategy(**options)
    strategy.accelerator = mock.Mock()
    strategy.parallel_devices = [torch.device(device)] * 2
    strategy.cluster_environment = LightningEnvironment()
    strategy._lightning_module = mock.Mock()
    strategy._lightning_module.trainer.callbacks = []
    strategy.set_world_ranks()
    return strategy


@pytest.mark.parametrize("accelerator", ["cpu", CPUAccelerator()], ids=["by name", "instance"])
def test_a_cpu_accelerator_is_accepted(tmp_path: Path, accelerator: Any) -> None:
    strategy = pl.Trainer(accelerator=accelerator, strategy="mics", devices=2, default_root_dir=tmp_path).strategy
    assert strategy.root_device.type == "cpu"


def test_a_device_without_collectives_is_rejected() -> None:
    with pytest.raises(ValueError, match="strategy 'mics' runs on CUDA and CPU devices, not on 'mps'"):
        strategy_on("mps").setup_environment()
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("device", "given", "backend"),
    [("cpu", None, "gloo"), ("cuda:0", None, "nccl"), ("cuda:0", "cpu:gloo,cuda:nccl", "cpu:gloo,cuda:nccl")],
)
def test_the_backend_follows_the_device_unless_named(
    monkeypatch: pytest.MonkeyPatch, device: str, given: str | None, backend: str
) -> None:
    init = mock.Mock()
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(_lightning, "control_plane", mock.Mock())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    strategy_on(device, process_group_backend=given, timeout=timedelta(seconds=77)).setup_environment()
    assert init.call_args.args[0] == backend
    assert init.call_args.kwargs["timeout"] == timedelta(seconds=77)
    assert (init.call_args.kwargs["rank"], init.call_args.kwargs["world_size"]) == (0, 2)
    assert init.call_args.kwargs.get("device_id") == (None if device == "cpu" else torch.device(device))


@pytest.mark.parametrize("make", [MiCSStrategy, MiCSFabricStrategy, MiCSPlugin])
def test_without_a_timeout_each_backend_has_its_own(make: Any) -> None:
    made = make()
    policy = made.policy if isinstance(made, MiCSPlugin) else made._policy
    assert made._timeout is policy._timeout is None  # torch then gives NCCL's groups 10 minutes, and gloo's 30


def timeouts(folder: str, options: dict[str, int]) -> list[tuple[tuple[int, ...], timedelta, bool]]:
    made = []
    new_group = dist.new_group

    def recording(ranks: list[int] | None = None, **options: Any) -> Any:
        made.append((tuple(ranks or ()), options["timeout"], options["group_desc"] == "mics control plane"))
        return new_group(ranks, **options)

    dist.new_group = recording
    strategy = mics(timeout=timedelta(seconds=77), **options)
    make_trainer(folder, strategy=strategy).validate(TinyModule(), loader(4), verbose=False)
    return made


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"ranks_per_node": 1, "partition_size": 2}, [(2, 3), (1, 3)]),  # partition, which is the rail; replication
        ({"ranks_per_node": 2, "partition_size": 4}, [(0, 2, 1, 3), (1, 3), (2, 3)]),  # partition, rail, node
    ],
    ids=str,
)
def test_the_timeout_reaches_every_group(
    tmp_path: Path, options: dict[str, int], groups: list[tuple[int, ...]]
) -> None:
    made = on_ranks(timeouts, str(tmp_path), options)[3]
    assert [ranks for ranks, _, of_control in made if not of_control] == groups
    assert {timeout for _, timeout, _ in made} == {timedelta(seconds=77)}
    assert any(of_control for _, _, of_control in made)


# -- the wrong moment, and callbacks that cannot work --


def test_the_device_mesh_is_rejected_before_the_processes_exist() -> None:
    with pytest.raises(RuntimeError, match="device mesh before processes have initialized"):
        _ = MiCSStrategy().device_mesh


def test_the_topology_is_rejected_before_the_model_is_sharded() -> None:
    with pytest.raises(RuntimeError, match="the model is sharded when the Trainer runs"):
        _ = MiCSStrategy().topology


def test_every_rank_has_data_of_its_own() -> None:
    strategy = strategy_on("cpu")
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 2, "rank": 0}
