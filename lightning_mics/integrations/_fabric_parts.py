"""What a state of Fabric holds that is saved or loaded: models, optimizers, and all else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_mics import checkpoint
from lightning_mics.sharding.sharded import Sharded, sharded

Filter = Mapping[str, Callable[[str, Any], bool]]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The objects in a state that is saved or loaded, by kind.

    Attributes:
        models: Models that were set up, by their keys.
        optimizers: Optimizers by their keys.
        rest: All else, by its keys.
    """

    models: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    rest: dict[str, Any]

    @property
    def model(self) -> nn.Module:
        """The model, or one that holds all of them under their keys."""
        only = next(iter(self.models.values()))
        return only if len(self.models) == 1 else nn.ModuleDict(self.models)

    @property
    def names(self) -> checkpoint.FullNames:
        """The names of models and optimizers in a full file."""
        several = list(self.models) if len(self.models) > 1 else []
        return checkpoint.FullNames(
            model=", ".join(sorted(self.models)), optimizers=list(self.optimizers), models=several
        )

    @property
    def first(self) -> Sharded:
        """The handle of the first model."""
        return sharded(next(iter(self.models.values())))

    def divided(self, model_state: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The state of each model by its key.

        Args:
            model_state: State of :attr:`model`.
        """
        if len(self.models) == 1:
            return dict.fromkeys(self.models, model_state)
        return {
            key: {name[len(key) + 1 :]: value for name, value in model_state.items() if name.startswith(f"{key}.")}
            for key in self.models
        }

    def joined(self, states: Mapping[str, Any]) -> dict[str, Any]:
        """The state of :attr:`model`.

        Args:
            states: State of each model by its key.
        """
        if len(self.models) == 1:
            return {name: value for key in self.models for name, value in states[key].items()}
        return {f"{key}.{name}": value for key in self.models for name, value in states[key].items()}

    @classmethod
    def of(cls, state: Mapping[str, Any], *, doing: str) -> Parts:
        """The parts of a state.

        Args:
            state: State given to Fabric, by its keys.
            doing: Name of the method of Fabric that was called, for the error.

        Raises:
            ValueError: If no model in it was set up.
        """
        models = {key: value for key, value in state.items() if isinstance(value, nn.Module) and "_mics" in vars(value)}
        if not models:
            raise ValueError(
                f"fabric.{doing} takes a model that was set up in its state, as in {{'model': model, 'optimizer': "
                "optimizer}}; it got none"
            )
        optimizers = {name: value for name, value in state.items() if isinstance(value, Optimizer)}
        rest = {name: value for name, value in state.items() if name not in models and name not in optimizers}
        return cls(models=models, optimizers=optimizers, rest=rest)


def filtered(value: Any, keeps: Callable[[str, Any], bool] | None) -> Any:
    """The entries of a dictionary that are kept; other values are returned unchanged.

    Args:
        value: Part of a state.
        keeps: Function of key and entry that returns whether the entry is kept; None keeps all.
    """
    if keeps is None or not isinstance(value, dict):
        return value
    return {key: entry for key, entry in value.items() if keeps(key, entry)}
