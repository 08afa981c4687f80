"""Which modules become blocks."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lightning_mics.sharding.blocks import find_blocks, group_modules
from tests.support.models import Block, TinyLM


def test_the_longest_list_of_one_class_is_taken():
    model = nn.ModuleDict({"short": nn.ModuleList([Block(2)]), "long": nn.Sequential(Block(2), Block(2), Block(2))})
    assert list(find_blocks(model)) == ["long.2", "long.1", "long.0"]


def test_a_model_that_is_a_list_itself_has_blocks():
    assert set(find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))) == {"0", "1"}


def test_lists_of_different_classes_or_without_parameters_are_no_blocks():
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))) == {}
    assert find_blocks(nn.ModuleDict({"list": nn.Sequential(nn.ReLU(), nn.ReLU()), "one": nn.Linear(2, 2)})) == {}


def test_a_model_inside_the_model_names_its_blocks():
    class Named(TinyLM):
        _no_split_modules = ("Block",)

    longer = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    wrapper = nn.ModuleDict({"net": Named(layers=2), "longer": longer})
    assert list(find_blocks(wrapper)) == ["net.blocks.1", "net.blocks.0"]


def test_a_named_block_that_is_tied_to_the_root_is_left_out():
    """As the embeddings of BERT, which `transformers` names among its blocks."""

    class Named(TinyLM):
        _no_split_modules = ("Block", "Embedding")

    assert list(find_blocks(Named(layers=2))) == ["blocks.1", "blocks.0"]
    with pytest.raises(
        ValueError, match=r"'embed.weight' .* and 'head.weight' .* are one tied parameter in two parameter groups"
    ):
        find_blocks(Named(layers=2), ["Block", "Embedding"])


def test_classes_and_names_are_both_taken():
    model = TinyLM(layers=3)
    assert find_blocks(model, [Block]) == find_blocks(model, ["Block"]) == find_blocks(model)


def test_block_classes_may_be_empty():
    assert find_blocks(nn.Linear(2, 2), []) == {}


def test_inner_blocks_come_before_outer_ones():
    model = nn.Sequential(nn.Sequential(Block(2)))
    order = list(find_blocks(model, ["Block", "Linear"]))
    assert order.index("0.0.up") < order.index("0.0")


def test_a_compiled_block_counts_as_its_class():
    model = TinyLM(layers=2)
    model.blocks[0] = torch.compile(model.blocks[0])
    assert set(find_blocks(model, [Block])) == {"blocks.0", "blocks.1"}


def test_a_missing_class_is_named_with_the_classes_present():
    message = "block_classes: TinyLM has no Blok; its module classes are Linear (7), Block (3), Embedding (1)"
    with pytest.raises(ValueError, match=re.escape(message)):
        find_blocks(TinyLM(layers=3), ["Blok"])


def test_parameters_tied_inside_the_root_or_inside_a_block_are_fine():
    model = TinyLM(layers=3)
    model.blocks[0].up = model.blocks[0].down
    assert len(find_blocks(model)) == 3


def test_a_parameter_group_has_all_its_modules_children_first():
    model = TinyLM(layers=1)
    modules = list(group_modules(model, []))
    assert modules[-1] is model
    assert set(modules) == set(model.modules())


def test_a_block_is_not_in_the_parameter_group_around_it():
    model = TinyLM(layers=2)
    assert set(group_modules(model, list(model.blocks))) == {model, model.embed, model.blocks, model.norm, model.head}


def test_a_class_finds_its_subclasses_and_need_not_be_in_a_list():
    class Special(Block):
        pass

    model = nn.Sequential(Special(2), Block(2))
    assert set(find_blocks(model, Block)) == {"0", "1"}
    assert set(find_blocks(model, ["Block"])) == {"1"}


def test_a_second_name_of_a_module_in_a_block_is_not_in_the_parameter_group_of_the_root():
    model = TinyLM(layers=3)
    model.extra = model.blocks[0].up
    assert len(blocks := find_blocks(model)) == 3
    assert model.extra not in set(group_modules(model, blocks.values()))


def test_a_module_in_two_parameter_groups_is_rejected():
    model = TinyLM(layers=3)
    model.blocks[1].up = model.blocks[0].up
    with pytest.raises(ValueError, match="are one tied parameter in two parameter groups"):
        find_blocks(model)


def test_a_block_that_is_listed_twice_is_one_block():
    model = TinyLM(layers=2)
    model.blocks.append(model.blocks[0])
    assert len(find_blocks(model, [Block])) == 2


def test_parameters_that_cannot_be_reduced_together_are_rejected():
    model = TinyLM(layers=2)
    model.blocks[0].down.to(torch.bfloat16)
    message = (
        "parameters 'blocks.0.up.weight' (torch.float32) and 'blocks.0.down.weight' (torch.bfloat16) are in one "
        "parameter group, blocks.0, whose gradients are reduced together; give them one dtype, or separate groups by "
        "block_classes"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        find_blocks(model)
    model.blocks[0].down.requires_grad_(False)
    assert len(find_blocks(model)) == 2


def test_a_parameter_without_dimensions_is_rejected():
    model = TinyLM(layers=3)
    model.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="parameter 'temperature' has no dimension to shard"):
        find_blocks(model)


def test_a_model_without_parameters_is_rejected():
    with pytest.raises(TypeError, match="ReLU has no parameters, so there is nothing to shard"):
        find_blocks(nn.ReLU())
