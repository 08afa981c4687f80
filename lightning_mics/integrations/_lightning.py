"""What the Trainer's strategy and Fabric's have in common: options, checks, ranks, paths."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from typing_extensions import Unpack

from lightning_mics._torch.process_groups import let_gloo_finish
from lightning_mics.checkpoint.async_save import ShardedSaving
from lightning_mics.checkpoint.storage.path import StoragePath, storage_path
from lightning_mics.policy.options import PolicyOptions, check_names, documented
from lightning_mics.policy.policy import Policy

StateDictType = Literal["sharded", "full"]

PRECISIONS = ("32-true", "bf16-true", "bf16-mixed")


class LightningStrategy:
    """Base of both strategies, to be inherited from before Lightning's own ``ModelParallelStrategy``.

    Methods take an untyped ``self``: Lightning's two classes have these attributes, but no common base.
    """

    @documented
    def __init__(
        self,
        *,
        state_dict_type: StateDictType = "sharded",
        async_save: bool = False,
        weights_only: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        **policy: Unpack[PolicyOptions],
    ) -> None:
        """Choose how to shard, to communicate and to save; nothing is communicated yet.

        Args:
            state_dict_type: ``"sharded"`` checkpoints are directories of shards; a ``"full"`` one is gathered into one
                file on rank 0.
            async_save: Whether checkpoints are written while training continues, from copies in the host's memory;
                :meth:`wait_for_checkpoints` waits for them, as the end of a fit does. Needs sharded checkpoints.
            weights_only: Whether loading a checkpoint reads plain data and tensors only. False unpickles any object,
                which may run code. An explicit ``weights_only`` of a call that loads overrides it.
            process_group_backend: Backend of the process groups; None is nccl for CUDA, gloo for CPU.
            timeout: Timeout of the collectives of all groups; None is torch's default.
            policy: Options of sharding, as in :class:`~lightning_mics.policy.options.PolicyOptions`.

        Raises:
            TypeError: If an option has the wrong type, or the model cannot be sharded.
            ValueError: If an option's value does not fit the job or the model.
        """
        check_names(type(self), policy)
        check_saving(state_dict_type=state_dict_type, async_save=async_save)
        super().__init__(  # type: ignore[call-arg]  # Lightning's
            save_distributed_checkpoint=state_dict_type == "sharded",
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._policy = Policy(timeout=timeout, **policy)
        self._weights_only = weights_only
        self._saving = ShardedSaving(asynchronous=async_save, timeout=timeout)
        self._initialize()

    def _initialize(self) -> None:
        """Make what else a strategy holds: it inherits the constructor, so that the options are written down once."""

    @property
    def distributed_sampler_kwargs(self: Any) -> dict[str, Any]:
        """Every rank has data of its own, those of one partition group too."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup_environment(self: Any) -> None:
        """Start communicating, once all that can be checked without has been checked."""
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self._set_world_ranks()
        self._check_before_communicating()
        self._setup_distributed()
        let_gloo_finish(self.root_device)

    def _check_before_communicating(self: Any) -> None:
        check_job(self.root_device, backend=self._get_process_group_backend())
        self._policy.check(world_size=self.world_size, local_size=self.num_processes)

    def wait_for_checkpoints(self) -> None:
        """Wait until all checkpoints that are being written asynchronously are complete; every rank calls it.

        Raises:
            RuntimeError: If one failed. Those saved earlier are as they were.
        """
        self._saving.wait()

    def _reads_weights_only(self, weights_only: bool | None) -> bool:
        """What a call that loads has said, or else the option."""
        return self._weights_only if weights_only is None else weights_only

    def _shared_path(self: Any, path: str | Path) -> StoragePath:
        """Rank 0's path: a name with the time in it may differ between ranks."""
        return storage_path(self.broadcast(path))


def check_precision(precision: object) -> None:
    """Refuse what has no place in sharded training, by Lightning's name of it.

    Raises:
        ValueError: If it is none of :data:`PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"strategy 'mics' does not support precision={str(precision)!r}; "
            f"use one of {', '.join(map(repr, PRECISIONS))}"
        )


def check_job(device: torch.device, *, backend: str) -> None:
    """Refuse a device that has no collectives, and a backend that does not serve it.

    Raises:
        ValueError: The same on every rank, before any rank waits for another.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"strategy 'mics' runs on CUDA and CPU devices, not on {device.type!r}")
    if device.type == "cpu" and "gloo" not in backend:
        raise ValueError(f"process_group_backend={backend!r} cannot serve CPU devices; use 'gloo' or None")


def check_saving(*, state_dict_type: str, async_save: bool) -> None:
    """Reject an unknown kind of checkpoint, and full ones that are to be saved asynchronously.

    Raises:
        ValueError: If there is no such kind, or it cannot be saved in this way.
    """
    if state_dict_type not in get_args(StateDictType):
        raise ValueError(f'state_dict_type={state_dict_type!r} is neither "sharded" nor "full"')
    if async_save and state_dict_type == "full":
        raise ValueError(
            'async_save=True needs state_dict_type="sharded": a full file is gathered while training waits'
        )


def reduce_in_place(tensor: Any, *, group: Any, op: Any) -> Any:
    """Reduce as Lightning's own does, but without a barrier of all ranks before each value.

    Args:
        tensor: What is no tensor is returned as it is.
        group: None is all ranks.
        op: A ``ReduceOp`` or its name; "mean" and "avg" divide by the number of ranks, and None sums.
    """
    if not isinstance(tensor, Tensor) or not dist.is_initialized():
        return tensor
    mean = isinstance(op, str) and op.lower() in ("mean", "avg")
    named = getattr(dist.ReduceOp, op.upper()) if isinstance(op, str) and not mean else op
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM if mean or op is None else named, group=group)
    return tensor.copy_(tensor / dist.get_world_size(group)) if mean else tensor
