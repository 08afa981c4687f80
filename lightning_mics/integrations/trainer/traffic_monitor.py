"""A callback that reports traffic: megabytes inside nodes and between nodes, per optimizer step and node.

The collectives count their own messages; reading the counts does not communicate, and does not synchronize with the
device. At the end of ``fit`` rank 0 logs them by technique::

    Traffic of one node per optimizer step: 2 steps of 0.869 s, 57.9 Mbit/s between nodes
      technique                 MB inside nodes  MB between nodes  share between nodes
      gather along rails                  0.000             2.097                33.3%
      gather inside nodes                33.554             0.000                 0.0%
      reduce inside nodes                16.777             0.000                 0.0%
      reduce along rails                  0.000             2.097                33.3%
      all-reduce over replicas            0.000             2.097                33.3%
      all                                50.332             6.291               100.0%
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_mics.collectives.traffic import Sent
from lightning_mics.integrations.trainer.strategy import MiCSStrategy


@dataclass(frozen=True)
class _Count:
    """Optimizer steps, their duration in seconds, and the bytes that one rank sent in them, by technique."""

    steps: int = 0
    seconds: float = 0.0
    sent: Mapping[str, Sent] = field(default_factory=dict)

    def __sub__(self, earlier: _Count) -> _Count:
        sent = {name: sent - earlier.sent.get(name, Sent()) for name, sent in self.sent.items()}
        return _Count(self.steps - earlier.steps, self.seconds - earlier.seconds, sent)

    def megabytes(self, *, ranks_per_node: int) -> dict[str, tuple[float, float]]:
        """Megabytes that a node sent per step, inside it and to other nodes, by technique."""
        scale = ranks_per_node / self.steps / 1e6
        return {name: (sent.inside_bytes * scale, sent.between_bytes * scale) for name, sent in self.sent.items()}


class TrafficMonitor(pl.Callback):
    """Logs what one node sends per optimizer step, and how long a step takes.

    Every ``log_every_n_steps`` of the Trainer, and at the end for the remaining steps, its loggers receive averages
    since the last time::

        traffic/between_nodes_mb_per_step    also by technique: traffic/between_nodes_mb_per_step/gather_along_rails
        traffic/inside_nodes_mb_per_step     also by technique
        traffic/between_nodes_mbit_per_s
        traffic/seconds_per_step

    and the progress bar receives ``between_nodes_mb``. A MB is 1e6 bytes. Steps are counted by ``trainer.global_step``,
    which counts each optimizer's steps. Traffic and time of validation are left out, and so are those of a window that
    ends without a step. Seconds are measured by the CPU's clock: on a GPU only their averages are meaningful.
    """

    def __init__(self) -> None:
        self._start = _Count()  # counts at the start of training, plus those of validation since
        self._paused: _Count | None = None  # counts without validation, while a validation runs
        self._done = _Count()  # up to the last step
        self._logged = _Count()
        self._row = 0  # step under which Lightning logs its own metrics
        self._log_every = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        _mics(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self._paused = _read(trainer), None
        self._done = self._logged = _Count()
        self._log_every = trainer.log_every_n_steps  # type: ignore[attr-defined]

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._paused is None:
            self._paused = _read(trainer) - self._start

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._paused is not None:
            self._start, self._paused = _read(trainer) - self._paused, None

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._start.steps + self._done.steps:
            return
        self._done = _read(trainer) - self._start
        self._row = trainer.fit_loop.epoch_loop._batches_that_stepped
        every, logged = self._log_every, self._start.steps + self._logged.steps
        if every and trainer.global_step // every > logged // every:
            between_nodes_mb = self._log(trainer)["traffic/between_nodes_mb_per_step"]
            value = torch.tensor(between_nodes_mb)  # on the CPU: displaying a GPU tensor would synchronize
            pl_module.log("between_nodes_mb", value, prog_bar=True, logger=False)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._log_every and self._done.steps > self._logged.steps:
            self._log(trainer)
        if self._done.steps:
            rank_zero_info(_table(self._done, ranks_per_node=_mics(trainer).topology.ranks_per_node))

    def _log(self, trainer: pl.Trainer) -> dict[str, float]:
        metrics = _metrics(self._done - self._logged, ranks_per_node=_mics(trainer).topology.ranks_per_node)
        self._logged = self._done
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._row)
        return metrics


def _read(trainer: pl.Trainer) -> _Count:
    return _Count(trainer.global_step, time.perf_counter(), _mics(trainer).traffic.by_technique())


def _mics(trainer: pl.Trainer) -> MiCSStrategy:
    if isinstance(trainer.strategy, MiCSStrategy):
        return trainer.strategy
    raise MisconfigurationException(
        f"TrafficMonitor reads the counts of strategy 'mics'; {type(trainer.strategy).__name__} counts nothing: "
        'use Trainer(strategy="mics"), or remove the callback'
    )


def _metrics(count: _Count, *, ranks_per_node: int) -> dict[str, float]:
    megabytes = count.megabytes(ranks_per_node=ranks_per_node)
    metrics = {"traffic/seconds_per_step": count.seconds / count.steps}
    for column, where in enumerate(("inside_nodes", "between_nodes")):
        by_technique = {name: both[column] for name, both in megabytes.items() if both[column]}
        total = f"traffic/{where}_mb_per_step"
        metrics[total] = sum(by_technique.values())
        metrics |= {f"{total}/{name.replace(' ', '_').replace('-', '_')}": mb for name, mb in by_technique.items()}
    metrics["traffic/between_nodes_mbit_per_s"] = _mbit_per_s(metrics[total], count)
    return metrics


def _mbit_per_s(mb_per_step: float, count: _Count) -> float:
    return 8 * mb_per_step * count.steps / count.seconds


def _table(count: _Count, *, ranks_per_node: int) -> str:
    rows = count.megabytes(ranks_per_node=ranks_per_node)
    total = (sum(inside for inside, _ in rows.values()), sum(between for _, between in rows.values()))
    width = max(map(len, (*rows, "technique")))
    lines = [
        f"Traffic of one node per optimizer step: {count.steps} steps of {count.seconds / count.steps:.3f} s, "
        f"{_mbit_per_s(total[1], count):,.1f} Mbit/s between nodes",
        f"  {'technique':<{width}}  MB inside nodes  MB between nodes  share between nodes",
    ]
    for name, (inside, between) in {**rows, "all": total}.items():
        share = between / total[1] if total[1] else 0.0
        lines.append(f"  {name:<{width}}  {inside:>15,.3f}  {between:>16,.3f}  {share:>19.1%}")
    return "\n".join(lines)
