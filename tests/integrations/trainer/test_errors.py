"""Bad input raises the same error on every rank, with a remedy, fast, and before ranks communicate."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from lightning_mics import (
    CommunicationOptions,
    MiCSFabricStrategy,
    MiCSStrategy,
    Topology,
    create_partition_groups,
    shard_model,
)
from tests.support.models import TinyLM, TinyModule
from tests.support.recorded import RecordCollectives
from tests.support.trainers import loader, make_trainer, mics, on_ranks


class AlreadySharded(TinyModule):
    def configure_model(self) -> None:
        fully_shard(self.net.blocks[0], mesh=init_device_mesh("cpu", (4,)))


class WrappedInFSDP1(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.net.norm = _fsdp1(self.net.norm)


class TiedAcrossBlocks(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.net.blocks[1].up.weight = self.net.blocks[0].up.weight


class NotInitializable(TinyModule):
    def configure_model(self) -> None:
        self.net = TinyLM()
        self.net.blocks[0].offset = nn.Parameter(torch.empty(3, device="meta"))


def _fsdp1(module: nn.Module) -> nn.Module:
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its constructor rejects CPUs
    nn.Module.__init__(wrapped)
    wrapped.inner = module
    return wrapped


CASES: dict[str, tuple[type[TinyModule], dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "partition size that does not divide": (
        TinyModule, {"partition_size": 3}, {}, ValueError,
        "partition_size=3 does not divide world_size=4; with 2 ranks per node use one of 1, 2, 4",
    ),
    "partition size of the wrong kind": (
        TinyModule, {"partition_size": 2.0}, {}, TypeError, "partition_size must be an integer, got 2.0 (float)",
    ),
    "unequal nodes": (
        TinyModule, {"ranks_per_node": 3}, {}, ValueError,
        "ranks_per_node=3 does not divide world_size=4: every node needs the same number of ranks; "
        "with 4 ranks use one of 1, 2, 4",
    ),
    "hierarchical with one node per group": (
        TinyModule, {"partition_size": 2, "hierarchical": True}, {}, ValueError,
        "hierarchical=True needs partition groups over several nodes, but partition_size=2 fits one node of 2 ranks; "
        "use hierarchical='auto'",
    ),
    "sums once per step with flat collectives": (
        TinyModule, {"partition_size": 4, "hierarchical": False, "accumulate_gradients": "node"}, {}, ValueError,
        "accumulate_gradients='node' needs a separate inter-node stage of collectives, but "
        'hierarchical=False and partition_size=4 spans 2 nodes; use hierarchical="auto"',
    ),
    "a dtype on the wire with flat collectives": (
        TinyModule, {"partition_size": 4, "hierarchical": False, "inter_node_reduce_dtype": "bfloat16"}, {}, ValueError,
        "inter_node_reduce_dtype=torch.bfloat16 needs a separate inter-node stage of collectives",
    ),
    "blocks that are not there": (
        TinyModule, {"block_classes": ["GPT2Block"]}, {}, ValueError,
        "block_classes: TinyModule has no GPT2Block; its module classes are Linear (5), Block (2)",
    ),
    "blocks of the wrong kind": (
        TinyModule, {"block_classes": [3]}, {}, TypeError,
        "block_classes takes module classes or their names, got 3",
    ),
    "checkpointed modules that are not there": (
        TinyModule, {"activation_checkpointing": ["MLP"]}, {}, ValueError,
        "activation_checkpointing: TinyModule has no MLP",
    ),
    "already sharded": (
        AlreadySharded, {}, {}, TypeError,
        "module 'net.blocks.0' (FSDPBlock) is already wrapped or sharded; pass the original module",
    ),
    "wrapped in FSDP1": (
        WrappedInFSDP1, {}, {}, TypeError,
        "module 'net.norm' (FullyShardedDataParallel) is already wrapped or sharded; pass the original module",
    ),
    "tied across blocks": (
        TiedAcrossBlocks, {}, {}, ValueError,
        "parameters 'net.blocks.0.up.weight' (in net.blocks.0) and 'net.blocks.1.up.weight' (in net.blocks.1) are one "
        "tied parameter in two parameter groups; choose block_classes so that one group holds both",
    ),
    "backend that cannot serve the device": (
        TinyModule, {"process_group_backend": "nccl"}, {}, ValueError,
        "process_group_backend='nccl' cannot serve CPU devices; use 'gloo' or None",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What each rank saw for each case: (exception type, message, seconds, kinds of collectives before it)."""
    return on_ranks(_run_into_all_errors, tmp_path_factory.mktemp("errors"))


