"""The content of a checkpoint, known but not loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_mics.checkpoint.content.layout import FullNames
from lightning_mics.checkpoint.content.state_record import StateRecord

Read = Callable[[Mapping[str, Tensor | None]], Mapping[str, Any]]


def nothing_to_read(targets: Mapping[str, Tensor | None]) -> Mapping[str, Any]:
    """Read from a file whose tensors are mapped to memory: no tensor in it is unread."""
    return {}


@dataclass(kw_only=True)
class OpenedCheckpoint:
    """What a checkpoint holds, sharded or full; tensors of sharded ones are not read yet.

    Attributes:
        model: State of the model by FQN.
        optimizers: States of optimizers, in their order; by FQN, or by number as in one process.
        entries: Everything else.
        rank_states: States of single ranks, by their keys.
        names: Keys that the user has given the model and the optimizers; None if they are not recorded.
        numbered: FQNs of the parameters of each optimizer in the order of their numbers, where states are by number and
            the checkpoint knows the names.
        record: What the checkpoint says of its own sharding; None if it says nothing.
        read: Function that fills tensors by the names of unread ones, in place; every rank calls it.
    """

    model: dict[str, Any]
    optimizers: list[dict[str, Any]]
    entries: dict[str, Any]
    rank_states: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    names: FullNames | None = None
    numbered: list[list[str]] = field(default_factory=list)
    record: StateRecord | None = None
    read: Read = nothing_to_read
