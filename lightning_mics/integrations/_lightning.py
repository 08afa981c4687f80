"""The common part of the strategies for the Trainer and Fabric: options, checks, ranks, paths."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack

from lightning_mics._torch.dtensors.numbers import whole_values
from lightning_mics._torch.process_groups import let_gloo_finish
from lightning_mics.checkpoint.async_save import ShardedSaving
from lightning_mics.checkpoint.storage.path import StoragePath, storage_path
from lightning_mics.collectives.control_plane import ControlPlane, control_plane
from lightning_mics.policy.options import PolicyOptions, check_names, documented
from lightning_mics.policy.policy import Policy

StateDictType = Literal["sharded", "full"]


class LightningStrategy:
    """Base of both strategies, to be inherited from before Lightning's own ``ModelParallelStrategy``.

    Methods take an untyped ``self``: the two classes of Lightning have the same attributes, but no common base.
    """

    @documented
    def __init__(
        self,
        *,
        state_dict_type: StateDictType = "sharded",
        async_save: bool = False,
        weights_only: bool = True,
        save_frozen: bool = True,
        in_memory_checkpoint: int | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        **policy: Unpack[PolicyOptions],
    ) -> None:
        """Set the options of sharding, communication and saving, without communication.

        Args:
            state_dict_type: ``"sharded"`` checkpoints are directories of shards; a ``"full"`` one is gathered into one
                file on rank 0.
            async_save: Whether checkpoints are written while training continues, from copies in CPU memory;
                :meth:`wait_for_checkpoints` and the end of a fit wait for them. Needs sharded checkpoints.
            weights_only: Whether loading a checkpoint reads plain data and tensors only. False unpickles any object,
                which may run code. An explicit ``weights_only`` of a loading call overrides it.
            save_frozen: Whether checkpoints hold parameters that do not require gradients. False saves what trains and
                buffers, as adapters without their base model; such a checkpoint resumes over the base weights that the
                model has.
            in_memory_checkpoint: Number of optimizer steps between two checkpoints in the memory of two nodes, from
                which a job resumes that is started again after a death; 1 is every step, None never. For a Trainer.
            process_group_backend: Backend of the process groups; None is nccl for CUDA, gloo for CPU.
            timeout: Longest duration of a collective of any group; None is the backend's default: 10 minutes with NCCL,
                30 with gloo, over which ranks agree and save.
            policy: Options of sharding; see :class:`~lightning_mics.policy.options.PolicyOptions`.

        Raises:
            TypeError: If an option has the wrong type, or the model cannot be sharded.
            ValueError: If an option's value does not fit the job or the model.
        """
        check_names(type(self), policy)
        check_saving(state_dict_type=state_dict_type, async_save=async_save)
        self._save_frozen = checked_flag("save_frozen", save_frozen)
        super().__init__(  # type: ignore[call-arg]  # Lightning's
            save_distributed_checkpoint=state_dict_type == "sharded",
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._policy = Policy(timeout=timeout, **policy)
        self._weights_only = weights_only
        self._in_memory_checkpoint = checked_interval(in_memory_checkpoint)
        self._saving = ShardedSaving(asynchronous=async_save, timeout=timeout)
        self._control: ControlPlane | None = None  # once the process groups are initialized
        self._initialize()

    def _initialize(self) -> None:
        """Create the attributes of a subclass, which inherits the constructor so that options are declared once."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy before the job runs; then the strategy itself, as copies of models are of the same job."""
        if self._control is not None:
            return self
        made = memo[id(self)] = type(self).__new__(type(self))
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    @property
    def distributed_sampler_kwargs(self: Any) -> dict[str, Any]:
        """Every rank has its own data, also within a partition group."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup_environment(self: Any) -> None:
        """Initialize the process groups, after all checks that need no communication."""
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self._set_world_ranks()
        self._check_before_communicating()
        self._setup_distributed()
        self._control = control_plane(self._timeout)
        let_gloo_finish(self.root_device)

    def _check_before_communicating(self: Any) -> None:
        check_job(self.root_device, backend=self._get_process_group_backend())
        self._policy.check(world_size=self.world_size, local_size=self.num_processes)

    def _together(self, entry: str) -> AbstractContextManager[None]:
        """Run an operation of all ranks inside, once they agree on it."""
        return nullcontext() if self._control is None else self._control.together(entry)

    def barrier(self: Any, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks, but not for their devices, and not for ranks that are known not to come.

        Raises:
            RanksDifferError: If another rank does something else.
        """
        if self._control is None or not dist.is_initialized():
            return
        if self._control.has_raised and self._control.verdict is not None:
            return
        with self._together("waits at a barrier"):
            dist.barrier(group=self._control.group)

    def broadcast(self: Any, obj: Any, src: int = 0) -> Any:
        """Send a value from one rank to all, by the CPU.

        Args:
            obj: The value, which must pickle.
            src: Rank that sends it.

        Raises:
            RanksDifferError: If another rank does something else.
        """
        if self._control is None or not dist.is_initialized():
            return obj
        values = [obj]
        with self._together("broadcasts a value"):
            dist.broadcast_object_list(values, src=src, group=self._control.group)
        return values[0]

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks, or any of them, decide so; by the CPU.

        Args:
            decision: Decision of this rank.
            all: Whether all must decide so, not any.

        Raises:
            RanksDifferError: If another rank does something else.
        """
        if self._control is None or not dist.is_initialized():
            return decision
        differs = self._control.largest(torch.tensor(int(bool(decision) != all)), "decides with all ranks")
        return bool(differs) != all

    def wait_for_checkpoints(self) -> None:
        """Wait until all checkpoints that are being written asynchronously are complete; every rank calls it.

        Raises:
            RuntimeError: If saving one failed. Earlier checkpoints are unchanged.
        """
        self._saving.wait()

    def all_gather(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Gather a tensor from all ranks, as Lightning's strategies do; of a DTensor the unsharded one.

        Args:
            tensor: Tensor of this rank: [any].
            args: Group, and whether to synchronize gradients.
            kwargs: The same by name.
        """
        gathered: Tensor = super().all_gather(whole_values(tensor), *args, **kwargs)  # type: ignore[misc]
        return gathered

    def _reads_weights_only(self, weights_only: bool | None) -> bool:
        """The argument of a loading call if it is given, else the option."""
        return self._weights_only if weights_only is None else weights_only

    def _shared_path(self: Any, path: str | Path) -> StoragePath:
        """Rank 0's path: a name that contains the time may differ between ranks."""
        return storage_path(self.broadcast(path))


