"""``Accelerator(fsdp_plugin=MiCSPlugin())``: the adapter between Hugging Face Accelerate and the policy.

Importing this module patches five functions of Accelerate, with an effect for a :class:`MiCSPlugin` only. The first is
``fsdp2_prepare_model``, which shards a model. The second is ``AcceleratorState.__init__``, which drops an FSDP plugin
if there is no GPU. The third is ``load_fsdp_model``, before which the folder's files are checked. The others are
``save_fsdp_optimizer`` and ``load_fsdp_optimizer``, in which no gradient scaler counts steps. If transformers is
imported, ``Trainer.save_model`` is patched as well, and a model that is sharded without a mesh afterwards, as reference
models are, is sharded inside the same partition groups. Everything else is Accelerate's own code: optimizers that
follow the shards, gradient clipping, ``save_state`` and ``load_state``, ``get_state_dict``. ``accumulate`` and
``no_sync`` switch off the model's gradient synchronization; a model sharded by a policy takes that for a micro-step
before the boundary.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial, wraps
from types import MethodType
from typing import Any, Literal

import accelerate
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate import accelerator as accelerate_accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DDPCommunicationHookType,
    convert_outputs_to_fp32,
    get_mixed_precision_context_manager,
    parse_flag_from_env,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule
from typing_extensions import Unpack, override

from lightning_mics._torch.dtensors.numbers import taking_whole_values
from lightning_mics._torch.fsdp import use_as_default_mesh
from lightning_mics._torch.process_groups import let_gloo_finish
from lightning_mics.integrations._accelerate_checkpoints import PluginCheckpoints, optimizers_of, ranks_on_this_host
from lightning_mics.integrations._accelerate_folders import checked_first, unscaled
from lightning_mics.integrations._registered_objects import gather_shards_of
from lightning_mics.integrations._transformers import save_sharded_models
from lightning_mics.policy.options import PolicyOptions, check_names, documented
from lightning_mics.policy.policy import Policy
from lightning_mics.sharding.evaluation import allow_evaluation
from lightning_mics.sharding.modules.copying import prepare_copies
from lightning_mics.sharding.optimizers.offload import shards_stay
from lightning_mics.sharding.optimizers.overflow import check_optimizer, scale_with_all_ranks
from lightning_mics.sharding.schedule import AccumulationSchedule
from lightning_mics.sharding.sharded import Sharded

OLDEST = (1, 15)  # oldest supported version of Accelerate, whose internals are used here


PRECISIONS = {"no": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


if tuple(int(part) for part in accelerate.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"MiCSPlugin needs accelerate >= {'.'.join(map(str, OLDEST))}, this is {accelerate.__version__}: "
        "pip install -U accelerate"
    )


@documented
class MiCSPlugin(PluginCheckpoints, FullyShardedDataParallelPlugin):  # type: ignore[misc]
    """MiCS for Accelerate: sharded training whose constant traffic stays inside partition groups.

    Args:
        state_dict_type: Kind of model file that ``save_state`` writes, ``"sharded"`` or ``"full"``. None takes
            ``fsdp_state_dict_type`` of the config file of ``accelerate launch``, and ``"sharded"`` without one; the
            defaults of ``activation_checkpointing`` and ``offload`` are also read from there.
        save_frozen: Whether checkpoints of ``save_checkpoint`` hold parameters that do not require gradients. False
            saves what trains and buffers, as adapters without their base model. ``save_state`` is Accelerate's own, and
            saves all.
        timeout: Longest duration of a collective of any group; None is the backend's default: 10 minutes with NCCL, 30
            with gloo, over which ranks agree and save.
        policy: Options of sharding; see :class:`~lightning_mics.policy.options.PolicyOptions`.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option's value is not allowed.
    """

    def __init__(
        self,
        *,
        state_dict_type: Literal["sharded", "full"] | None = None,
        save_frozen: bool = True,
        timeout: timedelta | None = None,
        **policy: Unpack[PolicyOptions],
    ) -> None:
        check_names(type(self), policy)
        if state_dict_type not in ("sharded", "full", None):
            raise ValueError(f'state_dict_type={state_dict_type!r} is neither "sharded" nor "full", nor None')
        policy.setdefault("offload", bool(parse_flag_from_env("FSDP_OFFLOAD_PARAMS")))
        policy.setdefault("activation_checkpointing", bool(parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING")))
        self.policy = Policy(timeout=timeout, **policy)
        if not isinstance(save_frozen, bool):
            raise ValueError(f"save_frozen={save_frozen!r} is neither True nor False")
        self._save_frozen = save_frozen
        self._timeout = timeout
        self._in_memory = None
        super().__init__(
            fsdp_version=2,
            state_dict_type=f"{state_dict_type}_state_dict".upper() if state_dict_type else None,
            auto_wrap_policy="NO_WRAP",  # the policy finds the blocks
            activation_checkpointing=False,  # the policy sets it up, too
            cpu_ram_efficient_loading=False,  # the policy sends rank 0's weights to all ranks
            cpu_offload=False,  # as well
        )
        os.environ["FSDP_VERSION"] = "2"  # for a second Accelerator, which creates a plugin without using it

    @override
    def set_auto_wrap_policy(self, model: nn.Module) -> None:
        """Do nothing: the policy finds the blocks."""


# -- preparing ---------------------------------------------------------------------------------------------------------


def _shard(accelerator: Accelerator, plugin: MiCSPlugin, model: nn.Module) -> nn.Module:
    if isinstance(model, FSDPModule):
        if "set_requires_gradient_sync" in vars(model):
            return model
        raise ValueError("the model is sharded already, and not by this plugin: prepare the original module")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the model is on the meta device, where Accelerate cannot tell the optimizer's parameters from each other; "
            "build it on the CPU: only one block at a time is on the device unsharded"
        )
    _check_communication_hooks(accelerator)
    precision = _precision(accelerator, model)
    handle = plugin.policy.shard(
        model,
        precision=precision,
        device=accelerator.device,
        local_size=ranks_on_this_host(),
        micro_steps=accelerator.gradient_accumulation_steps,
    )
    vars(model)["_mics"] = handle
    with shards_stay(model):
        model.to(accelerator.device)  # state besides parameters and buffers, such as metrics
    allow_evaluation(model)  # see [Note: Hooks on the root, in order]
    handle.schedule.optimizer_hooks.follow_steps()
    use_as_default_mesh(handle.groups.mesh, model=model)
    for optimizer in optimizers_of(accelerator):
        check_optimizer(optimizer, precision)
        how = handle.schedule.optimizer_hooks.adopt(optimizer)
        if how is not None and accelerator.is_main_process:
            print(how, flush=True)
        handle.schedule.optimizer_hooks.follow_zero_grad(optimizer)
    accelerator.log, accelerator.gather, accelerator.reduce = map(
        taking_whole_values, (accelerator.log, accelerator.gather, accelerator.reduce)
    )
    _prepare_for_states(accelerator, handle)
    vars(model)["set_requires_gradient_sync"] = _GradientSync(model, handle.schedule)
    prepare_copies(model, allow_evaluation, without=["set_requires_gradient_sync"])
    if precision.endswith("-mixed"):
        _compute_under_autocast(accelerator, model)
        under_autocast = partial(_compute_under_autocast, accelerator)
        prepare_copies(model, under_autocast, without=["forward", "_original_forward"])
    if accelerator.scaler is not None:
        scale_with_all_ranks(accelerator.scaler)
    if accelerator.is_main_process:
        print(handle.report, flush=True)
    return model


def _prepare_for_states(accelerator: Accelerator, handle: Sharded) -> None:
    """Prepare the model before Accelerate saves, abandon the open window when it loads. Hooks must not keep models."""
    known, registered, mesh = weakref.ref(handle), accelerator._custom_objects, handle.groups.mesh

    def abandon(*_: Any) -> None:
        gather_shards_of(registered, mesh)
        if (alive := known()) is not None:
            alive.schedule.window.abandon()

    def prepare(*_: Any) -> None:
        gather_shards_of(registered, mesh)
        if (alive := known()) is not None:
            alive.prepare_to_save()

    accelerator.register_load_state_pre_hook(abandon)
    accelerator.register_save_state_pre_hook(prepare)


def _precision(accelerator: Accelerator, model: nn.Module) -> str:
    if accelerator.mixed_precision not in PRECISIONS:
        raise ValueError(
            f"MiCSPlugin does not support mixed_precision={accelerator.mixed_precision!r}; use one of "
            f"{', '.join(map(repr, PRECISIONS))}"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError(
            "mixed_precision='fp16' is for GPUs: on CPUs Accelerate neither computes in float16 nor scales gradients; "
            "use mixed_precision='bf16' or 'no'"
        )
    if accelerator.mixed_precision == "no":
        half = all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
        return "bf16-true" if half else "32-true"
    for parameter in model.parameters():  # as Accelerate does: weights in float32, computation in 16 bits
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return PRECISIONS[accelerator.mixed_precision]


def _compute_under_autocast(accelerator: Accelerator, model: nn.Module) -> None:
    """Wrap the forward as Accelerate does for unsharded models, so that ``unwrap_model`` can undo it."""
    autocast = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
    vars(model)["_original_forward"] = model.forward
    forward: Callable[..., Any] = autocast(model.forward.__func__)  # type: ignore[attr-defined]
    model.forward = MethodType(convert_outputs_to_fp32(forward), model)


class _GradientSync:
    """``set_requires_gradient_sync`` of the root: without synchronization, a micro-step before the boundary runs.

    Args:
        model: The root FSDP module.
        schedule: The schedule returned by ``shard_model``.
    """

    def __init__(self, model: nn.Module, schedule: AccumulationSchedule) -> None:
        self._model = model
        self._schedule = schedule
        self._before_boundary = ExitStack()

    def __call__(self, requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        if not recurse:  # called by the schedule itself
            FSDPModule.set_requires_gradient_sync(self._model, requires_gradient_sync, recurse=False)  # type: ignore[arg-type]
            return
        self._before_boundary.close()
        if not requires_gradient_sync:
            self._before_boundary.enter_context(self._schedule.micro_step(boundary=False))


# -- what is patched in Accelerate and transformers --------------------------------------------------------------------


def _check_communication_hooks(accelerator: Accelerator) -> None:
    hook = getattr(accelerator.ddp_handler, "comm_hook", None)
    if hook not in (None, DDPCommunicationHookType.NO):
        raise ValueError(
            f"DistributedDataParallelKwargs(comm_hook={hook}) is for DistributedDataParallel and has no effect on a "
            "sharded model; leave it out, and for smaller messages between nodes pass "
            "MiCSPlugin(inter_node_reduce_dtype=torch.bfloat16)"
        )


def _patched_prepare(prepare: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(prepare)
    def prepare_either(accelerator: Accelerator, model: nn.Module) -> Any:
        plugin = accelerator.state.fsdp_plugin
        return _shard(accelerator, plugin, model) if isinstance(plugin, MiCSPlugin) else prepare(accelerator, model)

    return prepare_either


def _patched_init(initialize: Callable[..., None]) -> Callable[..., None]:
    @wraps(initialize)
    def initialize_either(state: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        plugin = kwargs.get("fsdp_plugin")
        if isinstance(plugin, MiCSPlugin) and kwargs.get("parallelism_config") is not None:
            raise ValueError("MiCSPlugin divides the ranks by its partition_size: leave out the parallelism_config")
        existing = AcceleratorState._shared_state.get("fsdp_plugin")
        if isinstance(plugin, MiCSPlugin) and existing is not None and existing is not plugin:
            raise ValueError(
                "another Accelerator exists already, and all share its plugin: create this one without fsdp_plugin"
            )
        initialize(state, *args, **kwargs)
        if not isinstance(plugin, MiCSPlugin):
            return
        let_gloo_finish(state.device)
        if state.distributed_type == DistributedType.FSDP:
            return
        if state.distributed_type != DistributedType.MULTI_CPU:
            raise ValueError(
                f"MiCSPlugin shards over several ranks, and this job is {state.distributed_type}: start it by "
                "`accelerate launch --num_processes=N` or torchrun, with no other plugin; on CPUs, with "
                "Accelerator(cpu=True)"
            )
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = plugin

    return initialize_either


if not hasattr(accelerate_accelerator, "fsdp2_prepare_model"):
    raise ImportError(
        f"accelerate {accelerate.__version__} does not prepare models as 1.15 does, so MiCSPlugin cannot shard them; "
        "install a version that lightning_mics was tested with"
    )


accelerate_accelerator.fsdp2_prepare_model = _patched_prepare(accelerate_accelerator.fsdp2_prepare_model)


accelerate_accelerator.load_fsdp_model = checked_first(accelerate_accelerator.load_fsdp_model, of=MiCSPlugin)


accelerate_accelerator.save_fsdp_optimizer = unscaled(accelerate_accelerator.save_fsdp_optimizer, of=MiCSPlugin)


accelerate_accelerator.load_fsdp_optimizer = unscaled(accelerate_accelerator.load_fsdp_optimizer, of=MiCSPlugin)


AcceleratorState.__init__ = _patched_init(AcceleratorState.__init__)


save_sharded_models(MiCSPlugin)
