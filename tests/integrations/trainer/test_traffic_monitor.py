"""The monitor's numbers equal the bytes that the design predicts, per node and optimizer step."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mics import CommunicationOptions
from lightning_mics.integrations.trainer.traffic_monitor import TrafficMonitor
from tests.support.campaign import campaign
from tests.support.forked import RankError, Run
from tests.support.models import BLOCK_NUMEL, BYTES, DIM, LAYERS, MODEL_BYTES, Stack
from tests.support.recorded import Collective, RecordCollectives
from tests.support.trainers import make_trainer, mics

GATHERED = MODEL_BYTES + LAYERS * BLOCK_NUMEL * BYTES  # forward all, backward all but the root


S = 2


BETWEEN, INSIDE = "traffic/between_nodes_mb_per_step", "traffic/inside_nodes_mb_per_step"


SECONDS, RATE = "traffic/seconds_per_step", "traffic/between_nodes_mbit_per_s"


PAPER, NODE, RANK = CommunicationOptions.PAPER, CommunicationOptions.NODE, CommunicationOptions.RANK


class StackModule(pl.LightningModule):
    """Equal layers, so that no shard needs padding and the formulas are exact."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.stack(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.stack(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ByHand(StackModule):
    """Manual optimization: each of ``optimizers`` steps in every second micro-step, or none ever does."""

    def __init__(self, *, optimizers: int, steps: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._count, self._steps = optimizers, steps

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        boundary = batch_idx % 2 == 1
        if not boundary:
            with self.trainer.strategy.block_backward_sync():
                self.manual_backward(self.stack(batch))
            return
        self.manual_backward(self.stack(batch))
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            if self._steps:
                optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return [torch.optim.SGD(parameters[i :: self._count], lr=0.1) for i in range(self._count)]


class Rows(DummyLogger):
    """Records what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))


def batches(micro_steps: int, *, ranks: int = 4) -> DataLoader[Any]:
    return DataLoader(torch.randn(micro_steps * ranks, DIM), batch_size=1)


def fit(folder: Path, micro_steps: int, *, module: Any = None, strategy: Any = None, **options: Any) -> Any:
    """Rows logged, MB per step between nodes that all traffic would make, and the table if rank 0 has shown one."""
    rows, ranks = Rows(), options.get("devices", 4)
    options = {"log_every_n_steps": 1, "num_sanity_val_steps": 0, **options}
    strategy = strategy or mics(**NODE.keywords())
    trainer = make_trainer(folder, logger=rows, strategy=strategy, callbacks=[TrafficMonitor()], **options)
    messages = _messages()
    trainer.fit(module or StackModule(), batches(micro_steps, ranks=ranks), batches(2, ranks=ranks))
    topology, traffic = trainer.strategy.topology, trainer.strategy.traffic.by_technique().values()
    sent = sum(sent.inside_bytes for sent in traffic) * topology.ranks_per_node
    return rows.rows, sent / max(1, trainer.global_step) / 1e6, [m for m in messages if m.startswith("Traffic")]


def _messages() -> list[str]:
    """What rank 0 shows from now on."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return messages


def _fit_shape(folder: Path, options: dict[str, Any], world: int) -> Any:
    rows, *_ = fit(
        folder, 2 * S, strategy=mics(**options), devices=world, accumulate_grad_batches=S, limit_val_batches=0
    )
    return rows


def expected_mb(p: int, *, world: int, k: int, schedule: CommunicationOptions) -> dict[str, tuple[float, float]]:
    """Bytes that a node sends in a step of S micro-steps, inside and between, in MB: facts of the paper's section 3."""
    gathered_inside, reduced_inside = (
        (MODEL_BYTES, MODEL_BYTES) if schedule == RANK else (S * GATHERED, S * MODEL_BYTES)
    )
    gathered, reduced = (S * GATHERED, S * MODEL_BYTES) if schedule == PAPER else (MODEL_BYTES, MODEL_BYTES)
    if p <= k:
        rows = {
            "gather_in_partition_groups": (gathered_inside * (p - 1) / p, 0),
            "reduce_in_partition_groups": (reduced_inside * (p - 1) / p, 0),
        }
    else:
        rows = {
            "gather_along_rails": (0, gathered * (p - k) / (p * k)),
            "gather_inside_nodes": (gathered_inside * (k - 1) / k, 0),
            "reduce_along_rails": (0, reduced * (p - k) / (p * k)),
            "reduce_inside_nodes": (reduced_inside * (k - 1) / k, 0),
        }
    if p < world:
        rows["all_reduce_over_replicas"] = (0, 2 * MODEL_BYTES / p * (world - p) / world)
    return {name: (inside * k / 1e6, between * k / 1e6) for name, (inside, between) in rows.items()}


@pytest.mark.parametrize(
    ("world", "p", "schedule"),
    [
        pytest.param(4, 2, NODE, id="p is a node"),
        pytest.param(4, 4, PAPER, id="p spans nodes, every use"),
        pytest.param(4, 4, NODE, id="p spans nodes, once per step"),
        campaign(8, 4, NODE, id="replicas that span nodes"),
        pytest.param(4, 2, RANK, id="p is a node, kept by ranks"),
        pytest.param(8, 4, RANK, id="replicas that span nodes, kept by ranks"),
    ],
)
def test_a_step_sends_what_the_design_says(
    tmp_path: Path, world: int, p: int, schedule: CommunicationOptions, on_shared_ranks: Run
) -> None:
    options = {"partition_size": p, **schedule.keywords()}
    expected = expected_mb(p, world=world, k=2, schedule=schedule)
    least = 2 * MODEL_BYTES * (world // 2 - 1) / (world // 2) / 1e6
    for rows in on_shared_ranks(_fit_shape, tmp_path, options, world, world_size=world):
        assert [step for step, _ in rows] == [0, 1]
        for _, metrics in rows:
            measured = {name: value for name, value in metrics.items() if name not in (SECONDS, RATE)}
            assert measured == pytest.approx(_flat(expected), rel=1e-12)
            assert (measured[BETWEEN] == pytest.approx(least, rel=1e-12)) == (schedule != PAPER)
            assert metrics[RATE] == pytest.approx(8 * metrics[BETWEEN] / metrics[SECONDS])


def _flat(expected: dict[str, tuple[float, float]]) -> dict[str, float]:
    flat = {INSIDE: sum(i for i, _ in expected.values()), BETWEEN: sum(b for _, b in expected.values())}
    for name, (inside, between) in expected.items():
        flat |= {f"{INSIDE}/{name}": inside} if inside else {}
        flat |= {f"{BETWEEN}/{name}": between} if between else {}
    return flat


def test_loggers_get_averages_every_n_steps_and_of_the_remaining_steps_at_the_end(
    tmp_path: Path, on_shared_ranks: Run
) -> None:
    for rows, *_ in on_shared_ranks(_fit_seven_steps, tmp_path):
        assert [step for step, _ in rows] == [2, 5, 6]
        assert [metrics[BETWEEN] for _, metrics in rows] == pytest.approx([rows[0][1][BETWEEN]] * 3)
        assert rows[0][1][BETWEEN] > 0
        assert all(metrics[SECONDS] > 0 for _, metrics in rows)
        assert rows[-1][1][INSIDE] == pytest.approx(expected_inside_mb(micro_steps=1))


def expected_inside_mb(*, micro_steps: int) -> float:
    """With partition groups of one node of two ranks."""
    return 2 * micro_steps * (GATHERED + MODEL_BYTES) / 2 / 1e6


def _fit_seven_steps(folder: Path) -> Any:
    return fit(folder, 7, log_every_n_steps=3, limit_val_batches=0)


def test_log_every_n_steps_of_zero_logs_nothing_and_still_shows_the_table(tmp_path: Path, on_shared_ranks: Run) -> None:
    (rows, _, tables), *_ = on_shared_ranks(_fit_unlogged, tmp_path)
    assert rows == [] and len(tables) == 1


def _fit_unlogged(folder: Path) -> Any:
    return fit(folder, 2, log_every_n_steps=0, limit_val_batches=0)


def test_a_csv_file_and_the_progress_bar_show_the_traffic(tmp_path: Path, on_shared_ranks: Run) -> None:
    shown = on_shared_ranks(_fit_with_csv, tmp_path)
    assert shown[0] == pytest.approx(MODEL_BYTES / 1e6)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "3"]
    assert float(rows[-1][BETWEEN]) == pytest.approx(MODEL_BYTES / 1e6)
    assert float(rows[-1][f"{BETWEEN}/all_reduce_over_replicas"]) == pytest.approx(MODEL_BYTES / 1e6)


def _fit_with_csv(folder: Path) -> float:
    trainer = make_trainer(folder, logger=CSVLogger(folder), callbacks=[TrafficMonitor()], log_every_n_steps=2)
    trainer.fit(StackModule(), batches(4))
    return trainer.progress_bar_metrics["between_nodes_mb"]


def test_validation_is_never_counted(tmp_path: Path, on_shared_ranks: Run) -> None:
    """In the middle of an accumulation window, at the end, and as a sanity check."""
    for rows, everything_mb, _ in on_shared_ranks(_fit_validating, tmp_path):
        of_a_step = expected_inside_mb(micro_steps=2)
        assert [metrics[INSIDE] for _, metrics in rows] == pytest.approx([of_a_step] * 3)
        assert everything_mb > 1.2 * of_a_step


def _fit_validating(folder: Path) -> Any:
    return fit(folder, 6, accumulate_grad_batches=2, val_check_interval=3, num_sanity_val_steps=1)


def test_validation_takes_no_time_of_steps(tmp_path: Path, on_shared_ranks: Run) -> None:
    for rows, *_ in on_shared_ranks(_fit_validating_slowly, tmp_path):
        assert [metrics[SECONDS] for _, metrics in rows] == [1, 1, 1, 1]


class Clock:
    """Stands still but for a second in each training step and an hour in each validation."""

    seconds = 0

    @classmethod
    def perf_counter(cls) -> int:
        return cls.seconds


class SlowValidation(StackModule):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        Clock.seconds += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        Clock.seconds += 3600


def _fit_validating_slowly(folder: Path) -> Any:
    with patch("lightning_mics.integrations.trainer.traffic_monitor.time", Clock):
        return fit(folder, 4, module=SlowValidation(), val_check_interval=2)


@pytest.mark.parametrize("optimizers", [1, 2])
def test_under_manual_optimization_each_optimizers_step_is_a_step(
    tmp_path: Path, optimizers: int, on_shared_ranks: Run
) -> None:
    """The last micro-step opens a window that no step ends: it does not count."""
    of_ranks = on_shared_ranks(_fit_by_hand, tmp_path, optimizers)
    expected = expected_inside_mb(micro_steps=2) / optimizers
    assert of_ranks[0][2][0].splitlines()[-1].split()[:2] == ["all", f"{expected:.3f}"]
    for rows, everything_mb, _ in of_ranks:
        assert [metrics[INSIDE] for _, metrics in rows] == pytest.approx([expected, expected])
        assert everything_mb == pytest.approx(expected * 5 / 4)


def _fit_by_hand(folder: Path, optimizers: int) -> Any:
    return fit(folder, 5, module=ByHand(optimizers=optimizers), limit_val_batches=0)


def test_the_table_lists_techniques_with_their_share(tmp_path: Path, on_shared_ranks: Run) -> None:
    tables = [tables for _, _, tables in on_shared_ranks(_fit_spanning, tmp_path)]
    assert [len(of_rank) for of_rank in tables] == [1, 0, 0, 0]
    head, columns, *lines = tables[0][0].splitlines()
    assert head.startswith("Traffic of one node per optimizer step: 2 steps of ") and "Mbit/s between nodes" in head
    assert columns.split("  ")[1] == "technique"
    cells = {line[2:23].strip(): line[23:].split() for line in lines}
    assert cells["gather along rails"] == ["0.000", f"{MODEL_BYTES / 2 / 1e6:.3f}", "50.0%"]
    assert cells["all"][1:] == [f"{MODEL_BYTES / 1e6:.3f}", "100.0%"]
    assert len({len(line) for line in (columns, *lines)}) == 1


def _fit_spanning(folder: Path) -> Any:
    return fit(
        folder,
        2 * S,
        strategy=mics(partition_size=4, **NODE.keywords()),
        accumulate_grad_batches=S,
        limit_val_batches=0,
    )


def test_without_a_step_there_is_no_table_and_no_row(tmp_path: Path, on_shared_ranks: Run) -> None:
    for rows, everything_mb, tables in on_shared_ranks(_fit_without_steps, tmp_path):
        assert rows == [] and tables == [] and everything_mb > 0


def _fit_without_steps(folder: Path) -> Any:
    return fit(folder, 2, module=ByHand(optimizers=1, steps=False), limit_val_batches=0)


def test_a_resumed_run_and_a_second_fit_count_from_their_own_start(tmp_path: Path, on_shared_ranks: Run) -> None:
    of_ranks = on_shared_ranks(_fit_twice, tmp_path)
    assert [table.split(" s,")[0].split()[7:9] for table in of_ranks[0][2]] == [["3", "steps"], ["2", "steps"]]
    for first, second, _ in of_ranks:
        assert [step for step, _ in first] == [1, 2]
        assert [step for step, _ in second] == [3, 4]  # steps 4, alone since the start, and 5, alone at the end
        inside = [metrics[INSIDE] for _, metrics in first + second]
        assert inside == pytest.approx([expected_inside_mb(micro_steps=1)] * 4)


def _fit_twice(folder: Path) -> Any:
    module, monitor, logged, messages = StackModule(), TrafficMonitor(), [], _messages()
    for max_steps in (3, 5):
        rows = Rows()
        trainer = make_trainer(
            folder,
            strategy=mics(**NODE.keywords()),
            logger=rows,
            callbacks=[monitor],
            max_steps=max_steps,
            max_epochs=-1,
            log_every_n_steps=2,
        )
        trainer.fit(module, batches(8), ckpt_path=folder / "last" if logged else None)
        trainer.save_checkpoint(folder / "last")
        logged.append(rows.rows)
    return [*logged, [message for message in messages if message.startswith("Traffic")]]


def test_another_strategy_is_rejected_by_name(tmp_path: Path, on_shared_ranks: Run) -> None:
    with pytest.raises(RankError) as caught:
        on_shared_ranks(_fit_ddp, tmp_path, world_size=2)
    for kind, message in caught.value.failures.values():
        assert kind == "MisconfigurationException"
        assert 'DDPStrategy counts nothing: use Trainer(strategy="mics")' in message


def _fit_ddp(folder: Path) -> None:
    make_trainer(folder, strategy="ddp", devices=2, callbacks=[TrafficMonitor()]).fit(StackModule(), batches(2))


def test_the_monitor_runs_no_collective(tmp_path: Path, on_shared_ranks: Run) -> None:
    for without, watched in on_shared_ranks(_record_with_and_without, tmp_path):
        assert without == watched
        assert len(watched) > 2 * LAYERS


def _record_with_and_without(folder: Path) -> list[list[Collective]]:
    recordings = []
    for callbacks in ([], [TrafficMonitor()]):
        trainer = make_trainer(folder, logger=Rows(), callbacks=callbacks, log_every_n_steps=1)
        with RecordCollectives() as recorded:
            trainer.fit(StackModule(), batches(4), batches(2))
        recordings.append(recorded.seen)
    return recordings
