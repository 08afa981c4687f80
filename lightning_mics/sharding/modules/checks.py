"""Which modules and parameters FSDP2 cannot shard, found before ranks communicate."""

from __future__ import annotations

import warnings
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


def warn_of_values_beside_weights(model: nn.Module) -> None:
    """Warn of modules that save values under the names of their weights, such as scales of 4-bit weights.

    The sharded parameter that takes the place of such a weight does not have them, so that saving the model fails.
    """
    if type(model).state_dict is not nn.Module.state_dict:  # it says itself what is saved
        return
    for name, module in model.named_modules():
        if type(module)._save_to_state_dict is nn.Module._save_to_state_dict:
            continue
        entries: dict[str, object] = {}
        module._save_to_state_dict(entries, "", keep_vars=True)
        beside = [entry for entry in entries if "." in entry and entry.partition(".")[0] in module._parameters]
        if beside:
            warnings.warn(
                f"{name or 'the root'} ({type(module).__name__}) saves values under the names of its weights, such as "
                f"{beside[0]!r}, which checkpoints of sharded models cannot hold: saving it will fail. Save what is "
                "trained alone, by a state_dict of the model's own or save_pretrained (docs/finetuning.md)",
                stacklevel=3,
            )
            return
