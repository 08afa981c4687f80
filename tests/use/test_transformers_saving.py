"""What the Trainer of transformers saves, and the best model it loads, with sharded and with full state dicts."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from tests.integrations.accelerate.test_transformers import Sequences
from tests.support.accelerators import start
from tests.support.loops import assert_same, network, sgd, weights
from tests.support.networks import GPT
from tests.support.trainers import cases_on_ranks


class Scored(Trainer):
    """Its first evaluation is the best."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        self.evaluated = [*getattr(self, "evaluated", []), weights(self.model)]
        self.state.log_history.append({"step": self.state.global_step, "eval_loss": metrics["eval_loss"]})
        return {**metrics, "eval_loss": abs(self.state.global_step - 1.0)}


def train(folder: Path, kind: str | None, **options: Any) -> dict[str, Any]:
    start(plugin={"state_dict_type": kind} if kind else {})
    arguments = TrainingArguments(
        output_dir=str(folder),
        accelerator_config={"use_configured_state": True},
        use_cpu=True,
        per_device_train_batch_size=1,
        learning_rate=0.05,
        max_steps=2,
        eval_steps=1,
        save_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    torch.manual_seed(1)
    trainer = Scored(model=GPT2LMHeadModel(GPT), args=arguments, train_dataset=Sequences(16), eval_dataset=Sequences(4))
    trainer.train()
    trainer.save_model(str(folder / "final"))
    dist.barrier()
    whole = weights(trainer.model)
    saved = GPT2LMHeadModel.from_pretrained(folder / "final")
    return {
        "best": Path(trainer.state.best_model_checkpoint).name,
        "evaluated": trainer.evaluated,
        "loaded": whole,
        "saved": {name: value for name, value in saved.state_dict().items() if name in whole},
    }


def second_model() -> dict[str, Any]:
    """A reference model that the host shards by itself, as TRL does, and moves towards the trained one."""
    accelerator, model = start(plugin={"ranks_per_node": 1, "partition_size": 1}), network()
    reference, before = copy.deepcopy(model), weights(model)
    model, optimizer = accelerator.prepare(model, sgd(model))
    fully_shard(reference)
    for index in range(2):
        optimizer.zero_grad()
        accelerator.backward(model(torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(index))))
        optimizer.step()
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            theirs.mul_(0.4).add_(ours, alpha=0.6)
    after, moved = weights(model), weights(reference)
    expected = {name: 0.4 * before[name] + 0.6 * after[name] for name in after if "scale" not in name}
    ranks = next(reference.parameters()).device_mesh["shard"].size()
    return {"moved": {name: moved[name] for name in expected}, "expected": expected, "ranks": ranks}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("runs")
    cases: dict[str, Any] = {
        "by default": partial(train, folder / "default", None),
        "full": partial(train, folder / "full", "full"),
        "second model": second_model,
    }
    return cases_on_ranks(cases, world_size=2)


@pytest.mark.parametrize("case", ["by default", "full"])
def test_the_best_model_is_loaded_and_saved_in_full_on_all_ranks(case: str, results: dict[str, list[Any]]) -> None:
    for of_rank in results[case]:
        assert of_rank["best"] == "checkpoint-1"
        assert_same(of_rank["loaded"], of_rank["evaluated"][0])
        assert_same(of_rank["saved"], of_rank["loaded"])
        assert not torch.equal(*(of_rank["evaluated"][index]["transformer.wte.weight"] for index in (0, 1)))


def test_a_second_model_that_the_host_shards_is_in_the_same_partition_groups(results: dict[str, list[Any]]) -> None:
    for of_rank in results["second model"]:
        assert of_rank["ranks"] == 1
        assert_same(of_rank["moved"], of_rank["expected"], 1e-6)
