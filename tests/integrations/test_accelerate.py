"""``Accelerator(fsdp_plugin=MiCSPlugin())``: preparing, accumulation, clipping, checkpoints, launching, refusals."""

from __future__ import annotations

import gc
import math
import os
import re
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    GradientAccumulationPlugin,
    ParallelismConfig,
    broadcast_object_list,
    merge_fsdp_weights,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from lightning_mics import CommunicationOptions
from lightning_mics.integrations import accelerate as mics_accelerate
from lightning_mics.integrations.accelerate import MiCSPlugin
from lightning_mics.sharding.sharded import sharded
from tests.support.loops import adam, alone, assert_same, network, sgd, two_batches_then_one, weights
from tests.support.loops import start as start_fabric
from tests.support.models import VOCAB, TinyModule, tokens
from tests.support.networks import GPT
from tests.support.trainers import loader, make_trainer, mics, on_ranks


def start(*, plugin: dict[str, Any] | None = None, **options: Any) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    communication = CommunicationOptions.NODE.keywords()
    policy = {"ranks_per_node": 2, "partition_size": 2, **communication, **(plugin or {})}
    return Accelerator(**{"cpu": True, "fsdp_plugin": MiCSPlugin(**policy), **options})


def prepared(accelerator: Accelerator, make_optimizer: Callable[[nn.Module], Any] = sgd, seed: int = 1) -> Any:
    model = network(seed)
    return accelerator.prepare(model, make_optimizer(model))


def plugin_of(accelerator: Accelerator) -> MiCSPlugin:
    return accelerator.state.fsdp_plugin


def step(accelerator: Accelerator, model: Any, optimizer: Any, *, seed: int = 0) -> None:
    accelerator.backward(model(tokens(2, seed=10 * seed + accelerator.process_index)))
    optimizer.step()
    optimizer.zero_grad()


# -- preparing ---------------------------------------------------------------------------------------------------------


def handles() -> list[bool]:
    accelerator = start()
    model, _ = prepared(accelerator)
    around = nn.ModuleDict({"student": model, "teacher": network()})
    return [sharded(each) is vars(model)["_mics"] for each in (model, torch.compile(model), around)]


def test_the_handle_of_a_model_is_found_from_what_is_around_it() -> None:
    assert on_ranks(handles) == [[True] * 3] * 4


def train() -> dict[str, Tensor]:
    accelerator = start()
    assert accelerator.is_fsdp2
    model, optimizer = prepared(accelerator)
    assert sharded(model).groups.topology.partition_size == 2
    for index in range(2):
        step(accelerator, model, optimizer, seed=index)
    return weights(model)


def test_it_trains_as_one_process() -> None:
    for trained in on_ranks(train):
        assert_same(trained, alone(steps=2), 1e-6)


def data_of_ranks() -> list[int]:
    accelerator = start()
    data = accelerator.prepare(DataLoader(list(range(8)), batch_size=1))
    gathered = accelerator.gather(torch.cat(list(data)))
    assert sorted(gathered.tolist()) == list(range(8))
    return [int(value) for value in data]


def test_each_rank_has_data_of_its_own() -> None:
    seen = on_ranks(data_of_ranks)
    assert len({value for of_rank in seen for value in of_rank}) == 8


def without_our_plugin() -> tuple[bool, str]:
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    accelerator = Accelerator(cpu=True)
    model, _ = prepared(accelerator)
    return "_mics" in vars(model), str(accelerator.distributed_type)


def test_other_plugins_get_what_accelerate_does() -> None:
    assert on_ranks(without_our_plugin, world_size=2) == [(False, "DistributedType.MULTI_CPU")] * 2


