"""What DeepSpeed 0.18.9 needs at run time before its MiCS trains on torch 2.13. MiCS has left DeepSpeed in 0.19.7."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed import comm
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime.zero import mics
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _coalescing_manager


def apply_mends() -> list[str]:
    """Mend MiCS in this process; returns a line on each mend."""
    return [mend() for mend in (_mend_coalesced_gather, _mend_wait, _mend_persistent_gather, _mend_scaling)]


def _mend_coalesced_gather() -> str:
    """DeepSpeed issue 5080.

    Inside a coalescing manager of torch, each all-gather returns a stand-in that raises when it is waited for.
    DeepSpeed keeps the last of them instead of the manager, so nothing waits for parameters to arrive. It also passes
    the manager a device, which asks the backend for a kind of coalescing that gloo does not have; without it torch
    records the all-gathers and makes one collective of them.
    """

    def all_gather_coalesced(
        self: TorchBackend,
        output_tensors: list[Tensor],
        input_tensors: list[Tensor],
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        with _coalescing_manager(group, async_ops=True) as gathering:
            for gathered, part in zip(output_tensors, input_tensors, strict=True):
                dist.all_gather_into_tensor(gathered, part, group=group, async_op=True)
        if async_op:
            return gathering
        gathering.wait()
        return None

    TorchBackend.all_gather_coalesced = all_gather_coalesced
    return "a coalesced all-gather is waited for as a whole (DeepSpeed issue 5080), and works on gloo"


def _mend_wait() -> str:
    """MiCS logs and ignores whatever goes wrong in an all-gather, and declares its parameters available anyway."""

    def wait(self: mics.MiCS_AllGatherCoalescedHandle, **_: Any) -> None:
        if self.complete:
            return
        self.allgather_handle.wait()
        for parameter in self.params:
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self.complete = True

    mics.MiCS_AllGatherCoalescedHandle.wait = wait
    return "a failed all-gather of parameters raises instead of being logged and ignored"


def _mend_persistent_gather() -> str:
    """After each optimizer step the parameters that stay gathered are loaded anew, one all-gather for each of them.

    DeepSpeed waits for the last all-gather alone. That is enough on one stream of a GPU, but gloo runs several at a
    time: now and then a rank computes with parameters that have not arrived. DeepSpeed 0.19.8 waits for all.
    """

    def gather(self: Init, parameters: list[nn.Parameter], hierarchy: int = 0, quantize: bool = False) -> None:
        if not parameters:
            return
        parts = [parameter.ds_tensor.view(-1) for parameter in parameters]
        gathered = [torch.empty(part.numel() * self.num_partitions, dtype=part.dtype) for part in parts]
        comm.all_gather_coalesced(gathered, parts, group=self.get_partition_dp_group(parameters[0]))
        for parameter, whole in zip(parameters, gathered, strict=True):
            parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)

    Init._allgather_params_coalesced = gather
    return "parameters that stay gathered are waited for after each optimizer step, all of them and not the last alone"


def _mend_scaling() -> str:
    """The division of gradients by the number of replicas goes through ``torch.compile``.

    That needs a C++ compiler on CPUs, compiles again in the middle of training when the number of gradients in a bucket
    changes, and does in seconds what a division does in microseconds.
    """
    mics.scale_tensors = torch._foreach_div_
    return "gradients are divided by the number of replicas without torch.compile"
