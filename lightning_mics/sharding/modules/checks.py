"""Which modules and parameters FSDP2 cannot shard, found before ranks communicate."""

from __future__ import annotations

from itertools import chain

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from lightning_mics._torch.fsdp import has_inner_tensors


def is_container(module: nn.Module) -> bool:
    """Whether ``module`` is a list or dictionary of modules that has no forward of its own."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict) and type(module).forward is nn.Module.forward


def check_shardable(model: nn.Module) -> None:
    """Check that a model is not sharded yet, and that its tensors are ordinary ones.

    Raises:
        TypeError: If not; the message names the module or tensor.
    """
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel | DistributedDataParallel | FSDPModule):
            raise TypeError(
                f"module {name or 'at the root'!r} ({type(module).__name__}) is already wrapped or sharded; "
                "pass the original module, it is sharded here"
            )
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        if isinstance(tensor, DTensor):
            raise TypeError(
                f"{kind} {name!r} is already a DTensor; pass the original module, it is sharded here, and not together "
                "with tensor, context or expert parallelism"
            )
        if is_lazy(tensor):
            raise TypeError(
                f"{kind} {name!r} has no shape yet: run one forward of the lazy module before it is sharded"
            )
        if has_inner_tensors(tensor):
            raise TypeError(
                f"{kind} {name!r} is a {type(tensor).__name__}, whose data are other tensors, as of quantized weights "
                "or float8 gathers; use ordinary tensors in float32 or bfloat16"
            )
