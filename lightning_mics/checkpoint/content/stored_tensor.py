"""Tensors of a checkpoint that are read when they are used: what hooks see before anything is loaded.

Lightning shows ``on_load_checkpoint`` the whole checkpoint, which no rank could hold. These stand for its tensors: they
have shape and dtype, can be renamed, dropped and passed on without being read, and any operation reads all of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class StoredValue:
    """A value of a checkpoint that is no tensor, and not read yet.

    Attributes:
        key: Name of the value in the checkpoint.
    """

    key: str


class StoredTensor(Tensor):
    """A tensor of a checkpoint that is not read yet.

    Attributes:
        key: Name of the tensor in the checkpoint.
        split_dim: Dimension along which it is stored in several parts; None if it is stored in one.
        read: The tensor, [any], once an operation needed it; None before.
    """

    key: str
    split_dim: int | None
    read: Tensor | None
    _fetch: Callable[[str], Tensor]

    @staticmethod
    def __new__(
        cls,
        key: str,
        *,
        size: torch.Size,
        dtype: torch.dtype,
        fetch: Callable[[str], Tensor],
        split_dim: int | None = None,
    ) -> StoredTensor:
        """A tensor that is read by ``fetch(key)``, by this process alone, when it is used."""
        tensor: StoredTensor = Tensor._make_wrapper_subclass(cls, size, dtype=dtype)
        tensor.key, tensor.split_dim, tensor.read, tensor._fetch = key, split_dim, None, fetch
        return tensor

    def values(self) -> Tensor:
        """The tensor on the CPU, [any]; read once."""
        if self.read is None:
            self.read = self._fetch(self.key)
        return self.read

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StoredTensor({self.key!r}, size={tuple(self.size())}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredTensor:
        """Another stand-in for the same tensor, which is not read for it."""
        made = StoredTensor(self.key, size=self.size(), dtype=self.dtype, fetch=self._fetch, split_dim=self.split_dim)
        made.read = None if self.read is None else self.read.clone()
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        plain_args, plain_kwargs = tree_map_only(StoredTensor, StoredTensor.values, (args, dict(kwargs or {})))
        result = function(*plain_args, **plain_kwargs)
        for given in args:  # an operation in place returns the object it was given
            if isinstance(given, StoredTensor) and result is given.read:
                return given
        return result


def untouched(value: Any) -> bool:
    """Whether ``value`` stands for something that is not read yet."""
    return isinstance(value, StoredValue) or (isinstance(value, StoredTensor) and value.read is None)
