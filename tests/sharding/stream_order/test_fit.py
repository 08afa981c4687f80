"""A fit of the Trainer on streams that run later: nothing waits between two boundaries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from tests.support.models import loader_of_tokens
from tests.support.stream_order.jobs import Network
from tests.support.stream_order.simulation import Simulation, simulated_streams
from tests.support.trainers import make_trainer, mics

STEPS, MICRO_STEPS = 20, 2
COUNTS = ("problems", "waits", "collectives")


class Module(pl.LightningModule):
    """Logs nothing, which would be a collective of the user's."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class BetweenBoundaries(Callback):
    """What was counted from the end of the first step to the end of the last."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self.steps = 0
        self.counted: dict[str, dict[Any, int]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 1 and not self.steps:
            for name in COUNTS:
                getattr(self._simulation, name).clear()
        self.steps = trainer.global_step
        if trainer.global_step == STEPS:
            self.counted = {name: dict(getattr(self._simulation, name)) for name in COUNTS}


def fit(folder: Path, options: dict[str, Any]) -> dict[str, dict[Any, int]]:
    """Fit on all ranks, with simulated streams on the first, and return what was counted there."""
    if dist.get_rank() > 0:
        fit_on_this_rank(folder, options, [])
        return {}
    with simulated_streams() as simulation:
        between = BetweenBoundaries(simulation)
        fit_on_this_rank(folder, options, [between])
    assert between.steps == STEPS
    return between.counted


def fit_on_this_rank(folder: Path, options: dict[str, Any], callbacks: list[Callback]) -> None:
    trainer = make_trainer(
        folder,
        strategy=mics(**options),
        max_steps=STEPS,
        accumulate_grad_batches=MICRO_STEPS,
        callbacks=callbacks,
        gradient_clip_val=1.0,
    )
    trainer.fit(Module(Network()), loader_of_tokens(STEPS * MICRO_STEPS * 8))


EVERYWHERE = {"partition_size": 4, "cache_parameters": "rank", "accumulate_gradients": "rank"}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"cache_parameters": "never", "accumulate_gradients": "shard"}, id="as in the paper"),
        pytest.param(EVERYWHERE, id="caches"),
    ],
)
def test_nothing_waits_between_the_boundaries_of_a_fit(
    tmp_path: Path, options: dict[str, Any], on_shared_ranks: Callable[..., list[Any]]
) -> None:
    counted = on_shared_ranks(fit, tmp_path, options)[0]
    assert counted["problems"] == {}
    ours = {place for place in counted["waits"] if place.startswith("package")}
    assert {place for place in ours if "control.py" not in place} == set()  # there ranks meet on the CPU
    collectives = counted["collectives"]
    assert collectives.pop("mics partition", 0) + collectives.pop("mics rail", 0) > STEPS
    assert collectives.keys() <= {"mics node", "mics replication"}
