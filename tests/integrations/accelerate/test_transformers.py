"""The Trainer of transformers with a ``MiCSPlugin``."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from lightning_mics.sharding.sharded import sharded
from tests.support.accelerators import start
from tests.support.loops import assert_same, weights
from tests.support.models import VOCAB, tokens
from tests.support.networks import GPT
from tests.support.trainers import cases_on_ranks, on_ranks

pytestmark = pytest.mark.launch


class Sequences(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.rows = tokens(count, length=8)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def fit_with_transformers(folder: Path, max_steps: int, resume: bool) -> dict[str, Any]:
    start(plugin={"partition_size": 2})  # before the arguments, which keep it
    arguments = TrainingArguments(
        output_dir=str(folder),
        accelerator_config={"use_configured_state": True},
        use_cpu=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
        max_grad_norm=1.0,
        max_steps=max_steps,
        lr_scheduler_type="constant",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=3,
    )
    torch.manual_seed(1)
    trainer = Trainer(
        model=GPT2LMHeadModel(GPT), args=arguments, train_dataset=Sequences(64), eval_dataset=Sequences(16)
    )
    trainer.train(resume_from_checkpoint=resume)
    assert sharded(trainer.model).groups.topology.partition_size == 2
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return {
        "losses": losses,
        "evaluated": trainer.evaluate()["eval_loss"],
        "weights": weights(trainer.model),
    }


def test_the_trainer_of_transformers_trains_saves_resumes_and_evaluates(tmp_path: Path) -> None:
    whole, _ = cases_on_ranks(
        {
            "whole": partial(fit_with_transformers, tmp_path / "whole", 4, False),
            "first part": partial(fit_with_transformers, tmp_path / "parts", 2, False),
        },
        world_size=2,
    ).values()
    resumed = on_ranks(fit_with_transformers, tmp_path / "parts", 4, True, world_size=2)
    for first, second in zip(whole, resumed, strict=True):
        assert first["evaluated"] < math.log(VOCAB) - 0.1
        assert second["losses"][4] == pytest.approx(first["losses"][4], abs=1e-5)
        assert second["evaluated"] == pytest.approx(first["evaluated"], abs=1e-5)
        assert_same(second["weights"], first["weights"], 1e-5)
