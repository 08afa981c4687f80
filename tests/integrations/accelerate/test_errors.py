"""``Accelerator(fsdp_plugin=MiCSPlugin())``: error messages."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, ParallelismConfig
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_mics.integrations import accelerate as mics_accelerate
from lightning_mics.integrations.accelerate import MiCSPlugin
from lightning_mics.sharding.sharded import sharded
from tests.support.accelerators import plugin_of, start
from tests.support.loops import network, sgd
from tests.support.loops import start as start_fabric
from tests.support.trainers import cases_on_ranks

Seen = dict[Any, list[Any]]

HALF = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)
BUCKETS = DistributedDataParallelKwargs(bucket_cap_mb=1)


def sharded_by_others() -> nn.Module:
    model = network()
    fully_shard(model)
    return model


def refused(case: str) -> str:
    cases: dict[str, Callable[[], Any]] = {
        "a model sharded by FSDP2": lambda: start().prepare(model := sharded_by_others(), sgd(model)),
        "a model of Fabric": lambda: start().prepare(
            model := start_fabric().setup_module(network())._forward_module, sgd(model)
        ),
        "a model alone": lambda: start().prepare(network()),
        "a partition size that is none": lambda: start(plugin={"partition_size": 3}).prepare(
            model := network(), sgd(model)
        ),
        "a parallelism_config": lambda: start(parallelism_config=ParallelismConfig(dp_shard_size=4)),
        "a model on the meta device": lambda: start().prepare(model := network().to("meta"), sgd(model)),
        "a communication hook": lambda: start(kwargs_handlers=[HALF]).prepare(model := network(), sgd(model)),
        "no communication hook": lambda: start(kwargs_handlers=[BUCKETS]).prepare(model := network(), sgd(model)),
        "another plugin": lambda: (
            start(),
            Accelerator(cpu=True, fsdp_plugin=MiCSPlugin(partition_size=4)),
        ),
        "float16": lambda: start(mixed_precision="fp16").prepare(model := network(), sgd(model)),
        "nothing prepared": lambda: plugin_of(accelerator := start()).save_checkpoint(accelerator, "c"),
        "a plain model": lambda: sharded(network()),
    }
    try:
        cases[case]()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


CASES = [
    ("a model sharded by FSDP2", "ValueError: the model is sharded already, and not by this plugin"),
    ("a model of Fabric", "ValueError: the model is sharded already, and not by this plugin"),
    ("a model alone", "ValueError: When using FSDP2, a model and optimizer must be passed together"),
    ("a partition size that is none", "ValueError: partition_size=3"),
    ("a parallelism_config", "ValueError: .*parallelism_config"),
    ("a model on the meta device", "ValueError: the model is on the meta device"),
    ("a communication hook", "ValueError: DistributedDataParallelKwargs.* has no effect .*inter_node_reduce_dtype"),
    ("no communication hook", "no error"),
    ("another plugin", "ValueError: another Accelerator exists already, and all share its plugin"),
    ("float16", "ValueError: mixed_precision='fp16' is for GPUs: on CPUs Accelerate neither computes in float16"),
    ("nothing prepared", "ValueError: the Accelerator has prepared 0 models with a MiCSPlugin"),
    ("a plain model", "ValueError: OneBlock is not sharded, nor is a module in it: .* fsdp_plugin=MiCSPlugin"),
]


@pytest.fixture(scope="module")
def seen() -> Seen:
    """Error messages of each of four ranks, by case; all cases run in one set of processes."""
    return cases_on_ranks({case: partial(refused, case) for case, _ in CASES})


@pytest.mark.parametrize(("case", "message"), CASES)
def test_wrong_use_gets_a_clear_error(case: str, message: str, seen: Seen) -> None:
    for said in seen[case]:
        assert re.match(message, said), said


def test_a_single_process_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    try:
        with pytest.raises(ValueError, match=r"shards over several ranks, and this job is DistributedType\.NO"):
            start()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
            os.environ.pop(name, None)


def test_invalid_options_are_rejected_by_the_constructor() -> None:
    with pytest.raises(TypeError, match="no option 'partition_sise'; did you mean 'partition_size'"):
        MiCSPlugin(partition_sise=2)
    with pytest.raises(ValueError, match="cache_parameters"):
        MiCSPlugin(cache_parameters="sometimes")
    with pytest.raises(ValueError, match='state_dict_type=\'FULL_STATE_DICT\' is neither "sharded" nor "full"'):
        MiCSPlugin(state_dict_type="FULL_STATE_DICT")


@pytest.mark.parametrize(
    ("version", "message"),
    [("1.14.0", "needs accelerate >= 1.15, this is 1.14.0"), ("1.99.0", "does not prepare models as 1.15 does")],
)
def test_an_accelerate_that_is_too_old_or_too_new_is_rejected(
    version: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerate, "__version__", version)
    monkeypatch.delattr("accelerate.accelerator.fsdp2_prepare_model")
    source = Path(mics_accelerate.__file__).read_text()
    with pytest.raises(ImportError, match=message):
        exec(compile(source, mics_accelerate.__file__, "exec"), {"__name__": "a second one", "__package__": ""})
