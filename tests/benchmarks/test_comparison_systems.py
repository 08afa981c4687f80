from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from benchmarks.comparison.environments import environment_names, environment_of, make_environment
from benchmarks.comparison.systems import SYSTEMS, partition_nodes, resolve, systems_for


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_name_has_a_module_that_trains(name: str) -> None:
    spec = importlib.util.find_spec(resolve(name).module)  # not imported: its packages may be in another environment
    assert spec is not None and spec.origin is not None
    defined = ast.parse(Path(spec.origin).read_text()).body
    train = next(node for node in defined if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert [argument.arg for argument in train.args.args] == ["setting", "job"]


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_has_an_environment(name: str) -> None:
    assert environment_of(name) in environment_names()


def test_two_nodes_count_where_they_are_neither_one_node_nor_all() -> None:
    assert "mics-once-per-step@two-nodes" in systems_for(nodes=4)
    for nodes in (2, 3):
        assert not [name for name in systems_for(nodes=nodes) if name.endswith("@two-nodes")]
    assert "mics-once-per-step@world" in systems_for(nodes=2)


def test_a_setting_says_how_far_a_partition_group_reaches() -> None:
    reaches = ("flat@node", "flat@two-nodes", "flat@world")
    assert [partition_nodes(setting, nodes=4) for setting in reaches] == [1, 2, 4]


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no system is called 'dpp'; there are ddp, fsdp2-full"):
        resolve("dpp")
    with pytest.raises(ValueError, match="'flat' must end in @node, @two-nodes or @world"):
        partition_nodes("flat", nodes=2)
    with pytest.raises(ValueError, match="needs a multiple of 2 nodes, but there are 3"):
        partition_nodes("flat@two-nodes", nodes=3)
    with pytest.raises(ValueError, match="no environment is called 'apex'; there are accelerate"):
        make_environment("apex")
