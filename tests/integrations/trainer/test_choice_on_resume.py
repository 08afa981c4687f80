"""A run that resumes keeps the choice of the run that saved, unless the job is another one."""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from lightning_mics import MiCSStrategy
from lightning_mics.cost.hardware import Links
from lightning_mics.policy import policy
from tests.support.models import TinyModule
from tests.support.trainers import loader, make_trainer, on_ranks


def links(*, in_node_gbytes: float, network_gbits: float) -> Links:
    return Links(
        gpus_per_node=2,
        in_node_rate_gbytes_per_s=in_node_gbytes,
        network_rate_gbits_per_s=network_gbits,
        network_achieved=1,
        network_latency_us=0.1,
        in_node_latency_us=0.1,
    )


SLOW_BETWEEN = links(in_node_gbytes=100, network_gbits=1e-3)
SLOW_INSIDE = links(in_node_gbytes=1e-6, network_gbits=1)


class WithShardedEntry(TinyModule):
    """A module that saves a sharded tensor among its entries, as averages of weights are saved."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = self.net.embed.weight.detach().clone()


def fit(
    folder: Path,
    measured: Links | None,
    *,
    module: type[TinyModule] = TinyModule,
    ckpt_path: Path | None = None,
    save: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train on two hosts with given rates; what was chosen."""
    strategy = MiCSStrategy(**{"ranks_per_node": 2, **options})
    trainer = make_trainer(
        folder,
        strategy=strategy,
        devices=dist.get_world_size(),
        max_steps=2 if ckpt_path else 1,
        accumulate_grad_batches=2,
    )
    hosts = patch.object(socket, "gethostname", lambda: f"host {dist.get_rank() // 2}")
    with hosts, patch.object(policy, "measure_links", return_value=measured) as probe:
        trainer.fit(module(), loader(), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(folder / save)
    report = strategy.start_report
    said = [line.split(maxsplit=1)[1] for line in report.splitlines() if line.startswith("  resumed")]
    return {"chosen": dict(strategy._state().chosen), "said": said, "probes": probe.call_count, "report": report}


def runs(folder: Path) -> dict[str, Any]:
    other = partial(fit, folder, SLOW_INSIDE)
    found = {
        "saved": fit(folder, SLOW_BETWEEN, save="a.ckpt"),
        "saved with sharded entry": fit(folder, SLOW_BETWEEN, module=WithShardedEntry, save="b.ckpt"),
        "new": other(),
        "resumed": other(ckpt_path=folder / "a.ckpt"),
        "resumed with sharded entry": other(ckpt_path=folder / "b.ckpt", module=WithShardedEntry),
        "other nodes": other(ckpt_path=folder / "a.ckpt", ranks_per_node=1),
    }
    with patch("lightning_mics.checkpoint.origin.CHOICE_KEY", "unknown to earlier versions"):
        found["earlier"] = other(ckpt_path=folder / "a.ckpt")
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    of_ranks = on_ranks(runs, tmp_path_factory.mktemp("runs"))
    assert all(of_rank == of_ranks[0] for of_rank in of_ranks)
    return dict(of_ranks[0])


def test_micro_steps_of_the_trainer_are_known(found: Any) -> None:
    assert "per step of 2 micro-steps" in found["saved"]["report"]


@pytest.mark.parametrize("case", ["resumed", "resumed with sharded entry"])
def test_a_resumed_run_keeps_the_choice_where_it_would_choose_otherwise_now(case: str, found: Any) -> None:
    saved = found[case.replace("resumed", "saved")]
    assert saved["chosen"] != found["new"]["chosen"]
    assert found[case]["chosen"] == saved["chosen"] and found[case]["probes"] == 0
    assert found[case]["said"] == ["the choice of the checkpoint is kept"]


def test_on_other_nodes_and_from_checkpoints_of_earlier_versions_it_chooses_anew(found: Any) -> None:
    assert found["other nodes"]["said"] == ["chosen anew: the checkpoint is of 4 ranks, 2 per node"]
    assert found["other nodes"]["probes"] == found["earlier"]["probes"] == 1
    assert found["earlier"]["said"] == [] and found["earlier"]["chosen"] == found["new"]["chosen"]