def _run_into_all_errors(folder: Any) -> dict[str, tuple[str, str, float, set[str]]]:
    seen = {}
    for name, (module_class, strategy_options, trainer_options, _, _) in CASES.items():
        trainer = make_trainer(folder, strategy=mics(**strategy_options), **trainer_options)
        module = module_class()
        start = time.monotonic()
        try:
            with RecordCollectives() as recorded:
                trainer.fit(module, loader())
        except Exception as error:
            kinds = {collective.kind for collective in recorded.seen}
            seen[name] = (type(error).__name__, str(error), time.monotonic() - start, kinds)
    return seen


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_raise_the_same_error_within_seconds(refusals, name):
    *_, exception, message = CASES[name]
    for seen in refusals:
        kind, text, seconds, collectives = seen[name]
        assert (kind, text[: len(message)]) == (exception.__name__, message)
        assert text == refusals[0][name][1]
        assert seconds < 10
        assert collectives <= {"barrier", "broadcast"}  # Lightning's own: it agrees on paths before the strategy starts


def test_a_tensor_that_nothing_initializes_is_named(tmp_path):
    for kind, message in on_ranks(_fit_not_initializable, tmp_path):
        assert kind == "TypeError"
        assert message.startswith(
            "nothing initializes Block.offset, which was on the meta device: give the class a `reset_parameters()`"
        )


