"""The table of [Note: Hooks on the root, in order] against the hooks that are there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from lightning.pytorch import Callback
from torch import nn

from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from lightning_mics.integrations.accelerate import MiCSPlugin
from lightning_mics.sharding import schedule
from tests.support.forked import run_ranks
from tests.support.loops import network, sgd, start
from tests.support.models import Stack, TinyModule, loader_of_tokens
from tests.support.trainers import make_trainer, mics, on_ranks

Model = TypeVar("Model", bound=nn.Module)


FETCHED = "_begin_forward"


TOPOLOGY = Topology(world_size=2, ranks_per_node=2, partition_size=2)


PAPER, CACHED = CommunicationOptions.PAPER, CommunicationOptions(cache_parameters="rank")


def table() -> list[str]:
    """The first column: names of hooks, and "the user's"."""
    assert schedule.__doc__ is not None
    note = schedule.__doc__.split("[Note: Hooks on the root, in order]")[1]
    rows = re.findall(r"^    (\S.*?)  +", note, flags=re.MULTILINE)
    assert rows[0] == "hook"
    return [row.strip("()") for row in rows[1:]]


def hooks(root: nn.Module) -> list[str]:
    return [hook.__name__ for hook in root._forward_pre_hooks.values()]


def hooked_by_the_user(model: Model) -> Model:
    def hook(_module: nn.Module, _inputs: Any) -> None:
        return None

    hook.__name__ = "the user's"
    model.register_forward_pre_hook(hook)
    return model


def on_a_plain_model() -> dict[str, list[str]]:
    found = {}
    over_nodes = Topology(world_size=2, ranks_per_node=1, partition_size=2)
    ahead = replace(CACHED, inter_node_prefetch=1)
    for name, topology, options in (
        ("not cached", TOPOLOGY, PAPER),
        ("cached", TOPOLOGY, CACHED),
        ("fetched ahead", over_nodes, ahead),
    ):
        model = hooked_by_the_user(Stack())
        shard_model(model, create_partition_groups(topology, device_type="cpu"), communication=options)
        found[name] = hooks(hooked_by_the_user(model))
        found["block"] = hooks(model.layers[0])
    return found


def under_fabric() -> list[str]:
    model = hooked_by_the_user(network())
    start(devices=2, **CACHED.keywords()).setup_module(model)
    return hooks(hooked_by_the_user(model))


def under_accelerate() -> list[str]:
    model = hooked_by_the_user(network())
    accelerator = Accelerator(cpu=True, fsdp_plugin=MiCSPlugin(partition_size=2, ranks_per_node=2, **CACHED.keywords()))
    accelerator.prepare(model, sgd(model))
    return hooks(hooked_by_the_user(model))


class NoteHooks(Callback):
    def on_train_batch_end(self, _trainer: Any, module: Any, *_: Any) -> None:
        self.found = hooks(module)


def under_the_trainer(folder: Path) -> list[str]:
    note = NoteHooks()
    strategy = mics(partition_size=2, **CACHED.keywords())
    trainer = make_trainer(folder, strategy=strategy, devices=2, callbacks=[note], max_steps=1, max_epochs=-1)
    trainer.fit(hooked_by_the_user(TinyModule()), loader_of_tokens())
    return note.found


def test_the_table_lists_the_hooks_of_a_model_under_fabric_in_their_order():
    assert on_ranks(under_fabric, world_size=2) == [[row for row in table() if row != FETCHED]] * 2
    assert len(table()) == 9


def test_the_table_lists_the_hooks_of_a_model_under_accelerate():
    expected = [row for row in table() if row not in ("_note_forward", FETCHED)]
    assert on_ranks(under_accelerate, world_size=2) == [expected] * 2


def test_the_table_lists_the_hooks_of_a_model_in_the_trainer(tmp_path):
    expected = [row for row in table() if row not in ("enter", "_note_forward", FETCHED)][
        :-1
    ]  # the user has hooked it once
    assert on_ranks(under_the_trainer, tmp_path, world_size=2) == [expected] * 2


def test_the_table_lists_the_hooks_of_a_model_in_a_custom_loop():
    for found in run_ranks(2, on_a_plain_model):
        expected = [row for row in table() if row not in ("enter", "_note_forward", "_before_forward")]  # no buffers
        assert found["fetched ahead"] == expected
        assert found["cached"] == [row for row in expected if row != FETCHED]
        assert found["not cached"] == [row for row in expected if row not in ("_drop_cached_weights", FETCHED)]
        assert found["block"] == ["_pre_forward", "_defer_reductions"]
