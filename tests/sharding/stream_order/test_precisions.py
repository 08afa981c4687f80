"""Training is ordered on streams that run later, whatever is gathered and reduced in which dtype."""

from __future__ import annotations

import pytest

from tests.support.stream_order.jobs import OPTIONS, PRECISIONS, trained


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_training_is_ordered_in_every_precision(options: str, precision: str) -> None:
    assert trained(options, precision).order == ()
