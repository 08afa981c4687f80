"""``certify=true``: the model of a run, shrunk, under the options of its job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import train
from tests.support.campaign import campaign
from tests.support.configs import composed

# model, cluster and rate between nodes: a pair of each distinct set of resolved options and class of model, among the
# plans of benchmarks/results/auto
PAIRS = [
    ("bert-10b", "p3dn_16", 100),
    ("bert-10b", "p3dn_16", 25),
    ("bert-10b", "p4d_16", 400),
    ("bert-10b", "p4d_64", 400),
    ("bert-15b", "p3dn_16", 25),
    ("bert-15b", "p4d_16", 100),
    ("bert-20b", "p3dn_2", 100),
    ("bert-20b", "p5_8", 3200),
    ("bert-50b", "p3dn_16", 100),
    ("bert-tiny", "p3dn_2", 100),
    ("bert-tiny", "p3dn_4", 100),
    ("gpt-1.5b", "p3dn_16", 100),
    ("gpt-1.5b", "p3dn_16", 25),
    ("gpt-1.5b", "p3dn_2", 100),
    ("gpt-1.5b", "p4d_8", 400),
    ("gpt-100b", "p3dn_16", 100),
    ("gpt-100b", "p4d_64", 400),
    ("gpt-100b", "p5_8", 3200),
    ("gpt-100b", "p5en_8", 3200),
    ("gpt-175b", "p4d_64", 400),
    ("gpt-175b", "p5_64", 3200),
    ("gpt-20b", "p5en_8", 3200),
    ("gpt-tiny", "p3dn_2", 100),
    ("gpt-tiny", "p3dn_4", 100),
    ("llama-70b", "p4d_16", 400),
    ("llama-70b", "p4d_16", 100),
    ("llama-70b", "p4d_64", 400),
    ("llama-70b", "p4de_16", 400),
    ("llama-70b", "p5_64", 3200),
    ("llama-70b", "p5_64", 25),
    ("llama-70b", "p5en_8", 25),
    ("llama-8b", "p5_8", 3200),
    ("roberta-20b", "p5en_8", 3200),
]
IN_EVERY_RUN = [("gpt-tiny", "p3dn_2", 100)]


@pytest.mark.parametrize(
    "pair",
    [*IN_EVERY_RUN, *(campaign(pair, id=" ".join(map(str, pair))) for pair in PAIRS if pair not in IN_EVERY_RUN)],
)
def test_a_job_is_certified_with_its_options_and_the_report_is_written(pair: Any, tmp_path: Path, capsys: Any) -> None:
    model, cluster, rate = pair
    overrides = f"model={model}", f"cluster={cluster}", f"cluster.network_rate_gbits_per_s={rate}"
    assert train.certify(composed(*overrides, f"run_dir={tmp_path}")) == 0
    said = capsys.readouterr().out
    assert "is certified against one process" in said
    written = json.loads((tmp_path / "certify.json").read_text())
    assert written["ok"]
    assert any("num_hidden_layers" in note or "n_layer" in note for note in written["notes"]) or "tiny" in model


def test_an_invalid_job_ends_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="This job cannot be: "):
        train.certify(composed("model=gpt-tiny", "strategy.partition_size=3", f"run_dir={tmp_path}"))
