"""dry_run=true: a plan and a rehearsal of a job whose machines are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import train
from recipes.job.auto import choose_automatically
from recipes.job.cluster_plan import hardware_of, plan_run
from recipes.models.language_model import LanguageModel
from recipes.plan.dry_run import rehearse_run
from tests.support.configs import composed

FEW_BLOCKS = ("model.network.num_hidden_layers=2", "cluster=p4d_2")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry_run")
    train.rehearse_job(
        composed(*FEW_BLOCKS, f"run_dir={folder}", "dry_run_rank=9", "strategy.partition_size=8"), ["dry_run=true"]
    )
    return folder


def test_it_writes_a_page_with_pictures_and_json(written: Path) -> None:
    page = (written / "plan.html").read_text()
    assert page.count("data:image/png") == 4
    assert "Rehearsal: rank 9 of 16" in page
    both: dict[str, Any] = json.loads((written / "plan.json").read_text())
    assert both["rehearsal"]["rank"] == 9
    sizes = {row["topology"]["partition_size"] for row in both["plan"]["candidates"]}
    assert sizes == {1, 2, 4, 8, 16}
    assert both["plan"]["chosen"]["topology"]["partition_size"] == 8
    ways = [both["plan"][name] for name in ("recommended", "chosen", "baseline_tuned", "baseline")]
    seconds = [way["seconds"]["expected"] for way in ways]
    assert seconds == sorted(seconds) and all(way["fits"] for way in ways)


def test_a_plan_alone_is_written_without_a_rehearsal(tmp_path: Path) -> None:
    train.rehearse_job(composed(*FEW_BLOCKS, f"run_dir={tmp_path}", "dry_run=plan"), ["dry_run=plan"])
    both = json.loads((tmp_path / "plan.json").read_text())
    assert both["rehearsal"] is None and both["plan"]["recommended"]["fits"]
    page = (tmp_path / "plan.html").read_text()
    assert "Rehearsal" not in page
    assert "optimizer states of torchao would save on each rank: 8 bits " in page
    with pytest.raises(SystemExit, match="dry_run='no' is not one of false, plan, true"):
        train.rehearse_job(composed(*FEW_BLOCKS, f"run_dir={tmp_path}", "dry_run='no'"), [])


def test_the_plan_recommends_what_the_run_takes() -> None:
    config = composed(*FEW_BLOCKS)
    model = train.make_model(config)
    job = choose_automatically(config, model)
    chosen = job.config
    row = plan_run(config, job.workload, hardware_of(chosen.cluster)).recommended
    assert row.topology.partition_size == chosen.strategy.partition_size
    assert (row.batches.micro, row.batches.accumulation) == (
        chosen.data.batch_size,
        chosen.trainer.accumulate_grad_batches,
    )
    for option in ("cache_parameters", "accumulate_gradients", "two_hop"):
        assert getattr(row.communication, option) == chosen.strategy[option] != "auto"


def test_bytes_of_the_plan_are_those_of_the_rehearsal() -> None:
    config = composed(*FEW_BLOCKS, "trainer.gradient_clip_val=null", "data.batch_size=1")
    model = train.make_model(config)
    job = choose_automatically(config, model)
    chosen = job.config
    row = plan_run(config, job.workload, hardware_of(chosen.cluster)).recommended
    sent = rehearse_run(job, model).sent().values()
    assert 8 * sum(part.between_bytes for part in sent) == row.node_sent.between_bytes
    assert 8 * sum(part.inside_bytes for part in sent) == row.node_sent.inside_bytes


def test_the_network_is_built_once_to_be_measured_and_once_to_be_rehearsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, build = [], LanguageModel.build_network

    def counted(model: LanguageModel) -> nn.Module:
        built.append(model.config.num_hidden_layers)
        return build(model)

    monkeypatch.setattr(LanguageModel, "build_network", counted)
    overrides = ["model.network.num_hidden_layers=5", "cluster=p4d_2", "strategy.activation_checkpointing=true"]
    train.rehearse_job(composed(*overrides, f"run_dir={tmp_path}"), ["dry_run=true"])
    assert built == [5, 4, 4, 4, 4, 6, 5]  # blocks; activations of four for numbers of sequences, and of six


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("dry_run_rank=16", "rank=16 is not one of the 16 ranks of the job"),
        ("global_batch_size=33", "the nearest that can are 32 and 48"),
        ("strategy.partition_size=3", "partition_size=3 does not divide world_size=16"),
        ("cluster.memory_gib=0.001", "does not fit one A100 40 GB"),
        (
            "strategy.partition_size=16 strategy.hierarchical=false strategy.accumulate_gradients=node",
            "accumulate_gradients='node' needs a separate inter-node stage of collectives",
        ),
    ],
)
def test_a_job_that_cannot_be_ends_with_the_reason(wrong: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        train.rehearse_job(composed(*FEW_BLOCKS, f"run_dir={tmp_path}", *wrong.split()), [])


def test_on_this_machine_there_is_a_rehearsal_without_a_plan(tmp_path: Path) -> None:
    few = "model.network.num_hidden_layers=2"
    train.rehearse_job(composed(few, "cluster=local", "cluster.accelerator=cpu", f"run_dir={tmp_path}"), [])
    assert json.loads((tmp_path / "plan.json").read_text())["plan"] is None
    assert "Rehearsal: rank 0 of 4" in (tmp_path / "plan.html").read_text()


def test_measurements_of_ones_own_go_before_the_table(tmp_path: Path) -> None:
    output = "1048576 32768 float none -1 60.00 17.48 15.29 0\n1073741824 33554432 float none -1 4500.0 238.6 208.8 0\n"
    (tmp_path / "nccl.txt").write_text(output)
    config = composed(*FEW_BLOCKS, f"cluster.in_node_nccl_tests={tmp_path}/nccl.txt")
    assert hardware_of(config.cluster).in_node_rate_gbytes_per_s == pytest.approx(208.8)
