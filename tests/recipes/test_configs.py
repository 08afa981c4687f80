"""Every file in ``conf/`` composes, says when to choose it, and holds keys that its target takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import lightning as L
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

import train
from lightning_mics.policy.options import PolicyOptions
from recipes.job.auto import _devices, choose_automatically
from tests.support.configs import CONF, composed

CHOICES = [path.relative_to(CONF).with_suffix("").as_posix() for path in sorted(CONF.glob("*/*.yaml"))]
GROUPS = {path.parent.name: sorted(each.stem for each in path.parent.glob("*.yaml")) for path in CONF.glob("*/*.yaml")}


SPECIAL_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "training"}


def targets(node: object) -> Iterator[dict]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from targets(child)


def plain(config: DictConfig) -> dict:
    keys = [key for key in config if key != "hydra"]
    return OmegaConf.to_container(OmegaConf.masked_copy(config, keys), resolve=False) | {
        key: OmegaConf.to_container(config[key], resolve=True) for key in keys if isinstance(config[key], DictConfig)
    }


@cache
def composed_with(choice: str) -> tuple[DictConfig, list[dict]]:
    """A config with a choice, and its targets. Choices of all groups come together; an experiment chooses itself."""
    group, _, name = choice.partition("/")
    if group == "experiment":
        config = composed(f"{group}={name}")
        return config, list(targets(plain(config)))
    return _composed_in_round(GROUPS[group].index(name))


@cache
def _composed_in_round(number: int) -> tuple[DictConfig, list[dict]]:
    groups = {group: names[number % len(names)] for group, names in GROUPS.items() if group != "experiment"}
    config = composed(*(f"{group}={name}" for group, name in groups.items()))
    return config, list(targets(plain(config)))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_config_composes_and_its_target_takes_its_keys(choice: str) -> None:
    group, _, name = choice.partition("/")
    config, found = composed_with(choice)
    assert config.hydra.runtime.choices[group] == name
    assert len(found) >= 10
    for node in found:
        keys = dict.fromkeys(node.keys() - SPECIAL_KEYS)
        inspect.signature(get_object(node["_target_"])).bind_partial(**keys)


def without_auto(config: DictConfig) -> DictConfig:
    return choose_automatically(config, train.make_model(config)).config


def first_line(path: Path) -> str:
    return next(line for line in path.read_text().splitlines() if not line.startswith("# @package"))


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.stem)
def test_first_line_of_every_config_says_what_it_is_for(path: Path) -> None:
    expected = {CONF: "# Table of contents"} | dict.fromkeys(CONF.rglob("base"), "# What ")
    assert first_line(path).startswith(expected.get(path.parent, "# Choose this "))


EXPERIMENTS = {
    path.relative_to(CONF / "experiment").with_suffix("").as_posix(): path for path in CONF.glob("experiment/**/*.yaml")
}


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_an_experiment_names_its_command(name: str) -> None:
    assert f"python train.py experiment={name}" in first_line(EXPERIMENTS[name])


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_what_an_experiment_says_is_what_is_run(name: str) -> None:
    config, said = composed(f"experiment={name}"), OmegaConf.load(EXPERIMENTS[name])
    assert config.name == name.replace("/", "-")
    for group in ("trainer", "data", "optimizer", "strategy"):
        assert OmegaConf.merge(config[group], said.get(group, {})) == config[group]


PAPER = {  # model: partition size, micro-batch, sequences per step, micro-steps, GPUs, precision
    "bert-10b": (8, 8, 8192, 8, 128, "16-mixed"),
    "bert-15b": (16, 8, 8192, 8, 128, "16-mixed"),
    "bert-20b": (16, 8, 8192, 8, 128, "16-mixed"),
    "bert-50b": (64, 8, 8192, 8, 128, "16-mixed"),
    "gpt-100b": (128, 16, 32768, 4, 512, "bf16-mixed"),
}


def test_jobs_of_the_paper_have_its_numbers() -> None:
    assert {name.removeprefix("paper/") for name in EXPERIMENTS if name.startswith("paper/")} == PAPER.keys()
    for name, (partition_size, micro_batch, sequences, micro_steps, gpus, precision) in PAPER.items():
        config = composed(f"experiment=paper/{name}")
        assert config.hydra.runtime.choices.model == name
        assert config.strategy.partition_size == partition_size
        assert (config.data.batch_size, config.global_batch_size) == (micro_batch, sequences)
        assert config.trainer.accumulate_grad_batches in ("auto", micro_steps)
        assert micro_batch * micro_steps * gpus == sequences
        assert config.cluster.num_nodes * config.cluster.devices == gpus
        assert (config.cluster.precision, config.data.sequence_length) == (precision, 512)
        assert config.strategy.activation_checkpointing is True


def test_strategy_config_is_the_constructor_of_the_strategy() -> None:
    config = composed().strategy
    options = {*inspect.signature(get_object(config._target_)).parameters, *PolicyOptions.__annotations__}
    assert set(config) - SPECIAL_KEYS <= options - {"policy"}
    assert {"partition_size", "ranks_per_node", "hierarchical", "state_dict_type"} <= set(config)


def test_without_a_gpu_four_processes_count_as_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = composed()
    assert (config.trainer.accelerator, config.strategy.ranks_per_node) == ("cpu", 2)
    assert without_auto(config).trainer.devices == 4


def test_with_gpus_all_are_used_as_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    config = composed()
    assert (config.trainer.accelerator, config.strategy.ranks_per_node) == ("gpu", None)
    assert _devices(config.cluster)[0] == 3


def test_default_run_ends_on_a_validation() -> None:
    trainer = without_auto(composed()).trainer
    assert trainer.max_steps * trainer.accumulate_grad_batches % trainer.val_check_interval == 0


def built(folder: Path, *overrides: str) -> L.Trainer:
    given = (f"run_dir={folder}", "cluster.accelerator=cpu", "cluster.devices=2")
    return train.make_trainer(without_auto(composed(*given, *overrides)))


def names(trainer: L.Trainer) -> list[str]:
    return [type(callback).__name__ for callback in trainer.callbacks]


def test_trainer_is_built_as_configured(tmp_path: Path) -> None:
    trainer = built(tmp_path, "trainer.max_steps=7")
    assert trainer.max_steps == 7
    made = names(trainer)
    assert {"StopIfDiverged", "Throughput", "GradientNorm", "PeakMemory", "StepProgressBar"} <= set(made)
    assert made.index("History") > made.index("PeakMemory")  # it notes what those before it have logged


def test_one_value_of_a_callback_is_changed_by_its_name(tmp_path: Path) -> None:
    """The command of docs/checkpoints.md, for stores, which have no links."""
    trainer = built(tmp_path, "checkpoint_dir=s3://bucket/run", "trainer.callbacks.checkpoint.save_last=null")
    assert trainer.checkpoint_callback.dirpath == "s3://bucket/run"
    assert trainer.checkpoint_callback.save_last is None
    assert built(tmp_path).checkpoint_callback.save_last == "link"


@pytest.fixture(scope="module")
def names_by_default(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return names(built(tmp_path_factory.mktemp("default")))


@pytest.mark.parametrize("override", ["~trainer.callbacks.peak_memory", "trainer.callbacks.peak_memory=null"])
def test_a_callback_is_removed_by_its_name(tmp_path: Path, override: str, names_by_default: list[str]) -> None:
    assert sorted([*names(built(tmp_path, override)), "PeakMemory"]) == sorted(names_by_default)


def test_a_callback_is_added_under_a_name(tmp_path: Path, names_by_default: list[str]) -> None:
    added = (
        "+trainer.callbacks.mine._target_=lightning.pytorch.callbacks.Timer",
        "+trainer.callbacks.mine.duration=00:01:00:00",
    )
    trainer = built(tmp_path, *added)
    assert sorted(names(trainer)) == sorted([*names_by_default, "Timer"])


def test_models_compose_with_clusters() -> None:
    """A round through all pairs, which take a minute, that has every file of both."""
    models, clusters = ([path.stem for path in sorted(CONF.glob(f"{group}/*.yaml"))] for group in ("model", "cluster"))
    pairs = [(models[i % len(models)], clusters[i % len(clusters)]) for i in range(max(len(models), len(clusters)))]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for model, cluster in pairs:
            config = compose("train", overrides=[f"model={model}", f"cluster={cluster}"])
            assert config.strategy.ranks_per_node == config.cluster.ranks_per_node
            assert config.trainer.num_nodes == config.cluster.num_nodes
            assert config.global_batch_size == config.model.training.global_batch_size
