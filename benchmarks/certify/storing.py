"""Faults of checkpoints: what is written and read, and what a resumed run goes on with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.certify.mutants import At, acts, around, chosen
from benchmarks.certify.operators import operator
from lightning_mics import MiCSStrategy
from lightning_mics.checkpoint import loading, optimizer_states, random_states
from lightning_mics.checkpoint.dcp.reader import SafeReader
from lightning_mics.checkpoint.dcp.save_planner import OwnRowsSavePlanner
from lightning_mics.integrations.trainer import checkpoints, resuming
from lightning_mics.sharding.modules.broadcast_buffers import BufferBroadcast

PARTS = ("model", "exp_avg", "exp_avg_sq")  # of a checkpoint: weights, and both moments
OTHER_ROWS = tuple(f"{how}, {part}" for how in ("swapped", "shifted") for part in PARTS)
GROUPS = ("first group", "second group")
DEFAULTS: dict[str, Any] = {"weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "lr": 1e-3, "initial_lr": 1e-3}


def unit_of(name: str) -> str:
    """The unit of a tensor by its name in a model or a checkpoint.

    Args:
        name: Name, with or without the key of a model or an optimizer before it.
    """
    for unit in ("blocks.0", "blocks.1"):
        if unit in name:
            return unit
    return "root"


def _is_part(name: str, part: str) -> bool:
    return name.startswith("model.") if part == "model" else name.endswith(f".{part}")


def _other_rows(values: Tensor, how: str) -> Tensor:
    rows = values.clone()
    if how.startswith("shifted"):
        return rows.roll(1, 0)
    rows[:2] = values[:2].flip(0)
    return rows


# -- rows --------------------------------------------------------------------------------------------------------------


@operator("rows of a checkpoint", changed=OwnRowsSavePlanner.lookup_object, variants=OTHER_ROWS)
def rows_written(at: At, variant: str) -> None:
    part = variant.rpartition(", ")[2]

    def changed(own: Callable[..., Any], planner: Any, index: Any) -> Any:
        value = own(planner, index)
        wanted = isinstance(value, Tensor) and value.ndim > 1 and value.size(0) > 1 and _is_part(index.fqn, part)
        if wanted and at.here(unit_of(index.fqn)):
            acts()
            return _other_rows(value, variant)
        return value

    around(OwnRowsSavePlanner, "lookup_object", changed)


@operator("rows of a checkpoint", changed=SafeReader._read_item, variants=OTHER_ROWS)
def rows_read(at: At, variant: str) -> None:
    part = variant.rpartition(", ")[2]

    def changed(own: Callable[..., Any], reader: Any, item: Any, stored: Any, planner: Any) -> None:
        own(reader, item, stored, planner)
        name = item.dest_index.fqn
        if _is_part(name, part) and at.here(unit_of(name)):
            target = planner.resolve_tensor(item).detach()
            if target.ndim > 1 and target.size(0) > 1:
                acts()
                target.copy_(_other_rows(target, variant))

    around(SafeReader, "_read_item", changed)


@operator("rows of a checkpoint", changed=None, variants=("swapped", "shifted"), ranks=(0,))
def rows_in_one_file(at: At, variant: str) -> None:
    """Of a full file, when it is written."""

    def changed(own: Callable[..., Any], strategy: Any) -> Any:
        state = own(strategy)
        for name, value in state.items():
            in_one_file = isinstance(value, Tensor) and not strategy._save_distributed_checkpoint
            if in_one_file and value.ndim > 1 and at.here(unit_of(name)):
                acts()
                state[name] = _other_rows(value, variant)
        return state

    around(MiCSStrategy, "lightning_module_state_dict", changed)


@operator("rows of a checkpoint", changed=optimizer_states._copied, variants=("swapped", "shifted"), units=(None,))
def rows_of_states_from_one_file(at: At, variant: str) -> None:
    def changed(own: Callable[..., Any], value: Tensor, target: Tensor) -> Tensor:
        whole = value.values() if hasattr(value, "key") else value
        if whole.ndim > 1:
            acts()
            whole = _other_rows(whole, variant)
        return own(whole, target)  # type: ignore[no-any-return]

    around(optimizer_states, "_copied", changed)


# -- optimizers --------------------------------------------------------------------------------------------------------


@operator(
    "state of an optimizer",
    changed=optimizer_states.load_optimizer,
    variants=("lost", "steps + 1", "moments exchanged", "rounded", "lost on rank 1"),
)
def states_loaded(at: At, variant: str) -> None:
    def changed(own: Callable[..., Any], model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        own(model, optimizer, *args, **kwargs)
        for name, parameter in model.named_parameters():
            state = optimizer.state.get(parameter)
            if state and at.here(unit_of(name)):
                acts()
                _change_state(optimizer, parameter, state, variant)

    around(loading, "load_optimizer", changed)


def _change_state(optimizer: Any, parameter: Any, state: dict[str, Tensor], variant: str) -> None:
    if variant == "lost" or (variant == "lost on rank 1" and dist.get_rank() == 1):
        del optimizer.state[parameter]
    elif variant == "steps + 1":
        state["step"] += 1
    elif variant == "moments exchanged":
        state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"].abs()
    elif variant == "rounded":
        state["exp_avg"].copy_(state["exp_avg"].float().double())


@operator(
    "state of another parameter",
    changed=optimizer_states.optimizer_state,
    variants=("up.weight", "down.weight", "norm.weight", "up.bias"),
    units=(None,),
)
def states_saved(at: At, variant: str) -> None:
    """The blocks' parameters of one name have each other's states."""

    def changed(own: Callable[..., Any], *args: Any, sharded: bool) -> Any:
        state = own(*args, sharded=sharded)
        one, other = f"blocks.0.{variant}", f"blocks.1.{variant}"
        if sharded and one in state.get("state", {}) and other in state["state"]:
            acts()
            states = dict(state["state"])
            states[one], states[other] = states[other], states[one]
            state = {**state, "state": states}
        return state

    around(checkpoints, "optimizer_state", changed)


@operator(
    "hyperparameter lost in resuming",
    changed=optimizer_states._stored_groups,
    variants=(
        *(f"{option}, {group}" for option in DEFAULTS for group in GROUPS),
        "maximize, first group",
        "amsgrad, first group",
        "all options exchanged, first group",
    ),
    units=(None,),
)
def options_loaded(at: At, variant: str) -> None:
    option, _, group = variant.partition(", ")

    def changed(own: Callable[..., Any], *args: Any) -> Any:
        groups = [dict(each) for each in own(*args)]
        number = GROUPS.index(group)
        acts()
        if option == "all options exchanged":
            names = [each.pop("params") for each in groups]
            return [{**each, "params": own_names} for each, own_names in zip(groups[::-1], names, strict=True)]
        groups[number][option] = True if option in ("maximize", "amsgrad") else DEFAULTS[option]
        return groups

    around(optimizer_states, "_stored_groups", changed)


@operator(
    "schedule of learning rates not restored",
    changed=checkpoints.SavesAndLoads.load_checkpoint,
    variants=("not there", "one step more", "one step less", "base rates exchanged", "share"),
    units=(None,),
)
def schedule_loaded(at: At, variant: str) -> None:
    def changed(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        content = own(*args, **kwargs)
        acts()
        if variant == "not there":
            return {**content, "lr_schedulers": []}
        for schedule in content["lr_schedulers"]:
            if variant == "base rates exchanged":
                schedule["base_lrs"] = schedule["base_lrs"][::-1]
            elif variant == "share":
                for of_group in schedule["lr_lambdas"]:  # which are one object
                    of_group["share"] *= 1 + 1e-6
            else:
                schedule["last_epoch"] += 1 if variant == "one step more" else -1
        return content

    around(MiCSStrategy, "load_checkpoint", changed)


@operator(
    "progress not restored",
    changed=checkpoints.SavesAndLoads.load_checkpoint,
    variants=("optimizer steps", "micro-steps", "all"),
    units=(None,),
)
def progress_loaded(at: At, variant: str) -> None:
    def changed(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        content = own(*args, **kwargs)
        acts()
        loop = content["loops"]["fit_loop"]
        if variant == "all":
            return {name: value for name, value in content.items() if name != "loops"}
        if variant == "micro-steps":
            for count in ("ready", "started", "processed", "completed"):
                loop["epoch_loop.batch_progress"]["current"][count] += 2
        else:
            steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
            steps["completed"] += 1
        return content

    around(MiCSStrategy, "load_checkpoint", changed)


# -- buffers and random states -----------------------------------------------------------------------------------------


@operator("buffer not saved or restored", changed=None, variants=("offset", "mean"), units=(None,), ranks=(None, 1))
def buffer_loaded(at: At, variant: str) -> None:
    """Its own first values are there after the model is loaded."""

    def changed(own: Callable[..., Any], strategy: Any, *args: Any, **kwargs: Any) -> None:
        before = strategy.lightning_module.get_buffer(variant).clone()
        own(strategy, *args, **kwargs)
        buffer = strategy.lightning_module.get_buffer(variant)  # conversion to float64 makes another
        if at.here() and not torch.equal(buffer, before.to(buffer.dtype)):
            acts()
            buffer.copy_(before)

    around(MiCSStrategy, "load_model_state_dict", changed)


@operator("buffer not saved or restored", changed=None, variants=("offset", "mean"), units=(None,))
def buffer_saved(at: At, variant: str) -> None:
    """Zeros are saved in its place."""

    def changed(own: Callable[..., Any], strategy: Any) -> Any:
        state = own(strategy)
        if variant in state:
            acts()
            state[variant] = torch.zeros_like(state[variant])
        return state

    around(MiCSStrategy, "lightning_module_state_dict", changed)


@operator(
    "buffer not broadcast",
    changed=BufferBroadcast._broadcast,
    variants=("_broadcast", "make_equal", "_end_window"),
    units=(None,),
    steps=(None, 1),
)
def buffers_equal(at: At, variant: str) -> None:
    def changed(own: Callable[..., Any], *args: Any) -> Any:
        if at.here():
            acts()
            return None
        return own(*args)

    around(BufferBroadcast, variant, changed)


@operator(
    "random state not restored",
    changed=random_states.restore,
    variants=("all", "torch", "python", "numpy", "of rank 0"),
    units=(None,),
)
def random_state_restored(at: At, variant: str) -> None:
    def changed(own: Callable[..., Any], states: dict[str, Tensor]) -> None:
        acts()
        if variant == "of rank 0":
            given: list[Any] = [states]
            dist.broadcast_object_list(given, src=0)
            own(given[0])
        elif variant != "all":
            own({**states, variant: random_states.capture()[variant]})

    around(resuming.random_states, "restore", changed)


@operator("random state not restored", changed=random_states.branch, units=(None,))
def random_state_branched(at: At, _variant: None) -> None:
    """All ranks of another number go on with the same state."""

    def changed(own: Callable[..., Any], states: dict[str, Tensor], *, rank: int, world_size: int) -> None:
        acts()
        own(states, rank=0, world_size=world_size)

    around(resuming.random_states, "branch", changed)


@operator("weights changed in a checkpoint", changed=None, variants=(1 + 1e-9, torch.float32, torch.bfloat16))
def weights_loaded(at: At, variant: Any) -> None:
    """On one rank, after the model is loaded."""

    def changed(own: Callable[..., Any], strategy: Any, *args: Any, **kwargs: Any) -> None:
        own(strategy, *args, **kwargs)
        for name, parameter in chosen.strategy.lightning_module.named_parameters():
            shard = parameter.detach().to_local()
            if shard.numel() and dist.get_rank() == 1 and at.here(unit_of(name)):
                acts()
                shard.copy_(shard.to(variant) if isinstance(variant, torch.dtype) else shard * variant)

    around(MiCSStrategy, "load_model_state_dict", changed)
