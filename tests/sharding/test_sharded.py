"""``lightning_mics.sharded`` finds the handle of a sharded model, from the model or from its wrappers."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

import lightning_mics
from lightning_mics.sharding.sharded import Sharded


def with_handle() -> tuple[nn.Module, Sharded]:
    model = nn.Linear(2, 2)
    handle = Sharded(groups=cast(Any, None), schedule=cast(Any, None), report="", blocks=())
    vars(model)["_mics"] = handle
    return model, handle


class Wrapper(nn.Module):
    """Holds a module under a name of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module


def test_it_is_found_at_any_depth_and_from_a_compiled_model() -> None:
    model, handle = with_handle()
    for around in (model, Wrapper(model), nn.Sequential(nn.Identity(), Wrapper(Wrapper(model))), torch.compile(model)):
        assert lightning_mics.sharded(around) is handle


def test_one_model_under_two_names_is_one() -> None:
    model, handle = with_handle()
    assert lightning_mics.sharded(nn.ModuleDict({"compiled": model, "original": model})) is handle


def test_a_model_that_is_not_sharded_is_an_error_that_says_what_shards() -> None:
    with pytest.raises(ValueError, match=r"Linear is not sharded, .* in `fabric\.setup`, .* not a part of it"):
        lightning_mics.sharded(nn.Linear(2, 2))


def test_two_sharded_models_in_one_are_an_error_that_names_them() -> None:
    both = nn.ModuleDict({"student": with_handle()[0], "teacher": with_handle()[0]})
    with pytest.raises(ValueError, match="ModuleDict holds 2 sharded models, 'student', 'teacher': pass one of them"):
        lightning_mics.sharded(both)
