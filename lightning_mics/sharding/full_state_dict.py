"""The unsharded state dict of a sharded module, for hooks and scripts that save or send it by themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_mics.collectives.agreement import on_rank_0


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
    return _gathered(module.state_dict())


def _gathered(state: Mapping[str, Any]) -> dict[str, Any]:
    first = not dist.is_initialized() or dist.get_rank() == 0
    gathered = {}
    for name, value in state.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if first:
            gathered[name] = whole.detach().to("cpu", copy=True) if isinstance(whole, Tensor) else whole
    return gathered


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

    A model of ``peft`` gathers its adapters by itself, if every rank calls it.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save with the ``state_dict`` that is given, or adapters alone.

        Raises:
            RuntimeError: If none is given, and the module is sharded and has no adapters.
        """
        kind = type(self._module)
        sharded = isinstance(self._module, FSDPModule) or any(
            isinstance(parameter, DTensor) for parameter in self._module.parameters()
        )
        save: Any = kind.save_pretrained  # type: ignore[attr-defined]
        if sharded and kwargs.get("state_dict") is None:
            find = _finds_adapters(kind)
            if find is not None:
                kwargs["state_dict"] = _gathered(_adapters(self._module, find))
                with _with_prompts(self._module):
                    on_rank_0(lambda: save(self._module, *args, **kwargs))
                return None
            raise RuntimeError(
                f"{kind.__name__} is sharded, so `save_pretrained` needs its whole state: call `state = "
                "lightning_mics.full_state_dict(network)` on every rank, and `network.save_pretrained(folder, "
                "state_dict=state)` on rank 0"
            )
        return save(self._module, *args, **kwargs)


def _finds_adapters(kind: type) -> Any:
    """The function of ``peft`` that finds the adapters in a state dict; None if ``kind`` is no class of ``peft``."""
    makers = (sys.modules.get(base.__module__) for base in kind.__mro__ if base.__module__.startswith("peft."))
    return next((vars(each)[_OF_PEFT] for each in makers if each is not None and _OF_PEFT in vars(each)), None)


_OF_PEFT = "get_peft_model_state_dict"


@contextmanager
def _with_prompts(module: Any) -> Iterator[None]:
    """Inside, ``peft`` has prompts that are computed already: it would use sharded parameters on one rank."""
    learned = [name for name, config in module.peft_config.items() if config.is_prompt_learning]
    prompts = {name: module.get_prompt_embedding_to_save(name) for name in learned}
    prompts = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in prompts.items()}
    if learned:
        vars(module)["get_prompt_embedding_to_save"] = prompts.__getitem__
    try:
        yield
    finally:
        vars(module).pop("get_prompt_embedding_to_save", None)


def _adapters(module: Any, find: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The entries of the state dict of ``module``, sharded, that ``peft`` saves for its adapters."""
    state = module.state_dict()
    stand_ins = {
        name: torch.empty(value.shape, dtype=value.dtype, device="meta")
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    tuned = [adapter for adapter, config in module.peft_config.items() if not config.is_prompt_learning]
    found = [find(module, state_dict=dict(stand_ins), adapter_name=adapter) for adapter in tuned]
    saved = {id(value) for of_adapter in found for value in of_adapter.values()}
    return {name: state[name] for name, stand_in in stand_ins.items() if id(stand_in) in saved}
