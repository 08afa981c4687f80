"""Optimizers that were made before the model was sharded: they hold the unsharded parameters, and get the shards."""

from __future__ import annotations

import weakref

from torch import nn
from torch.optim import Optimizer


class UnshardedParameters:
    """The names of a model's parameters before sharding, which replaces the parameters. It keeps none of them alive.

    Args:
        model: The model, not sharded yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(p): (weakref.ref(p), name) for name, p in model.named_parameters(remove_duplicate=False)}

    def exchange(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Replace the unsharded parameters in the groups of ``optimizer`` by those of the same names.

        Args:
            optimizer: Optimizer that has not stepped; other tensors in it are left alone.
            model: The model, sharded.

        Raises:
            ValueError: If the optimizer has stepped on unsharded parameters.
        """
        if not any(self._name(p) for group in optimizer.param_groups for p in group["params"]):
            return
        if optimizer.state:
            raise ValueError(
                f"{type(optimizer).__name__} has stepped before the model was sharded, so its state belongs to "
                "unsharded parameters; make it anew, and load states from a checkpoint"
            )
        sharded = dict(model.named_parameters(remove_duplicate=False))
        for group in optimizer.param_groups:
            names = [self._name(p) for p in group["params"]]
            group["params"] = [sharded[name] if name else p for p, name in zip(group["params"], names, strict=True)]

    def _name(self, parameter: nn.Parameter) -> str | None:
        known, name = self._names.get(id(parameter), (None, None))
        return name if known is not None and known() is parameter else None
