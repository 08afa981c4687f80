"""Saving and loading sharded training states, also at another partition size."""

from lightning_mics.checkpoint.content.layout import FullNames
from lightning_mics.checkpoint.errors import (
    CheckpointMismatchError,
    DamagedCheckpointError,
    SilentRankError,
    UnsafeCheckpointError,
)
from lightning_mics.checkpoint.full_file import gather_rank_states, load_raw, save_full, save_whole
from lightning_mics.checkpoint.loading import load, load_opened
from lightning_mics.checkpoint.saving import prepare_sharded, save_sharded

__all__ = [
    "CheckpointMismatchError",
    "DamagedCheckpointError",
    "FullNames",
    "SilentRankError",
    "UnsafeCheckpointError",
    "gather_rank_states",
    "load",
    "load_opened",
    "load_raw",
    "prepare_sharded",
    "save_full",
    "save_sharded",
    "save_whole",
]
