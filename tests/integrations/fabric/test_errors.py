"""``Fabric(strategy="mics")``: error messages."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric import Fabric

from lightning_mics import MiCSFabricStrategy
from tests.support.fits import refusal
from tests.support.loops import (
    adam,
    network,
    set_up_in_one_call,
    sgd,
    start,
)
from tests.support.models import tokens
from tests.support.trainers import cases_on_ranks

Seen = dict[Any, list[Any]]


def refused(case: str, path: Path) -> str:
    fabric = start()
    model, optimizer = set_up_in_one_call(fabric)
    plain = network()
    cases: dict[str, Callable[[], Any]] = {
        "a plain model": lambda: fabric.load(path, {"model": plain}),
        "another key": lambda: other_key(fabric, path.with_name("key"), model, optimizer),
        "nothing": lambda: fabric.load(path),
        "optimizer alone": lambda: fabric.load_raw(path, optimizer),
        "no checkpoint": lambda: fabric.load(path, {"model": model}),
        "set up twice": lambda: fabric.setup_module(model),
        "a sharded model again, otherwise": lambda: start(partition_size=4).setup_module(model._forward_module),
        "an optimizer of others": lambda: fabric.setup(plain, sgd(network())),
        "an optimizer made too early": lambda: fabric.setup_optimizers(sgd(plain)),
    }
    if case == "an optimizer that has stepped":
        stepped = adam(plain)
        plain(tokens(2)).backward()
        stepped.step()
        cases[case] = lambda: fabric.setup(plain, stepped)
    try:
        cases[case]()
    except (FileNotFoundError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def other_key(fabric: Any, path: Path, model: Any, optimizer: Any) -> None:
    fabric.save(path, {"net": model, "optimizer": optimizer})
    fabric.load(path, {"model": model, "optimizer": optimizer})


CASES = [
    ("a plain model", r"ValueError: fabric.load takes a model that was set up.*it got none"),
    ("another key", "KeyError: .*has no 'model': the requested state contains a key that does not exist"),
    ("nothing", "ValueError: fabric.load takes a model"),
    ("optimizer alone", "NotImplementedError: an optimizer is loaded with its model"),
    ("no checkpoint", "FileNotFoundError: .* does not point to a valid checkpoint"),
    ("set up twice", "ValueError: A model should be passed only once"),
    ("a sharded model again, otherwise", "ValueError: the model is already sharded with partition_size=2"),
    ("an optimizer of others", "ValueError: SGD holds 7 tensors that are not parameters of the model"),
    ("an optimizer made too early", r"ValueError: SGD holds 7 tensors .* make it after `model = fabric"),
    ("an optimizer that has stepped", "ValueError: AdamW has stepped"),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Error messages of each of four ranks, by case; all cases run in one set of processes."""
    path = tmp_path_factory.mktemp("errors") / "c"
    cases: dict[str, Any] = {case: partial(refused, case, path) for case, _ in CASES}
    return cases_on_ranks({**cases, "partition size": too_large_a_partition})


@pytest.mark.parametrize(("case", "message"), CASES)
def test_wrong_use_gets_a_clear_error(case: str, message: str, seen: Seen) -> None:
    for said in seen[case]:
        assert re.match(message, said), said


@pytest.mark.parametrize("precision", ["64-true", "16-true"])
def test_unsupported_precisions_are_rejected_before_communication(precision: Any) -> None:
    with pytest.raises(ValueError, match=f"does not support .*precision='{precision}'"):
        Fabric(accelerator="cpu", devices=2, strategy="mics", precision=precision)


def test_invalid_options_are_rejected_by_the_constructor() -> None:
    with pytest.raises(TypeError, match="partition_sise"):
        MiCSFabricStrategy(partition_sise=2)
    with pytest.raises(ValueError, match='async_save=True needs state_dict_type="sharded"'):
        MiCSFabricStrategy(async_save=True, state_dict_type="full")
    with pytest.raises(ValueError, match='state_dict_type=False is neither "sharded" nor "full"'):
        MiCSFabricStrategy(state_dict_type=False)


def too_large_a_partition() -> str:
    return refusal(lambda: start(partition_size=3))


def test_a_partition_size_that_does_not_fit_is_rejected(seen: Seen) -> None:
    for said in seen["partition size"]:
        assert said.startswith("ValueError: partition_size=3")