def _fit_not_initializable(folder: Any) -> tuple[str, str]:
    try:
        make_trainer(folder).fit(NotInitializable(), loader())
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError("was not refused")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition_size": "two"}, "partition_size='two' is neither \"auto\" nor a number of ranks"),
        ({"hierarchical": "yes"}, "hierarchical='yes' is not one of \"auto\", True, False"),
        (
            {"cache_parameters": "shard"},
            "cache_parameters='shard' is neither one of 'auto', 'never', 'node', 'rank' nor a share",
        ),
        (
            {"accumulate_gradients": True},
            "accumulate_gradients=True is neither one of 'auto', 'shard', 'node', 'rank' nor a share",
        ),
        ({"two_hop": "no"}, "two_hop='no' is neither True nor False"),
        (
            {"two_hop": False, "accumulate_gradients": "node"},
            "two_hop=False reduces over replicas in every micro-step, but accumulate_gradients='node' accumulates "
            "them until the boundary; use accumulate_gradients='shard', or two_hop=True",
        ),
        ({"two_hop": False, "accumulate_gradients": "rank"}, "but accumulate_gradients='rank' accumulates them"),
        (
            {"inter_node_reduce_dtype": "int8"},
            "inter_node_reduce_dtype='int8' is not one of torch.float32, torch.bfloat16",
        ),
        ({"reduce_dtype": "int8"}, "reduce_dtype='int8' is not one of torch.float32, torch.bfloat16"),
        ({"reduce_dtype": torch.float16}, "reduce_dtype=torch.float16 is not one of torch.float32, torch.bfloat16"),
    ],
)
def test_unknown_values_are_rejected_when_the_strategy_is_made(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MiCSStrategy(**options)


def test_an_unknown_option_is_rejected():
    with pytest.raises(TypeError, match=r"MiCSStrategy has no option 'color'; it takes .*partition_size.*two_hop"):
        MiCSStrategy(color="blue")


@pytest.mark.parametrize(
    ("misspelt", "right"),
    [("partiton_size", "partition_size"), ("accumulate_gradient", "accumulate_gradients"), ("time_out", "timeout")],
)
@pytest.mark.parametrize("strategy", [MiCSStrategy, MiCSFabricStrategy])
def test_a_misspelled_option_is_rejected_with_the_right_spelling(strategy, misspelt, right):
    message = f"{strategy.__name__} has no option {misspelt!r}; did you mean {right!r}?"
    with pytest.raises(TypeError, match=re.escape(message)):
        strategy(**{misspelt: 8})


@pytest.mark.parametrize("communication", [CommunicationOptions.AUTO, CommunicationOptions(cache_parameters="auto")])
def test_a_model_is_not_sharded_by_options_that_are_left_to_a_policy(communication):
    for message in on_ranks(_shard_with, communication, "auto", world_size=2):
        assert message == (
            "cache_parameters='auto' is for policies, which know the model's size; use one of 'never', 'node', 'rank'"
        )


@pytest.mark.parametrize("hierarchical", [False, True])
def test_groups_and_options_that_contradict_each_other_are_rejected(hierarchical):
    communication = CommunicationOptions(hierarchical=not hierarchical)
    for message in on_ranks(_shard_with, communication, hierarchical):
        assert message == (
            f"hierarchical={not hierarchical}, but the partition groups were made with hierarchical={hierarchical}; "
            "give both the same value"
        )


def _shard_with(communication: CommunicationOptions, hierarchical: Any) -> str:
    world_size = dist.get_world_size()
    topology = Topology(world_size=world_size, ranks_per_node=world_size // 2, partition_size=world_size)
    groups = create_partition_groups(topology, device_type="cpu", hierarchical=hierarchical)
    with pytest.raises(ValueError, match="=") as caught:
        shard_model(TinyLM(), groups, communication=communication)
    return str(caught.value)


def test_positional_options_are_rejected():
    with pytest.raises(TypeError, match="positional"):
        MiCSStrategy(8)


def test_groups_need_a_running_job():
    with pytest.raises(RuntimeError, match="init_process_group before create_partition_groups"):
        create_partition_groups(Topology(world_size=2, ranks_per_node=2, partition_size=2), device_type="cpu")


def test_ranks_that_made_different_numbers_of_groups_are_rejected_without_waiting():
    for message in on_ranks(_group_of_some_ranks, world_size=4):
        assert message.startswith("some ranks are members of 3 process groups and others of 2; make groups of your own")


def _group_of_some_ranks() -> str:
    dist.new_group([0, 1])
    with pytest.raises(RuntimeError, match="process groups") as caught:
        create_partition_groups(Topology(world_size=4, ranks_per_node=2, partition_size=2), device_type="cpu")
    return str(caught.value)


def test_groups_of_another_job_or_device_are_rejected():
    for messages in on_ranks(_misuse_groups, world_size=2):
        assert messages[0] == "the topology has world_size=4, the running job has 2 ranks"
        assert messages[1].startswith("the process group's backend (cpu:gloo")
        assert "cannot serve device type 'xla'; use gloo for CPU and nccl for CUDA" in messages[1]
        assert "already wrapped or sharded" in messages[2]


def _misuse_groups() -> list[str]:
    messages = []
    two = Topology(world_size=2, ranks_per_node=2, partition_size=2)
    for topology, device_type in ((Topology(world_size=4, ranks_per_node=2, partition_size=2), "cpu"), (two, "xla")):
        with pytest.raises(ValueError, match=" ") as caught:
            create_partition_groups(topology, device_type=device_type)
        messages.append(str(caught.value))
    model, groups = TinyLM(), create_partition_groups(two, device_type="cpu")
    shard_model(model, groups)
    with pytest.raises(TypeError, match=" ") as caught:
        shard_model(model, groups)
    return [*messages, str(caught.value)]
