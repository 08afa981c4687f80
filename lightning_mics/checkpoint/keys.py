"""The keys of a sharded checkpoint: one for the model, one per optimizer, one per rank."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch.distributed as dist

MODEL_KEY = "model"


def optimizer_entries(entries: Sequence[Any]) -> dict[str, Any]:
    """Entries of several optimizers, in order, under the key of each."""
    return {f"optimizer_{index}": entry for index, entry in enumerate(entries)}


def rank_key(rank: int) -> str:
    """The key of the state that belongs to ``rank`` alone."""
    return f"rank_{rank}"


def rank_key_to_load(keys: Set[str]) -> str:
    """The key of the state that this rank loads from a checkpoint with these ``keys``.

    It is the rank's own if as many ranks have saved the checkpoint as load it, and rank 0's otherwise.
    """
    ranks = dist.get_world_size()
    saved_by_as_many = rank_key(ranks - 1) in keys and rank_key(ranks) not in keys
    return rank_key(dist.get_rank() if saved_by_as_many else 0)