def bfloat16() -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    accelerator = start(mixed_precision="bf16")
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT).to(torch.bfloat16)
    model, optimizer = accelerator.prepare(model, adam(model))
    computed: list[torch.dtype] = []
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *seen: computed.append(seen[-1].dtype))
    before = weights(model)
    loss = model(tokens(2), labels=tokens(2)).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert any(not value.equal(before[name]) for name, value in weights(model).items())
    assert type(accelerator.unwrap_model(model, keep_fp32_wrapper=False).forward).__name__ == "method"
    return next(model.parameters()).dtype, computed[0], loss.dtype


def test_mixed_precision_keeps_weights_in_float32_and_computes_in_bfloat16() -> None:
    assert on_ranks(bfloat16) == [(torch.float32, torch.bfloat16, torch.float32)] * 4


# -- steps -------------------------------------------------------------------------------------------------------------


def accumulate_by_hand() -> dict[str, Tensor]:
    accelerator = start()
    model, optimizer = prepared(accelerator)
    for index in range(2):
        with accelerator.no_sync(model):
            accelerator.backward(model(tokens(2, seed=10 * index + accelerator.process_index)) / 3)
        assert all(parameter.grad is None for parameter in model.parameters())
    accelerator.backward(model(tokens(2, seed=20 + accelerator.process_index)) / 3)
    optimizer.step()
    optimizer.zero_grad()
    step(accelerator, model, optimizer)  # what follows is in sync again
    return weights(model)


def test_no_sync_waits_for_the_boundary_and_is_over_after_it() -> None:
    model = network()
    optimizer = sgd(model)
    for index in range(3):
        (sum(model(tokens(2, seed=10 * index + rank)) for rank in range(4)) / 12).backward()
    optimizer.step()
    optimizer.zero_grad()
    (sum(model(tokens(2, seed=rank)) for rank in range(4)) / 4).backward()
    optimizer.step()
    for trained in on_ranks(accumulate_by_hand):
        assert_same(trained, dict(model.state_dict()), 1e-6)


def several_forwards_first() -> dict[str, Tensor]:
    accelerator = start()
    model, optimizer = prepared(accelerator)
    with accelerator.no_sync(model):
        losses = [model(tokens(2, seed=10 * index + accelerator.process_index)) / 2 for index in range(2)]
    accelerator.backward(losses[0])
    with accelerator.trigger_sync_in_backward(model):
        accelerator.backward(losses[1])
    optimizer.step()
    optimizer.zero_grad()
    step(accelerator, model, optimizer)
    return weights(model)


def test_backwards_may_come_after_several_forwards() -> None:
    for trained in on_ranks(several_forwards_first):
        assert_same(trained, two_batches_then_one(), 1e-6)


def start_over(how: str) -> dict[str, Tensor]:
    accelerator = start()
    model, optimizer = prepared(accelerator)
    folder = broadcast_object_list([tempfile.mkdtemp()])[0]
    plugin_of(accelerator).save_checkpoint(accelerator, f"{folder}/ours")
    accelerator.save_state(f"{folder}/state")
    with accelerator.no_sync(model):
        accelerator.backward(model(tokens(2, seed=70 + accelerator.process_index)))
    if how == "zero_grad":
        optimizer.zero_grad()
    elif how == "load_checkpoint":
        plugin_of(accelerator).load_checkpoint(accelerator, f"{folder}/ours")
    else:
        accelerator.load_state(f"{folder}/state")
    with accelerator.no_sync(model):
        accelerator.backward(model(tokens(2, seed=accelerator.process_index)) / 2)
    plugin_of(accelerator).save_checkpoint(accelerator, f"{folder}/inside")
    accelerator.save_state(f"{folder}/inside state")
    accelerator.backward(model(tokens(2, seed=10 + accelerator.process_index)) / 2)
    model(tokens(2))  # with gradients, and nothing follows
    optimizer.step()
    optimizer.zero_grad()
    step(accelerator, model, optimizer)
    return weights(model)


@pytest.mark.parametrize("how", ["zero_grad", "load_checkpoint", "load_state"])
def test_a_window_starts_over_and_may_be_saved_in(how: str) -> None:
    for trained in on_ranks(start_over, how):
        assert_same(trained, two_batches_then_one(), 1e-6)


