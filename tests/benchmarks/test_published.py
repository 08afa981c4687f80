"""The predictions' page: its fit is what the package uses, and the test points are as far off as it says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks.published.__main__ import Point, _error, _ranking, fit, read_points, write_page
from lightning_mics.cost import hardware
from lightning_mics.cost.step_time import HIDDEN_SHARE

POINTS, SAID = read_points()


@pytest.fixture(scope="module")
def fitted() -> tuple[tuple[dict[str, float], float], set[str]]:
    """What the fit gives, which takes seconds, and the names of the points whose times it has predicted."""
    predicted: set[str] = set()
    predict = Point.predict_for

    def noting(point: Point, *arguments: Any, **options: Any) -> Any:
        predicted.add(point.name)
        return predict(point, *arguments, **options)

    with patch.object(Point, "predict_for", noting):
        return fit(POINTS), predicted


def test_the_package_uses_what_the_calibration_points_give(fitted: Any) -> None:
    (shares, hidden), _ = fitted
    assert shares == {"V100": hardware.V100_SHARE, "A100": hardware.A100_SHARE, "H100": hardware.HOPPER_SHARE}
    assert hidden == HIDDEN_SHARE


def test_points_of_the_test_did_not_take_part_in_the_fit(fitted: Any) -> None:
    _, predicted = fitted
    assert predicted == {point.name for point in POINTS if point.calibrates}
    assert 5 <= len(predicted) <= len(POINTS) // 3


@pytest.mark.parametrize(
    "point", [p for p in POINTS if not p.calibrates and p.engine == "fsdp"], ids=lambda point: point.name
)
def test_expected_times_are_within_a_quarter(point: Point) -> None:
    assert abs(math.exp(_error(point)) - 1) < 0.25
    seconds = point.predict()
    assert seconds.least <= seconds.expected <= seconds.most


def test_partition_sizes_are_ranked_as_published() -> None:
    by_name = {point.name: point for point in POINTS}
    for names in SAID["partition_sizes"]:
        _, published, predicted = _ranking([by_name[name] for name in names]).strip("|").split(" | ")
        assert published.strip() == predicted.strip()


def test_every_pair_is_of_points_that_are_there(tmp_path: Path) -> None:
    names = {point.name for point in POINTS}
    assert {pair[side] for pair in SAID["pairs"] for side in ("over", "under")} <= names
    write_page(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert all(name in page for name in names)
