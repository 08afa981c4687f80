"""The option ``--campaign``, without which the cases marked ``campaign`` are left out; ranks that a module shares."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

gc.disable()  # while tests are imported, which leaves next to nothing to collect


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="also run the cases that `make campaign` is for")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("campaign"):
        return
    left_out = [item for item in items if item.get_closest_marker("campaign")]
    items[:] = [item for item in items if not item.get_closest_marker("campaign")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays: collections need not visit it, nor do those of forked ranks
    gc.enable()


@pytest.fixture(scope="session")
def in_campaign(pytestconfig: pytest.Config) -> bool:
    """Whether the cases of the campaign run."""
    return bool(pytestconfig.getoption("campaign"))


@pytest.fixture(scope="module")
def run_shared() -> Iterator[Callable[..., list[Any]]]:
    """``run_ranks`` on processes that all tests of a module share."""
    from tests.support.forked import SharedRanks  # here, or every run of pytest would import torch

    ranks: dict[int, Any] = {}

    def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        return ranks.setdefault(world_size, SharedRanks(world_size)).run(function, *args)

    yield run
    for each in ranks.values():
        each.close()


@pytest.fixture(scope="module")
def on_shared_ranks() -> Iterator[Callable[..., list[Any]]]:
    """``on_ranks`` on processes that all tests of a module share."""
    from tests.support.forked import SharedRanks
    from tests.support.trainers import as_torchrun

    ranks: dict[int, Any] = {}

    def run(function: Callable[..., Any], *args: Any, world_size: int = 4) -> list[Any]:
        shared = ranks.setdefault(world_size, SharedRanks(world_size, partial(as_torchrun, world_size)))
        return shared.run(function, *args)

    yield run
    for each in ranks.values():
        each.close()