def check_job(device: torch.device, *, backend: str) -> None:
    """Check that the device has collectives, and that the backend supports the device.

    Args:
        device: Device of this rank.
        backend: Backend of the process groups, such as ``"nccl"``.

    Raises:
        ValueError: If not; the same on every rank, before the first collective.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"strategy 'mics' runs on CUDA and CPU devices, not on {device.type!r}")
    if device.type == "cpu" and "gloo" not in backend:
        raise ValueError(f"process_group_backend={backend!r} cannot serve CPU devices; use 'gloo' or None")


def checked_flag(option: str, value: bool) -> bool:
    """The value of an option that is True or False.

    Args:
        option: Name of the option, for the message.
        value: Value that was given.

    Raises:
        ValueError: If it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{option}={value!r} is neither True nor False")
    return value


def checked_interval(steps: int | None) -> int | None:
    """The interval between in-memory checkpoints, in optimizer steps.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is not positive.
    """
    if steps is None:
        return None
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"in_memory_checkpoint must be an integer or None, got {steps!r} ({type(steps).__name__})")
    if steps < 1:
        raise ValueError(f"in_memory_checkpoint={steps} must be at least 1: a number of optimizer steps; None is never")
    return steps


def check_saving(*, state_dict_type: str, async_save: bool) -> None:
    """Check the options of saving.

    Args:
        state_dict_type: ``"sharded"`` or ``"full"``.
        async_save: Whether checkpoints are written asynchronously, which only sharded ones are.

    Raises:
        ValueError: If the kind of checkpoint is unknown, or cannot be saved asynchronously.
    """
    if state_dict_type not in get_args(StateDictType):
        raise ValueError(f'state_dict_type={state_dict_type!r} is neither "sharded" nor "full"')
    if async_save and state_dict_type == "full":
        raise ValueError(
            'async_save=True needs state_dict_type="sharded": a full file is gathered while training waits'
        )


def reduce_in_place(tensor: Any, *, group: Any, op: Any) -> Any:
    """Reduce a tensor in place, as Lightning's strategies do, but without a barrier of all ranks before it.

    A tensor on the CPU is reduced there over all ranks, also where the default process group serves GPUs only.

    Args:
        tensor: Tensor to reduce, [any]; other values are returned unchanged.
        group: Process group to reduce over; None is all ranks.
        op: Reduction, a ``ReduceOp`` or its name; "mean" and "avg" divide by the number of ranks, and None sums.
    """
    tensor = whole_values(tensor)  # the same on all ranks of a partition group
    if not isinstance(tensor, Tensor) or not dist.is_initialized():
        return tensor
    if group in (None, dist.group.WORLD) and tensor.device.type == "cpu":
        group = control_plane().group
    mean = isinstance(op, str) and op.lower() in ("mean", "avg")
    named = getattr(dist.ReduceOp, op.upper()) if isinstance(op, str) and not mean else op
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM if mean or op is None else named, group=group)
    return tensor.copy_(tensor / dist.get_world_size(group)) if mean else tensor
