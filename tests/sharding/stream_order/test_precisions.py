"""Training is ordered on streams that run later, whatever is gathered and reduced in which dtype."""

from __future__ import annotations

import pytest

from tests.support.stream_order.jobs import OPTIONS, PRECISIONS, precision_of, trained

OTHERS = [  # than the one in which an option set trains in test_usages
    (options, precision) for options in OPTIONS for precision in PRECISIONS if precision != precision_of(options)
]


@pytest.mark.parametrize(("options", "precision"), OTHERS)
def test_training_is_ordered_in_every_precision(options: str, precision: str) -> None:
    assert trained(options, precision).order == ()
