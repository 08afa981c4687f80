"""Content of full files that other programs have written, under the keys of the Trainer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_mics.checkpoint.foreign.roles import MODEL_KEYS
from lightning_mics.checkpoint.foreign.translation import unwrapped

STATE, OPTIMIZERS = "state_dict", "optimizer_states"  # keys of the Trainer


def rearranged(content: dict[Any, Any]) -> dict[str, Any]:
    """Find the model and the optimizers in a file, where their keys are not the user's.

    A bare ``state_dict`` is the model; states beside ``state_dict`` are the optimizers; and what
    ``dcp_to_torch_save`` writes of a checkpoint of this package, or of an object with a state, is like the original.

    Args:
        content: Content of the file, which is not changed.
    """
    only = next(iter(content.values())) if len(content) == 1 else None
    if isinstance(only, dict) and any(isinstance(only.get(key), dict) for key in MODEL_KEYS):
        content = only  # as in {"app": {"model": ..., "optim": ...}}
    if any(map(_is_tensor, content.values())) and all(_of_model(name, value) for name, value in content.items()):
        return {STATE: content}
    if STATE not in content or OPTIMIZERS in content:
        return content
    found = {key: value for key, value in content.items() if is_optimizer(value)}
    numbered = {key: value for key, value in found.items() if re.fullmatch(r"optimizer_\d+", key)}
    states = [numbered[key] for key in sorted(numbered, key=lambda key: int(key[10:]))] or list(found.values())
    second = ("model",) if numbered else ()  # the same tensors as under the Trainer's key
    rest = {key: value for key, value in content.items() if key not in found and key not in second}
    return {**rest, **({OPTIMIZERS: states} if states else {})}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _of_model(name: Any, value: Any) -> bool:
    return _is_tensor(value) or str(name).endswith("_extra_state")


def is_optimizer(value: Any) -> bool:
    """Whether ``value`` is the state of an optimizer."""
    return isinstance(value, dict) and "param_groups" in value


def model_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a model by its FQNs, without the parts that modules around others add.

    Args:
        state: State of the model, possibly compiled or wrapped.
    """
    return {unwrapped(name): value for name, value in state.items()}
