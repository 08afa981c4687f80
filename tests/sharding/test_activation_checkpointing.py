"""Which modules ``activation_checkpointing`` chooses."""

from __future__ import annotations

import re

import pytest

from lightning_mics.sharding.activation_checkpointing import find_recomputed
from lightning_mics.sharding.blocks import find_blocks
from tests.support.models import TinyLM


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [
        (False, []),
        (True, [0, 1, 2, 3]),
        ("Block", [0, 1, 2, 3]),
        ("blocks.*[02468]", [0, 2]),
        (["blocks.0", "blocks.[23]"], [0, 2, 3]),
        (0.5, [1, 3]),
        (0.3, [3]),
        (0.75, [1, 2, 3]),
        (0.0, []),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_blocks_are_chosen_all_together_by_class_by_name_or_by_a_share_over_the_depth(choice, chosen) -> None:
    model = TinyLM(dim=4, layers=4)
    recomputed = find_recomputed(model, find_blocks(model), choice)
    assert sorted(list(model.blocks).index(module) for module in recomputed) == chosen


def test_a_pattern_that_no_block_fits_is_rejected() -> None:
    model = TinyLM(dim=4, layers=4)
    message = "no block fits the pattern 'layers.*'; the 4 blocks are 'blocks.0' to 'blocks.3'"
    with pytest.raises(ValueError, match=re.escape(message)):
        find_recomputed(model, find_blocks(model), ["layers.*"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (1.5, "activation_checkpointing=1.5 is not a share of the blocks, between 0 and 1"),
        ("auto", 'activation_checkpointing="auto" is for plans'),
    ],
)
def test_what_is_no_share_and_what_only_a_plan_can_choose_are_rejected(wrong, message) -> None:
    model = TinyLM(dim=4, layers=4)
    with pytest.raises(ValueError, match=re.escape(message)):
        find_recomputed(model, find_blocks(model), wrong)
