"""The unsharded state dict of a sharded module, for hooks and scripts that save or send it by themselves."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def full_state_dict(module: nn.Module) -> dict[str, Any]:
    """The whole ``state_dict()`` of a module on rank 0, on the CPU; every rank calls it, in any hook or none.

    ::

        state = lightning_mics.full_state_dict(self.net)  # on every rank
        if self.trainer.is_global_zero:
            torch.save(state, "weights.pt")  # or self.net.save_pretrained("folder", state_dict=state)

    One tensor after the other is gathered, so that a GPU holds one unsharded at a time.

    Args:
        module: A sharded model, a module in it, or one that holds it.

    Returns:
        Unsharded tensors, [any], and extra states by name on rank 0; nothing on the other ranks.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    state = {}
    for name, value in module.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if first:
            state[name] = whole.detach().to("cpu", copy=True) if isinstance(whole, Tensor) else whole
    return state


def reject_saving_of_shards(model: nn.Module) -> None:
    """Let ``save_pretrained`` of modules in ``model`` raise where it would write one rank's shards.

    Args:
        model: The sharded model.
    """
    for module in model.modules():
        if callable(getattr(type(module), "save_pretrained", None)):
            vars(module)["save_pretrained"] = SavePretrained(module)


class SavePretrained:
    """``save_pretrained`` of a module, with the state dict that a sharded one needs.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save with the ``state_dict`` that is given.

        Raises:
            RuntimeError: If none is given, and the module is sharded.
        """
        kind = type(self._module)
        sharded = isinstance(self._module, FSDPModule) or any(
            isinstance(parameter, DTensor) for parameter in self._module.parameters()
        )
        if sharded and kwargs.get("state_dict") is None:
            raise RuntimeError(
                f"{kind.__name__} is sharded, so `save_pretrained` needs its whole state: call `state = "
                "lightning_mics.full_state_dict(network)` on every rank, and `network.save_pretrained(folder, "
                "state_dict=state)` on rank 0"
            )
        save: Any = kind.save_pretrained  # type: ignore[attr-defined]
        return save(self._module, *args, **kwargs)
