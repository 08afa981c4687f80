"""The option ``--campaign``, without which the cases marked ``campaign`` are left out."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="also run the cases that `make campaign` is for")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("campaign"):
        return
    left_out = [item for item in items if item.get_closest_marker("campaign")]
    items[:] = [item for item in items if not item.get_closest_marker("campaign")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def in_campaign(pytestconfig: pytest.Config) -> bool:
    """Whether the cases of the campaign run."""
    return bool(pytestconfig.getoption("campaign"))
