"""What a sharded checkpoint does not say by itself about the states of optimizers and modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_mics.checkpoint.content.containers import ContainerRecord, leaves, nested
from lightning_mics.checkpoint.content.placing import settled, shard_dim
from lightning_mics.checkpoint.content.quantized import QUANTIZED_KEY, dequantized, inner_bytes, is_quantized


@dataclass(frozen=True)
class StateRecord:
    """What a sharded checkpoint of optimizers does not say by itself; plain data.

    Attributes:
        containers: Containers other than lists and dicts of strings.
        dims: The dimension along which a tensor is sharded, by dotted name, where it is sharded otherwise than the
            parameter; None for a plain tensor of the parameter's shape.
        quantized: Names of tensors whose values are saved beside their quantized form.
    """

    containers: ContainerRecord = field(default_factory=ContainerRecord)
    dims: dict[str, int | None] = field(default_factory=dict)
    quantized: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """The record as an entry of a checkpoint."""
        return {
            "tuples": self.containers.tuples,
            "keys": self.containers.keys,
            "dims": self.dims,
            "quantized": self.quantized,
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> StateRecord:
        """The record in an entry that :meth:`plain` has made.

        Raises:
            KeyError: If a part is missing.
            TypeError: If a part is of another type.
        """
        for name, kind in {"tuples": list, "keys": dict, "dims": dict, "quantized": list}.items():
            if not isinstance(plain[name], kind):
                raise TypeError(f"{name} is a {type(plain[name]).__name__}")
        containers = ContainerRecord(tuples=plain["tuples"], keys=plain["keys"])
        return cls(containers=containers, dims=plain["dims"], quantized=plain["quantized"])

    def describe(self, state: dict[str, Any], key: str, shards: Mapping[str, Tensor]) -> dict[str, Any]:
        """Turn a state by FQN into what a sharded checkpoint can hold, and note the rest; every rank calls it.

        Args:
            state: State by FQN, from :func:`~lightning_mics.checkpoint.optimizer_states.optimizer_state`.
            key: Key of the state in the checkpoint.
            shards: The model's parameters by FQN.
        """
        values: dict[tuple[Any, ...], Any] = {}
        quantized: dict[tuple[Any, ...], Any] = {}
        for path, value in leaves(self.containers.simplify(state, key)):
            values[path] = self.described(value, ".".join(map(str, (key, *path))), _parameter(path, shards))
            if is_quantized(value):
                quantized[path] = value
        values.update({(QUANTIZED_KEY, place): inner for place, inner in inner_bytes(quantized).items()})
        return nested(values) if values else {}

    def described(self, value: Any, name: str, parameter: Tensor | None) -> Any:
        """A value to write; every rank calls it.

        Args:
            value: A tensor, sharded or not, or anything else.
            name: Dotted name of the value in the checkpoint.
            parameter: Parameter, [any], that a tensor of this name is sharded like, if it has the parameter's shape.
        """
        if not isinstance(value, Tensor):
            return value
        if is_quantized(value):
            self.quantized.append(name)
            value = dequantized(value)
        follows = isinstance(value, DTensor) and parameter is not None and value.shape == parameter.shape
        if isinstance(value, DTensor):
            dim = shard_dim(value)
            value = settled(value)
            if not follows or not isinstance(value, DTensor):
                self.dims[name] = dim
        elif parameter is not None and value.shape == parameter.shape:
            self.dims[name] = None
        return value


def _parameter(path: tuple[Any, ...], shards: Mapping[str, Tensor]) -> Tensor | None:
    """The parameter whose state has ``path``, relative to the optimizer's own."""
    return shards.get(path[1]) if len(path) > 1 and path[0] == "state" else None