def every_micro_step_a_boundary(plugin: dict[str, Any]) -> dict[str, Tensor]:
    accumulation = GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)
    accelerator = start(plugin=plugin, gradient_accumulation_plugin=accumulation)
    model, optimizer = prepared(accelerator)
    for index in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(tokens(2, seed=10 * index + accelerator.process_index)))
            optimizer.step()
            optimizer.zero_grad()
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(tokens(2, seed=accelerator.process_index)))
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize("plugin", [{}, {"partition_size": 4, "cache_parameters": "never"}])
def test_every_micro_step_may_synchronize(plugin: dict[str, Any]) -> None:
    for trained in on_ranks(every_micro_step_a_boundary, plugin):
        assert_same(trained, two_batches_then_one(), 1e-6)


def prepare_again() -> tuple[bool, int, bool]:
    accelerator = start(gradient_accumulation_steps=2)
    model, optimizer = prepared(accelerator)
    again, _, nothing = accelerator.prepare(model, optimizer, None)
    accelerator.gradient_accumulation_steps = 1  # in the middle of a run
    step(accelerator, again, optimizer)
    second = Accelerator(cpu=True)  # as the Trainer of transformers makes one
    assert isinstance(second.state.fsdp_plugin, MiCSPlugin) and second.is_fsdp2
    return again is model, len({id(known) for known in accelerator._models}), nothing is None


def test_a_prepared_model_stays_what_it_is_and_a_second_accelerator_shares_the_plugin() -> None:
    assert on_ranks(prepare_again) == [(True, 1, True)] * 4


def compiled() -> dict[str, Tensor]:
    accelerator = start()
    model = torch.compile(network(), backend="aot_eager")
    model, optimizer = accelerator.prepare(model, sgd(model))
    step(accelerator, model, optimizer)
    return {name.removeprefix("_orig_mod."): value for name, value in weights(model).items()}


def test_a_compiled_model_trains() -> None:
    for trained in on_ranks(compiled):
        assert_same(trained, alone(), 1e-6)


def accumulate_to_the_end_of_data() -> tuple[int, list[bool]]:
    accelerator = start(gradient_accumulation_steps=4)
    model, optimizer = prepared(accelerator)
    data = accelerator.prepare(DataLoader(tokens(24), batch_size=1))
    steps, boundaries = 0, []
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch))
            boundaries.append(all(parameter.grad is not None for parameter in model.parameters()))
            assert accelerator.sync_gradients == boundaries[-1]
            steps += accelerator.sync_gradients
            optimizer.step()
            optimizer.zero_grad()
    return steps, boundaries


def test_the_end_of_the_data_is_a_boundary() -> None:
    assert on_ranks(accumulate_to_the_end_of_data) == [(2, [False] * 3 + [True] + [False] + [True])] * 4


def clip(by_value: bool) -> tuple[Any, dict[str, Tensor]]:
    accelerator = start()
    model, optimizer = prepared(accelerator)
    accelerator.backward(model(tokens(2, seed=accelerator.process_index)))
    norm = None
    if by_value:  # Accelerate's own refuses FSDP of any kind
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    else:
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    return norm.full_tensor() if isinstance(norm, DTensor) else norm, weights(model)


def test_gradients_are_clipped_by_their_norm_over_all_shards() -> None:
    norms: list[Tensor] = []
    expected = alone(change=lambda model: norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01)))
    for norm, clipped in on_ranks(clip, False):
        torch.testing.assert_close(norm, norms[0], rtol=0, atol=1e-6)
        assert_same(clipped, expected, 1e-6)


def test_gradients_are_clipped_by_value() -> None:
    expected = alone(change=lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-3))
    for _, clipped in on_ranks(clip, True):
        assert_same(clipped, expected, 1e-6)


