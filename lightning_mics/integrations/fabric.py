"""``Fabric(strategy="mics")``: the adapter between Lightning's Fabric and the policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.precision import Precision
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.fabric.utilities.load import _move_state_into
from lightning.fabric.utilities.types import _Stateful
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mics import checkpoint
from lightning_mics.checkpoint.async_save import ShardedSaving
from lightning_mics.checkpoint.errors import all_ranks_answer
from lightning_mics.checkpoint.optimizer_states import optimizer_state
from lightning_mics.checkpoint.origin import NETWORK_KEY, TOPOLOGY_KEY, origin
from lightning_mics.checkpoint.storage.folder import is_sharded
from lightning_mics.checkpoint.storage.path import StoragePath, storage_path
from lightning_mics.integrations._lightning import (
    check_job,
    check_precision,
    check_saving,
    let_gloo_finish,
    reduce_in_place,
)
from lightning_mics.policy.policy import Policy
from lightning_mics.sharding.evaluation import allow_evaluation
from lightning_mics.sharding.initialization import verify_replicas
from lightning_mics.sharding.sharded import sharded_of

Filter = Mapping[str, Callable[[str, Any], bool]]


class MiCSFabricStrategy(ModelParallelStrategy):
    """MiCS for Fabric: sharded training whose constant traffic stays inside partition groups.

    ``fabric.setup`` takes an ordinary module and shards it block by block, with its optimizers in the same call or
    made after it. ``fabric.no_backward_sync`` marks the micro-steps before the boundary: gradients are reduced inside
    the partition group in each, over replicas at the boundary.

    Args:
        save_sharded: Checkpoints are directories of shards; False gathers them into one file on rank 0, with the names
            of your state, as Fabric on one device has it. The Trainer begins from both, and Fabric goes on from the
            Trainer's.
        async_save: Checkpoints are written while training goes on, from copies in the host's memory; call
            :meth:`wait_for_checkpoints` after the last. Needs ``save_sharded``.
        trust_checkpoints: Whether loading a checkpoint may run code that is in it, which objects other than plain data
            and tensors need; an explicit ``weights_only`` goes before.
        process_group_backend: None is nccl for CUDA, gloo for CPU.
        timeout: For the collectives of all groups.
        policy: As of :class:`~lightning_mics.policy.policy.Policy`: ``partition_size``, ``ranks_per_node``,
            ``hierarchical``,
            ``cross_node_gather``, ``cross_node_reduce``, ``in_node_gather``, ``in_node_reduce``,
            ``inter_node_reduce_dtype``, ``two_hop``, ``reduce_dtype``, ``block_classes``, ``activation_checkpointing``.

    Raises:
        TypeError: If an option has the wrong type, or the model cannot be sharded.
        ValueError: If an option's value does not fit the job or the model.
    """

    def __init__(
        self,
        *,
        save_sharded: bool = True,
        async_save: bool = False,
        trust_checkpoints: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        **policy: Any,
    ) -> None:
        super().__init__(
            parallelize_fn=_not_called,
            save_distributed_checkpoint=save_sharded,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        check_saving(save_sharded=save_sharded, async_save=async_save)
        self._policy = Policy(timeout=timeout, **policy)
        self._trust_checkpoints = trust_checkpoints
        self._saving = ShardedSaving(asynchronous=async_save, timeout=timeout)
        self._backward_sync_control = _TwoHop()
        self._models: list[nn.Module] = []  # that were set up
        self._ran_forward: list[nn.Module] = []  # of these, with gradients, since the last backward

    # -- before the model --------------------------------------------------------------------------------------------

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank has data of its own, those of one partition group too."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    @override
    def precision(self) -> Precision:
        return super().precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        if precision is not None:
            check_precision(precision.precision)
        self._precision = precision

    @override
    def setup_environment(self) -> None:
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self._set_world_ranks()
        check_job(self.root_device, backend=self._get_process_group_backend())
        self._policy.check(world_size=self.world_size, local_size=self.num_processes)
        self._setup_distributed()
        let_gloo_finish(self.root_device)

    # -- sharding the model ------------------------------------------------------------------------------------------

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:
        if "_mics" not in vars(module):
            sharded = self._policy.shard(
                module,
                precision=self.precision.precision,
                device=self.root_device,
                local_size=self.num_processes,
            )
            vars(module)["_mics"] = sharded
            rank_zero_info(sharded.report)
        module.to(self.root_device)  # what is no parameter
        self._policy.check_kept(module, sharded_of(module))
        self._device_mesh = sharded_of(module).groups.mesh
        sharded_of(module).schedule.abandon_window()
        if not any(module is known for known in self._models):
            allow_evaluation(module)
            sharded_of(module).schedule.follow_steps()
            module.register_forward_pre_hook(self._note_forward)
            self._models.append(module)
        return module

    @override
    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Shard ``module``, and let ``optimizers``, which hold its whole parameters, hold its shards instead."""
        names = _names_in_groups(module, optimizers)
        module = self.setup_module(module)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for optimizer, groups in zip(optimizers, names, strict=True):
            for group, of_group in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = [parameters[name] for name in of_group]
            sharded_of(module).schedule.follow_zero_grad(optimizer)
        return module, optimizers, scheduler

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        own = {id(parameter) for model in self._models for parameter in model.parameters()}
        foreign = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
        if foreign:
            raise ValueError(
                f"{type(optimizer).__name__} holds {len(foreign)} tensors that are not parameters of a model that was "
                "set up, so nothing would reduce their gradients; make it after `model = fabric.setup_module(model)`, "
                "or set up both in one call: `model, optimizer = fabric.setup(model, optimizer)`"
            )
        for model in self._models:
            if sharded_of(model).schedule.trains_with(optimizer):
                sharded_of(model).schedule.follow_zero_grad(optimizer)
        return optimizer

    # -- steps -------------------------------------------------------------------------------------------------------

    @override
    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        for model in self._ran_forward:
            sharded_of(model).schedule.before_backward()
        self._ran_forward = []
        super().backward(tensor, module, *args, **kwargs)

    @override
    def clip_gradients_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        norm = super().clip_gradients_norm(*args, **kwargs)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_forward(self, module: nn.Module, _inputs: Any) -> None:
        if torch.is_grad_enabled() and not any(module is known for known in self._ran_forward):
            self._ran_forward.append(module)

    @override
    def all_reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce in place, as Fabric's own does, but without a barrier of all ranks before each value."""
        return reduce_in_place(tensor, group=group, op=reduce_op)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @override
    def save_checkpoint(
        self, path: str | Path, state: dict[str, Any], storage_options: Any = None, filter: Filter | None = None
    ) -> None:
        """Save the model, its optimizers and whatever else is in ``state``; every rank calls it.

        Raises:
            NotImplementedError: If there is a ``filter`` and checkpoints are sharded.
            TypeError: If there are ``storage_options``, which belong to a ``CheckpointIO``.
            ValueError: If ``state`` holds no model that was set up, or more than one.
        """
        if storage_options is not None:
            raise TypeError("strategy 'mics' takes no storage_options: give a URL that fsspec has a driver for")
        if filter and self._save_distributed_checkpoint:
            raise NotImplementedError(
                "a sharded checkpoint is saved whole, so that it can be loaded; filter it when you export it, or use "
                "save_sharded=False"
            )
        parts = _Parts.of(state, doing="save")
        with all_ranks_answer(f"saving {path}", timeout=self._timeout):
            self._save(self._shared_path(path), parts, filter or {})

    def _save(self, path: StoragePath, parts: _Parts, filter: Filter) -> None:
        sharded = self._save_distributed_checkpoint
        optimizers = {
            key: optimizer_state(parts.model, optimizer, sharded=sharded) for key, optimizer in parts.optimizers.items()
        }
        rest = {key: value.state_dict() if isinstance(value, _Stateful) else value for key, value in parts.rest.items()}
        if sharded:
            self._saving.save(
                path,
                model_state=get_model_state_dict(parts.model),
                optimizer_states=list(optimizers.values()),
                meta={**rest, **origin(parts.model, sharded_of(parts.model).groups.topology)},
            )
            return
        whole = get_model_state_dict(parts.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        contents = {parts.key: whole, **optimizers, **rest}
        kept = {key: _filtered(value, filter.get(key)) for key, value in contents.items()} | parts.names.plain()
        checkpoint.save_full(path, write=lambda file: torch.save(kept, file))

    def wait_for_checkpoints(self) -> None:
        """Wait until all checkpoints are there that are being written beside training; every rank calls it.

        Raises:
            RuntimeError: If one failed. Those saved earlier are as they were.
        """
        self._saving.wait()

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        state: nn.Module | Optimizer | dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint of Fabric's or the Trainer's into what ``state`` holds, in place; every rank calls it.

        Returns:
            What ``state`` did not ask for.

        Raises:
            KeyError: If ``strict`` and the checkpoint lacks something that ``state`` asks for.
            NotImplementedError: If ``state`` is an optimizer alone.
            ValueError: If ``state`` holds no model that was set up, or more than one.
        """
        if isinstance(state, Optimizer):
            raise NotImplementedError(
                "an optimizer is loaded with its model: fabric.load(path, {'model': model, 'optimizer': optimizer})"
            )
        self.wait_for_checkpoints()
        where = self._shared_path(path)
        if isinstance(state, nn.Module):
            self._load_raw(where, state, strict=strict, weights_only=weights_only)
            return {}
        parts = _Parts.of(state or {}, doing="load")
        assert state is not None
        remainder = self._load(where, parts, strict, weights_only)
        missing = sorted(parts.rest.keys() - remainder.keys())
        if missing and strict:
            raise KeyError(f"{path} has no {missing[0]!r}; load with strict=False to leave it as it is")
        _move_state_into(source=remainder, destination=state, keys=parts.rest.keys() - missing)
        return remainder

    def _load(self, path: StoragePath, parts: _Parts, strict: bool, weights_only: bool | None) -> dict[str, Any]:
        with torch.inference_mode(False), all_ranks_answer(f"loading {path}", timeout=self._timeout):
            remainder = checkpoint.load(
                path,
                model=parts.model,
                optimizers=list(parts.optimizers.values()),
                strict=strict,
                weights_only=self._weights_only(weights_only),
                names=parts.names,
            )
            _start_anew(parts.model)
        return {key: value for key, value in remainder.items() if key not in (TOPOLOGY_KEY, NETWORK_KEY)}

    def _load_raw(self, path: StoragePath, model: nn.Module, *, strict: bool, weights_only: bool | None) -> None:
        """A sharded checkpoint's model, or a file with a plain ``state_dict``."""
        if is_sharded(path):
            self._load(path, _Parts.of({"model": model}, doing="load_raw"), strict, weights_only)
            return
        checkpoint.load_raw(path, model, strict=strict, weights_only=self._weights_only(weights_only))
        if "_mics" in vars(model):
            _start_anew(model)

    def _weights_only(self, given: bool | None) -> bool:
        return not self._trust_checkpoints if given is None else given

    def _shared_path(self, path: str | Path) -> StoragePath:
        """Rank 0's path: a name with the time in it may differ between ranks."""
        return storage_path(self.broadcast(path))


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What users save and load, sorted."""

    key: str  # of the model
    model: nn.Module
    optimizers: dict[str, Optimizer]
    rest: dict[str, Any]

    @property
    def names(self) -> checkpoint.FullNames:
        return checkpoint.FullNames(model=self.key, optimizers=list(self.optimizers))

    @classmethod
    def of(cls, state: Mapping[str, Any], *, doing: str) -> _Parts:
        models = {key: value for key, value in state.items() if isinstance(value, nn.Module) and "_mics" in vars(value)}
        if len(models) != 1:
            raise ValueError(
                f"fabric.{doing} takes a model that was set up, and one per checkpoint, in its state, as in "
                f"{{'model': model, 'optimizer': optimizer}}; it got {sorted(models) or 'none'}"
            )
        ((key, model),) = models.items()
        optimizers = {name: value for name, value in state.items() if isinstance(value, Optimizer)}
        rest = {name: value for name, value in state.items() if name != key and name not in optimizers}
        return cls(key=key, model=model, optimizers=optimizers, rest=rest)


class _TwoHop(_BackwardSyncControl):
    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Before the boundary gradients are reduced inside the partition group only."""
        return sharded_of(module).schedule.micro_step(boundary=False) if enabled else nullcontext()


def _start_anew(model: nn.Module) -> None:
    """After its weights were replaced."""
    assert isinstance(model, FSDPModule)
    model.reshard()
    sharded_of(model).schedule.abandon_window()
    verify_replicas(model, sharded_of(model).groups)


def _names_in_groups(module: nn.Module, optimizers: Sequence[Optimizer]) -> list[list[list[str]]]:
    """Of what each group of each optimizer holds.

    Raises:
        ValueError: If that is not a parameter of the module, or the optimizer has stepped already.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        foreign = sum(id(p) not in names for group in optimizer.param_groups for p in group["params"])
        if foreign:
            raise ValueError(
                f"{kind} holds {foreign} tensors that are not parameters of the model it is set up with, so nothing "
                "would shard them or reduce their gradients"
            )
        if optimizer.state:
            raise ValueError(
                f"{kind} has stepped, and its state is of whole parameters; set it up before, and load states by "
                "fabric.load"
            )
    return [[[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] for optimizer in optimizers]


def _filtered(value: Any, keeps: Callable[[str, Any], bool] | None) -> Any:
    if keeps is None or not isinstance(value, dict):
        return value
    return {key: entry for key, entry in value.items() if keeps(key, entry)}


def _not_called(module: Any, _mesh: Any) -> Any:
    raise AssertionError("the policy shards")


STRATEGY_REGISTRY.register("mics", MiCSFabricStrategy, description="MiCS: sharding inside partition groups, on FSDP2")
