"""LoRA adapters of ``peft`` on a network."""

from __future__ import annotations

from typing import Any

from torch import nn


def with_adapters(network: nn.Module, adapters: dict[str, Any]) -> nn.Module:
    """``network`` with adapters, which are trained in place of its weights.

    Args:
        network: A network of ``transformers``, which may be on the meta device.
        adapters: Arguments of ``LoraConfig``.

    Raises:
        ImportError: If ``peft`` is not installed.
        ValueError: If an argument is unknown, or fits no layer of the network.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("model.adapters needs peft: pip install peft") from error
    try:
        config = LoraConfig(**adapters)
    except TypeError as error:
        raise ValueError(f"model.adapters={adapters}: {error}") from error
    made: nn.Module = get_peft_model(network, config)
    return made
