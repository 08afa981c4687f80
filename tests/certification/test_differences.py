"""Rounding is allowed and nothing else: what differences are relative to, and how large they may be."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mics.certification.comparing import Comparison, Found, Reference
from lightning_mics.certification.differences import (
    TIMES_ORDER,
    AsByOrder,
    AsRounded,
    Difference,
    allowed,
    difference,
    factor,
    scales,
)

EPS = torch.finfo(torch.float64).eps


def test_allowed_differences_are_some_eps_and_more_after_steps() -> None:
    assert allowed(torch.float64, after_steps=0) == 256 * EPS < 1e-13
    assert allowed(torch.float64, after_steps=3) == 4096 * EPS < 1e-12


def test_in_mixed_precision_some_times_the_effect_of_another_order_is_allowed() -> None:
    allows = AsByOrder({"gradients": 0.01})
    assert allows("gradients", 0) == TIMES_ORDER * 0.01
    assert allows("losses", 0) == allowed(torch.float32, after_steps=0)
    assert allows("weights", 2) == 4 * torch.finfo(torch.bfloat16).eps
    assert allows("initial weights", 0) == 0.0
    assert AsByOrder({})("gradients", 0) == 1.0


def test_a_relative_change_of_1e_9_in_one_gradient_is_found(tmp_path) -> None:
    reference = Reference(tmp_path)
    gradients = {name: torch.randn(3, 4, dtype=torch.float64) for name in ("a", "b")}
    reference.put("gradients", 0, gradients)
    comparison = Comparison(reference, AsRounded(torch.float64))
    comparison.take("gradients", 0, gradients)
    assert comparison.found["gradients"].first is None
    comparison.take("gradients", 0, {"a": gradients["a"], "b": gradients["b"] * (1 + 1e-9)})
    found = comparison.found["gradients"].first
    assert found is not None
    assert found.where == "b"
    assert found.factor == pytest.approx(1 + 1e-9, rel=1e-12)


def test_small_gradients_are_compared_with_the_models_largest() -> None:
    found = scales({"large": torch.tensor([10.0]), "small": torch.tensor([1e-6])}, "gradients")
    assert found == pytest.approx({"large": 10.0, "small": 0.1})
    states = {"a/exp_avg": torch.tensor([1.0]), "b/exp_avg": torch.tensor([0.0]), "a/step": torch.tensor(400.0)}
    assert scales(states, "states") == pytest.approx({"a/exp_avg": 1.0, "b/exp_avg": 0.01, "a/step": 400.0})
    assert scales({"zero": torch.zeros(3)}, "weights") == {"zero": 1e-3}


def test_shapes_numbers_and_their_absence_are_compared() -> None:
    one, nan = torch.ones(2), torch.tensor([1.0, math.nan])
    assert difference(one, torch.ones(3), scale=1.0) == math.inf
    assert difference(one, nan, scale=1.0) == math.inf
    assert difference(nan, nan, scale=1.0) == 0.0
    assert difference(one, one + 0.5, scale=2.0) == 0.25
    assert difference(torch.empty(0), torch.empty(0), scale=1.0) == 0.0


def test_a_factor_is_found_only_if_nothing_else_differs() -> None:
    values = torch.randn(20, dtype=torch.float64)
    assert factor(2 * values, values, tolerance=1e-12) == pytest.approx(2.0)
    assert factor(2 * values + torch.randn(20), values, tolerance=1e-12) is None
    assert factor(values, torch.zeros(20, dtype=torch.float64), tolerance=1e-12) is None


def test_the_worst_and_the_first_difference_are_kept() -> None:
    found = Found()
    for relative in (0.0, 2.0, 5.0):
        found.add(Difference(relative, 1.0, f"at {relative}", "then"))
    assert (found.compared, found.worst.where, found.first.where) == (3, "at 5.0", "at 2.0")


@pytest.mark.parametrize("missing", ["a gradient of zeros", "a gradient"])
def test_no_gradient_is_one_of_zeros(missing: str, tmp_path) -> None:
    reference = Reference(tmp_path)
    value = torch.zeros(2) if missing == "a gradient of zeros" else torch.ones(2)
    reference.put("gradients", 0, {"a": torch.ones(2), "b": value})
    comparison = Comparison(reference, AsRounded(torch.float64))
    comparison.take("gradients", 0, {"a": torch.ones(2)})
    assert (comparison.found["gradients"].first is None) == (missing == "a gradient of zeros")


def test_a_moment_that_the_reference_does_not_have_is_a_difference(tmp_path) -> None:
    comparison = Comparison(Reference(tmp_path), AsRounded(torch.float64))
    comparison.take("weights", 7, {})
    assert comparison.found["weights"].first.where == "a step that the reference does not make"
