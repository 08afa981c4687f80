"""Frozen parameters that were on the meta device, and to which nothing has given weights: they are as initialized."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from lightning_mics._torch.state_dict import named_shards


class BaseWeights:
    """Which frozen parameters of a model have no weights of a base model.

    Args:
        model: The model, not sharded yet.
    """

    def __init__(self, model: nn.Module) -> None:
        frozen = [name for name, p in model.named_parameters() if p.is_meta and not p.requires_grad]
        self._names = {name.replace("_orig_mod.", "") for name in frozen}
        self._initialized: dict[str, tuple[Any, int]] = {}  # parameters by FQN, with their version then

    def sharded(self, model: nn.Module, *, read: Collection[str]) -> None:
        """Note the versions of parameters as they were initialized.

        Args:
            model: The sharded model.
            read: FQNs of parameters that were read from a folder.
        """
        shards = named_shards(model) if self._names else {}
        for name in self._names - set(read):
            if name in shards:
                self._initialized[name] = (shards[name], shards[name]._version)

    def unset(self) -> list[str]:
        """FQNs of the frozen parameters that are still as they were initialized."""
        return [name for name, (shard, version) in self._initialized.items() if shard._version == version]
