"""AdamW of the recipes: what is decayed, and the learning rate over steps."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from torch import nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup

import train
from recipes.optimizers import AdamWWarmupCosine
from tests.support.configs import composed

VALUES: dict[str, Any] = {
    "lr": 1.0,
    "betas": [0.9, 0.95],
    "weight_decay": 0.1,
    "warmup_steps": 4,
    "total_steps": 10,
    "final_lr_fraction": 0.1,
}


class Scaled(nn.Linear):
    """With a scale per channel and, as experts have them, biases in two dimensions."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.scale = nn.Parameter(torch.ones(2))
        self.expert_bias = nn.Parameter(torch.zeros(4, 2))


def test_only_matrices_are_decayed() -> None:
    module = Scaled()
    optimizer = AdamWWarmupCosine(**VALUES)(module)["optimizer"]
    decay = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert {name: decay[parameter] for name, parameter in module.named_parameters()} == {
        "weight": 0.1,
        "bias": 0.0,
        "scale": 0.0,
        "expert_bias": 0.0,
    }


def test_rate_warms_up_decays_and_then_stays() -> None:
    configured = AdamWWarmupCosine(**VALUES)(nn.Linear(1, 1))
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[4:11] == sorted(rates[4:11], reverse=True)
    assert rates[10:] == pytest.approx([0.1] * 3)


def rates(scheduled: dict[str, Any], *, steps: int) -> list[float]:
    """The learning rate of each of the next ``steps``."""
    optimizer, scheduler, taken = scheduled["optimizer"], scheduled["lr_scheduler"]["scheduler"], []
    for _ in range(steps):
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return taken


def test_rates_are_the_closed_form() -> None:
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * progress / 6)) / 2 for progress in range(6)]
    made = rates(AdamWWarmupCosine(**VALUES)(nn.Linear(1, 1)), steps=12)
    assert made == pytest.approx([0.25, 0.5, 0.75, 1.0, *cosine, 0.1, 0.1], rel=1e-15)


def test_while_it_decays_it_is_the_schedule_of_transformers() -> None:
    """Which begins its warm-up with a step at rate 0, and rises again behind the last step."""
    theirs = AdamWWarmupCosine(**VALUES)(nn.Linear(1, 1))
    theirs["lr_scheduler"]["scheduler"] = get_cosine_with_min_lr_schedule_with_warmup(
        theirs["optimizer"], num_warmup_steps=4, num_training_steps=10, min_lr_rate=0.1
    )
    ours = rates(AdamWWarmupCosine(**VALUES)(nn.Linear(1, 1)), steps=11)
    assert ours[4:] == pytest.approx(rates(theirs, steps=11)[4:], rel=1e-15)


def test_a_resumed_run_that_is_longer_decays_to_its_own_end() -> None:
    first = AdamWWarmupCosine(**VALUES)(nn.Linear(1, 1))
    rates(first, steps=10)
    longer = AdamWWarmupCosine(**VALUES | {"total_steps": 20})(nn.Linear(1, 1))
    longer["optimizer"].load_state_dict(first["optimizer"].state_dict())
    longer["lr_scheduler"]["scheduler"].load_state_dict(first["lr_scheduler"]["scheduler"].state_dict())
    expected = rates(AdamWWarmupCosine(**VALUES | {"total_steps": 20})(nn.Linear(1, 1)), steps=20)
    assert rates(longer, steps=10)[1:] == expected[11:]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": 0.0}, "optimizer.lr=0.0 must be positive"),
        ({"betas": [0.9, 1.0]}, "optimizer.betas=[0.9, 1.0] must be two numbers from 0 to below 1"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay=-0.1 must be at least 0"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps=-1 must be at least 0"),
        ({"final_lr_fraction": -1.0}, "optimizer.final_lr_fraction=-1.0 must be at least 0"),
    ],
)
def test_a_value_out_of_its_range_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AdamWWarmupCosine(**(VALUES | wrong))


def test_it_is_refused_before_the_model_is_built() -> None:
    with pytest.raises(InstantiationException, match=r"optimizer\.lr=-1 must be positive"):
        train.make_model(composed("optimizer.lr=-1"))


def test_a_configured_model_makes_it() -> None:
    made = train.make_model(composed("optimizer.lr=0.5")).make_optimizer(nn.Linear(1, 1))
    assert made["optimizer"].defaults["lr"] == 0.5
