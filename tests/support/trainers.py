"""Trainers on forked ranks: one machine with four CPU processes that count as two nodes of two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities import registry

from lightning_mics import MiCSStrategy
from tests.support.forked import run_cases, run_ranks
from tests.support.models import loader_of_tokens as loader

# or each Trainer and each Fabric would read what every installed package says about itself
registry.entry_points = cache(registry.entry_points)
for group in ("lightning.pytorch.callbacks_factory", "lightning.fabric.callbacks_factory"):
    registry.entry_points(group=group)  # here, for all ranks that are forked
with suppress(ImportError):  # or each rank with a ModelCheckpoint would, to see whether its folder is in a store
    import s3fs  # noqa: F401


def on_ranks(function: Callable[..., Any], *args: Any, world_size: int = 4, timeout: float = 180) -> list[Any]:
    """Run ``function`` on forked ranks that look to Lightning as if torchrun had started them."""
    return run_ranks(world_size, function, *args, timeout=timeout, env=partial(as_torchrun, world_size))


def cases_on_ranks(
    cases: Mapping[Any, Callable[[], Any]], *, world_size: int = 4, timeout: float = 180
) -> dict[Any, list[Any]]:
    """Run several functions one after the other on the same such ranks; by case the results in the order of ranks."""
    return run_cases(world_size, cases, timeout=timeout, env=partial(as_torchrun, world_size))


def as_torchrun(world_size: int, rank: int) -> dict[str, str]:
    """The environment of a rank that torchrun has started."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",  # unused: the ranks have met before Lightning starts
        "TORCHELASTIC_RUN_ID": "forked",
    }


def mics(**options: Any) -> MiCSStrategy:
    """The strategy with partition groups of one "node" of two ranks, unless told otherwise."""
    return MiCSStrategy(**{"ranks_per_node": 2, **options})


def make_trainer(folder: Path | str, *, strategy: Any = None, devices: int = 4, **options: Any) -> pl.Trainer:
    """A quiet Trainer on CPU ranks that writes to ``folder`` only."""
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=mics() if strategy is None else strategy,
        default_root_dir=folder,
        **{**quiet, **options},
    )


__all__ = ["cases_on_ranks", "loader", "make_trainer", "mics", "on_ranks"]