def evaluate_then_train(mode: Callable[[], Any]) -> dict[str, Tensor]:
    accelerator = start()
    model, optimizer = prepared(accelerator)
    with mode():
        model(tokens(2))
    step(accelerator, model, optimizer)
    with mode():
        model(tokens(2))
    step(accelerator, model, optimizer, seed=1)
    return weights(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_in_any_mode_leaves_a_model_that_trains(mode: Callable[[], Any]) -> None:
    for trained in on_ranks(evaluate_then_train, mode):
        assert_same(trained, alone(steps=2), 1e-6)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def save_state(folder: Path, plugin: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    accelerator = start(plugin=plugin)
    model, optimizer = prepared(accelerator, adam)
    step(accelerator, model, optimizer)
    saved = weights(model)
    accelerator.save_state(str(folder))
    step(accelerator, model, optimizer, seed=1)
    return saved, weights(model)


def load_state(folder: Path, plugin: dict[str, Any], devices: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    accelerator = start(plugin=plugin)
    model, optimizer = prepared(accelerator, adam, seed=5)
    accelerator.load_state(str(folder))
    loaded = weights(model)
    if devices == 4:
        step(accelerator, model, optimizer, seed=1)
    return loaded, weights(model)


@pytest.mark.parametrize(
    ("saving", "devices", "loading"),
    [
        ({}, 4, {}),
        ({}, 4, {"partition_size": 4}),
        ({"partition_size": 4}, 2, {}),
        ({"state_dict_type": "full"}, 4, {"state_dict_type": "full"}),
    ],
)
def test_load_state_goes_on_from_save_state(
    saving: dict[str, Any], devices: int, loading: dict[str, Any], tmp_path: Path
) -> None:
    saved, went_on = on_ranks(save_state, tmp_path, saving)[0]
    for loaded, then in on_ranks(load_state, tmp_path, loading, devices, world_size=devices):
        assert_same(loaded, saved)
        if devices == 4:
            assert_same(then, went_on, 1e-6)


def save_and_merge(folder: Path) -> dict[str, Tensor]:
    accelerator = start()
    model, optimizer = prepared(accelerator)
    step(accelerator, model, optimizer)
    accelerator.save_state(str(folder / "state"))
    accelerator.save_model(model, str(folder / "model"))
    merge_fsdp_weights(str(folder / "state" / "pytorch_model_fsdp_0"), str(folder / "merged"))
    return weights(model)


def test_weights_can_be_saved_whole_and_merged_from_shards(tmp_path: Path) -> None:
    saved = on_ranks(save_and_merge, tmp_path)[0]
    for folder in ("model", "merged"):
        stored = load_file(tmp_path / folder / "model.safetensors")
        assert stored.keys() <= saved.keys() and len(stored) >= len(saved) - 1  # tied weights once
        assert_same(stored, {name: saved[name] for name in stored})


def forget() -> tuple[bool, list[str], torch.dtype]:
    accelerator = start()
    model = network().to(torch.bfloat16)
    model, optimizer = accelerator.prepare(model, sgd(model))
    dtype = next(model.parameters()).dtype
    seen: list[str] = []
    handle = accelerator.register_save_state_pre_hook(lambda models, *_: seen.extend(type(m).__name__ for m in models))
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        handle.remove()
        accelerator.save_state(folder)
    known = weakref.ref(model)
    model, optimizer = accelerator.free_memory(model, optimizer)
    gc.collect()
    return known() is None, seen, dtype


def test_hooks_get_the_model_which_can_be_forgotten_and_keeps_its_dtype() -> None:
    assert on_ranks(forget) == [(True, ["FSDPTinyLM"], torch.bfloat16)] * 4


def of_the_config_file(name: str, value: str) -> Any:
    os.environ[name] = value
    plugin = MiCSPlugin()
    assert str(MiCSPlugin(state_dict_type="sharded").state_dict_type) == "StateDictType.SHARDED_STATE_DICT"
    return str(plugin.state_dict_type), plugin.policy._activation_checkpointing


def test_the_config_file_of_the_launcher_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    ((kind, _),) = on_ranks(of_the_config_file, "FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT", world_size=1)
    assert kind == "StateDictType.FULL_STATE_DICT"
    assert on_ranks(of_the_config_file, "FSDP_ACTIVATION_CHECKPOINTING", "true", world_size=1)[0][1] is True
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ValueError, match="set fsdp_offload_params to false"):
        MiCSPlugin()


def whole_state() -> dict[str, Tensor]:
    accelerator = start()
    model, optimizer = prepared(accelerator)
    step(accelerator, model, optimizer)
    return accelerator.get_state_dict(model)


def test_the_state_dict_is_whole() -> None:
    assert_same(on_ranks(whole_state)[0], alone(), 1e-6)


def save_ours(path: Path) -> dict[str, Tensor]:
    accelerator = start(plugin={"partition_size": 4})
    model = TinyModule()
    model, optimizer = accelerator.prepare(model, sgd(model))
    step(accelerator, model, optimizer)
    plugin_of(accelerator).save_checkpoint(accelerator, path, epoch=3)
    return weights(model)


def load_everywhere(folder: Path) -> dict[str, dict[str, Tensor]]:
    accelerator = start()
    model = TinyModule()
    model, _ = accelerator.prepare(model, sgd(model))
    rest = plugin_of(accelerator).load_checkpoint(accelerator, folder / "accelerate.ckpt")
    assert rest["epoch"] == 3
    loaded = {"accelerate": weights(model)}
    fabric = start_fabric()
    of_fabric = TinyModule()
    of_fabric, optimizer = fabric.setup(of_fabric, sgd(of_fabric))
    assert fabric.load(folder / "accelerate.ckpt", {"model": of_fabric, "optimizer": optimizer})["epoch"] == 3
    loaded["fabric"] = weights(of_fabric)
    trained = TinyModule(lr=0.0)
    trainer = make_trainer(folder, strategy=mics(partition_size=4), max_steps=1)
    trainer.fit(trained, loader(), ckpt_path=folder / "accelerate.ckpt")
    loaded["trainer"] = weights(trained)
    trainer.save_checkpoint(folder / "trainer.ckpt")
    plugin_of(accelerator).load_checkpoint(accelerator, folder / "trainer.ckpt")
    assert_same(weights(model), loaded["trainer"])
    return loaded


def test_checkpoints_go_from_accelerate_to_the_others_and_back(tmp_path: Path) -> None:
    saved = on_ranks(save_ours, tmp_path / "accelerate.ckpt")[0]
    for loaded in on_ranks(load_everywhere, tmp_path):
        for host in ("accelerate", "fabric"):
            assert_same(loaded[host], saved)
        assert not loaded["trainer"]["net.norm.weight"].equal(saved["net.norm.weight"])  # it went on from there
        assert_same(loaded["trainer"], saved, 0.5)


# -- the Trainer of transformers ---------------------------------------------------------------------------------------


class Sequences(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.rows = tokens(count, length=8)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def fit_with_transformers(folder: Path, max_steps: int, resume: bool) -> dict[str, Any]:
    start(plugin={"partition_size": 2})  # before the arguments, which keep it
    arguments = TrainingArguments(
        output_dir=str(folder),
        accelerator_config={"use_configured_state": True},
        use_cpu=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
        max_grad_norm=1.0,
        max_steps=max_steps,
        lr_scheduler_type="constant",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=3,
    )
    torch.manual_seed(1)
    trainer = Trainer(
        model=GPT2LMHeadModel(GPT), args=arguments, train_dataset=Sequences(64), eval_dataset=Sequences(16)
    )
    trainer.train(resume_from_checkpoint=resume)
    assert sharded(trainer.model).groups.topology.partition_size == 2
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return {
        "losses": losses,
        "evaluated": trainer.evaluate()["eval_loss"],
        "weights": weights(trainer.model),
    }


def test_the_trainer_of_transformers_trains_saves_resumes_and_evaluates(tmp_path: Path) -> None:
    whole = on_ranks(fit_with_transformers, tmp_path / "whole", 4, False)
    on_ranks(fit_with_transformers, tmp_path / "parts", 2, False)
    resumed = on_ranks(fit_with_transformers, tmp_path / "parts", 4, True)
    for first, second in zip(whole, resumed, strict=True):
        assert first["evaluated"] < math.log(VOCAB) - 0.1
        assert second["losses"][4] == pytest.approx(first["losses"][4], abs=1e-5)
        assert second["evaluated"] == pytest.approx(first["evaluated"], abs=1e-5)
        assert_same(second["weights"], first["weights"], 1e-5)


# -- launching ---------------------------------------------------------------------------------------------------------

CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
num_machines: 1
num_processes: 2
machine_rank: 0
mixed_precision: 'no'
"""


SCRIPT = """
import torch
from accelerate import Accelerator
from lightning_mics.integrations.accelerate import MiCSPlugin
from tests.support.models import TinyLM, tokens

plugin = MiCSPlugin(partition_size=2)
accelerator = Accelerator(cpu=not torch.cuda.is_available(), fsdp_plugin=plugin, gradient_accumulation_steps=2)
model = TinyLM()
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
for index in range(4):
    with accelerator.accumulate(model):
        accelerator.backward(model(tokens(2, seed=index)))
        optimizer.step()
        optimizer.zero_grad()
plugin = type(accelerator.state.fsdp_plugin).__name__
print(f"rank {accelerator.process_index} of {accelerator.num_processes}: {plugin}", flush=True)
"""


def test_accelerate_launches_it_with_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "LOCAL_", "WORLD_"))}
    command = ["-m", "accelerate.commands.launch", "--config_file", "config.yaml", "--main_process_port=0", "train.py"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        assert f"rank {rank} of 2: MiCSPlugin" in done.stdout


# -- refusals ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("a model sharded by FSDP2", "ValueError: the model is sharded already, and not by this plugin"),
        ("a model of Fabric", "ValueError: the model is sharded already, and not by this plugin"),
        ("a model alone", "ValueError: When using FSDP2, a model and optimizer must be passed together"),
        ("a partition size that is none", "ValueError: partition_size=3"),
        ("a parallelism_config", "ValueError: .*parallelism_config"),
        ("a model on the meta device", "ValueError: the model is on the meta device"),
        ("another plugin", "ValueError: another Accelerator is there already, and all share its plugin"),
        ("float16", "ValueError: MiCSPlugin does not support mixed_precision='fp16'; use one of 'no', 'bf16'"),
        ("nothing prepared", "ValueError: the Accelerator has 0 models that it has prepared with a MiCSPlugin"),
        ("a plain model", "ValueError: TinyLM is not sharded, nor is a module in it: .* fsdp_plugin=MiCSPlugin"),
    ],
)
def test_wrong_use_gets_a_clear_error(case: str, message: str) -> None:
    for said in on_ranks(refused, case):
        assert re.match(message, said), said


def test_a_single_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    try:
        with pytest.raises(ValueError, match=r"shards over several ranks, and this job is DistributedType\.NO"):
            start()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
            os.environ.pop(name, None)


def test_options_that_cannot_be_are_refused_at_once() -> None:
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
def test_an_accelerate_that_is_too_old_or_too_new_is_refused(
    version: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerate, "__version__", version)
    monkeypatch.delattr("accelerate.accelerator.fsdp2_prepare_model")
    source = Path(mics_accelerate.__file__).read_text()
    with pytest.raises(ImportError, match=message):
        exec(compile(source, mics_accelerate.__file__, "exec"), {"__name__": "a second one", "__package__": ""})
