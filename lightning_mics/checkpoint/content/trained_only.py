"""Checkpoints of what trains alone, as ``save_frozen=False`` saves: adapters without the base model.

What is left out is every parameter that does not require gradients; buffers are kept. An entry of plain data says so.
Such a checkpoint resumes over the weights that the model has, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lightning_mics._torch.state_dict import frozen_names

TRAINED_ONLY_KEY = "mics_trained_only"

HOW_TO_GIVE = (
    "load the base model's weights first, with `from_pretrained` where the module is built or with "
    "`lightning_mics.load_pretrained(network, folder)`"
)


def model_state(model: nn.Module, *, full: bool, save_frozen: bool) -> dict[str, Any]:
    """The state of a model that is saved, by FQN; every rank calls it.

    Args:
        model: The sharded model.
        full: Whether tensors are unsharded, on rank 0 alone.
        save_frozen: Whether it has the parameters that do not require gradients.
    """
    if save_frozen:
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=full, cpu_offload=full))
    state = get_model_state_dict(model)
    if full:  # a `state_dict` of the user's own may have left out some already
        all_there = frozen_names(model) <= state.keys()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=all_there)
        state = get_model_state_dict(model, options=options)
    return without_frozen(state, model)


def without_frozen(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state without the parameters of ``model`` that do not require gradients.

    Args:
        state: State of the model, or of an average of it, by FQN.
        model: The sharded model.
    """
    frozen = frozen_names(model)
    return {name: value for name, value in state.items() if name not in frozen}


def trained_only_entry(model: nn.Module) -> dict[str, dict[str, int]]:
    """The entry of a checkpoint that has only what trains; empty where all trains.

    Args:
        model: The sharded model.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    left_out = {"tensors": len(frozen), "bytes": sum(p.numel() * p.element_size() for p in frozen)}
    return {TRAINED_ONLY_KEY: left_out} if frozen else {}


def left_out(entries: Mapping[str, Any]) -> str:
    """What a checkpoint leaves out, in words, from its entries; empty for nothing."""
    entry = entries.get(TRAINED_ONLY_KEY)
    if not isinstance(entry, Mapping):
        return ""
    return f"{entry.get('tensors')} frozen tensors of {entry.get('bytes'):,} bytes"


def with_base(state: Mapping[str, Any], own: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state of what trains, with the frozen parameters that the model has.

    Args:
        state: State in a checkpoint, by FQN.
        own: State of the sharded model.
        model: The sharded model.
    """
    base = {name: own[name] for name in frozen_names(model) if isinstance(own.get(name), Tensor)}
    return {**base, **state}
