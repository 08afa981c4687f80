"""The keys under which a checkpoint stores optimizers and the states of ranks."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch.distributed as dist


def _numbered(entries: Sequence[Any]) -> dict[str, Any]:
    return {f"optimizer_{index}": entry for index, entry in enumerate(entries)}


def _of_rank(rank: int) -> str:
    return f"rank_{rank}"


def _source_of_rank_state(names: Set[str]) -> str:
    """Which rank's state this one gets from a checkpoint with these names."""
    as_many = _of_rank(dist.get_world_size() - 1) in names and _of_rank(dist.get_world_size()) not in names
    return _of_rank(dist.get_rank() if as_many else 0)
