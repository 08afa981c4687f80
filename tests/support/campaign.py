"""Cases that only `make campaign` runs, each beside cases of `make test` that fail for the same reasons."""

from __future__ import annotations

from typing import Any

import pytest


def campaign(*values: Any, id: str | None = None) -> Any:
    """A parameter set that is left out unless pytest is given ``--campaign``."""
    return pytest.param(*values, marks=pytest.mark.campaign, id=id)
