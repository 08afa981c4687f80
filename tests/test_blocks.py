"""Which modules become blocks."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lightning_mics.blocks import find_blocks, unit_modules
from tests.models import Block, TinyLM


def test_the_longest_list_of_one_class_is_taken():
    model = nn.ModuleDict({"short": nn.ModuleList([Block(2)]), "long": nn.Sequential(Block(2), Block(2), Block(2))})
    assert list(find_blocks(model)) == ["long.2", "long.1", "long.0"]


def test_a_model_that_is_a_list_itself_has_blocks():
    assert set(find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))) == {"0", "1"}


def test_lists_of_different_classes_or_without_parameters_are_no_blocks():
    with pytest.raises(TypeError, match="found no blocks to shard in Sequential"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    with pytest.raises(TypeError, match="found no blocks"):
        find_blocks(nn.Sequential(nn.ReLU(), nn.ReLU()))


def test_a_model_inside_the_model_names_its_blocks():
    class Named(TinyLM):
        _no_split_modules = ("Block",)

    longer = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    wrapper = nn.ModuleDict({"net": Named(layers=2), "longer": longer})
    assert list(find_blocks(wrapper)) == ["net.blocks.1", "net.blocks.0"]


def test_classes_and_names_are_both_taken():
    model = TinyLM()
    assert find_blocks(model, [Block]) == find_blocks(model, ["Block"]) == find_blocks(model)


def test_no_blocks_at_all_can_be_asked_for():
    assert find_blocks(nn.Linear(2, 2), []) == {}


def test_inner_blocks_come_before_outer_ones():
    model = nn.Sequential(nn.Sequential(Block(2)))
    order = list(find_blocks(model, ["Block", "Linear"]))
    assert order.index("0.0.up") < order.index("0.0")


def test_a_compiled_block_counts_as_its_class():
    model = TinyLM(layers=2)
    model.blocks[0] = torch.compile(model.blocks[0])
    assert set(find_blocks(model, [Block])) == {"blocks.0", "blocks.1"}


def test_a_missing_class_is_named_with_those_that_are_there():
    message = "shard_modules=['Blok']: TinyLM has no Blok; its module classes are Linear (7), Block (3), Embedding (1)"
    with pytest.raises(ValueError, match=re.escape(message)):
        find_blocks(TinyLM(), ["Blok"])


def test_parameters_tied_inside_the_root_or_inside_a_block_are_fine():
    model = TinyLM()
    model.blocks[0].up = model.blocks[0].down
    assert len(find_blocks(model)) == 3


def test_a_unit_holds_all_its_modules_children_first():
    model = TinyLM(layers=1)
    modules = list(unit_modules(model))
    assert modules[-1] is model
    assert set(modules) == set(model.modules())
