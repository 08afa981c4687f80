"""Numbers of sharded tensors, asked for in hooks: those of one process, on every rank and for every reader."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import grad_norm
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric

from lightning_mics._torch.dtensors.numbers import WholeNumbers
from tests.support.accelerators import prepared
from tests.support.accelerators import start as start_accelerate
from tests.support.loops import network, set_up_in_one_call, start
from tests.support.models import TinyModule, loader_of_tokens, tokens
from tests.support.trainers import cases_on_ranks, make_trainer, mics

NUMBERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "float of a norm": lambda w, g: float(g.norm()),
    "item of a mean": lambda w, g: w.mean().item(),
    "item of a maximum": lambda w, g: w.abs().max().item(),
    "item of an element": lambda w, g: w[-1, 1].item(),
    "int of a count": lambda w, g: int((w > 0).sum()),
    "bool of any": lambda w, g: bool((w == w.max()).any()),
    "bool of all": lambda w, g: bool((w < w.max()).all()),
    "a condition": lambda w, g: "large" if w.abs().sum() > 20 else "small",
    "a format": lambda w, g: f"{w.norm():.4f}",
    "a percent format": lambda w, g: "%.4f" % w.norm(),  # noqa: UP031
    "a list": lambda w, g: w.norm().tolist(),
    "a list of rows": lambda w, g: w.tolist(),
    "an array": lambda w, g: float(np.asarray(w.norm())),
    "an array of rows": lambda w, g: w.numpy().sum().item(),
    "a sum of squares": lambda w, g: (w.norm().item() ** 2 + g.norm().item() ** 2) ** 0.5,
    "the largest of two": lambda w, g: float(max(w.norm(), g.norm())),
    "a stack": lambda w, g: float(torch.stack([w.norm(), g.norm()]).norm()),
    "a spread": lambda w, g: float(w.std()),
    "the position of a maximum": lambda w, g: int(w.argmax()),
    "a membership": lambda w, g: 12345.0 in w,
}


class Asking(TinyModule):
    """Reads and logs numbers of a tensor of the root, and of one of a block, whose rows no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()
        self.asked: dict[str, list[Any]] = {}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        pairs = [(p.detach(), p.grad) for p in (self.net.embed.weight, self.net.blocks[1].up.weight)]
        self.asked = {name: [ask(w, g) for w, g in pairs] for name, ask in NUMBERS.items()}
        self.log_dict(grad_norm(self, 2))
        self.log("norm", pairs[0][1].norm())
        self.log("together", pairs[0][1].norm(), sync_dist=True)
        self.log("largest", pairs[1][0].abs().max(), prog_bar=True, on_step=True, on_epoch=True)
        self.metric(pairs[1][1].norm())
        self.log("metric", self.metric, on_step=False, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        self.log("end", self.net.blocks[0].up.weight.norm())


def fit(**options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        saving = ModelCheckpoint(folder, monitor="end", filename="{end:.4f}")
        module, stopping = Asking(), EarlyStopping("end", check_on_train_epoch_end=True)
        trainer = make_trainer(
            folder,
            max_epochs=2,
            use_distributed_sampler=False,
            limit_val_batches=0,
            enable_checkpointing=True,
            callbacks=[saving, stopping],
            **options,
        )
        trainer.fit(module, loader_of_tokens(4))
    assert all(type(value) is Tensor for value in trainer.callback_metrics.values())
    return {
        "asked": module.asked,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "file": saving.best_model_path.rpartition("/")[2],
        "best": float(stopping.best_score),
    }


class Rows:
    """A logger of Fabric, or a tracker of Accelerate."""

    name = version = "rows"

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.rows.append(metrics)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.rows.append({name: float(value) for name, value in values.items()})


def norm_alone() -> float:
    model = network()
    model(tokens(2)).backward()
    return float(model.embed.weight.grad.norm())


def log_with_fabric() -> tuple[list[Any], float]:
    fabric = start(devices=2)
    model, _ = set_up_in_one_call(fabric)
    fabric._loggers = [rows := Rows()]
    fabric.backward(model(tokens(2)))
    norm = model.embed.weight.grad.norm()
    fabric.log("norm", norm)
    return rows.rows, float(fabric.all_reduce(norm, reduce_op="sum"))


def log_with_accelerate() -> tuple[list[Any], list[float]]:
    accelerator = start_accelerate()
    model, _ = prepared(accelerator)
    accelerator.trackers = [rows := Rows()]
    accelerator.backward(model(tokens(2)))
    norm = model.embed.weight.grad.norm()
    accelerator.log({"norm": norm})
    return rows.rows, accelerator.gather(norm).tolist()


def ask_alone() -> str | None:
    fabric: Fabric = start(devices=2)
    model, _ = set_up_in_one_call(fabric)
    handlers = DTensor._op_dispatcher._custom_op_handlers
    numbers = handlers[torch.ops.aten._local_scalar_dense.default]
    assert isinstance(numbers, WholeNumbers)
    patience, numbers.patience = numbers.patience, timedelta(seconds=0.3)
    together, message = [], None
    for _ in range(2):
        together.append(float(model.embed.weight.norm()))
    if fabric.global_rank == 1:
        try:
            float(model.embed.weight.norm())
        except RuntimeError as error:
            message = str(error)
    numbers.patience = patience
    assert float(model.embed.weight.norm()) == together[0] == together[1]  # no collective is one off
    return message


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    return cases_on_ranks(
        {
            "over nodes": partial(
                fit, devices=2, strategy=mics(ranks_per_node=1, partition_size=2, cache_parameters="never")
            ),
            "accumulating": partial(fit, devices=2, strategy=mics(partition_size=2), accumulate_grad_batches=2),
            "fabric": log_with_fabric,
            "accelerate": log_with_accelerate,
            "alone": ask_alone,
        },
        world_size=2,
    )


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    one = partial(fit, strategy="auto", devices=1)
    return {"over nodes": one(), "accumulating": one(accumulate_grad_batches=2)}


@pytest.mark.parametrize("case", ["over nodes", "accumulating"])
def test_every_rank_reads_the_numbers_of_one_process(
    case: str, results: dict[str, list[Any]], alone: dict[str, dict[str, Any]]
) -> None:
    expected = alone[case]["asked"]
    for of_rank in results[case]:
        assert of_rank["asked"].keys() == NUMBERS.keys()
        for name, pair in of_rank["asked"].items():
            for one, other in zip(pair, expected[name], strict=True):
                assert type(one) is type(other)
                assert np.allclose(one, other, atol=1e-5) if type(one) in (list, float) else one == other


@pytest.mark.parametrize("case", ["over nodes", "accumulating"])
def test_loggers_callbacks_and_metrics_get_the_numbers_of_one_process(
    case: str, results: dict[str, list[Any]], alone: dict[str, dict[str, Any]]
) -> None:
    expected = alone[case]
    assert expected["metrics"]["grad_2.0_norm_total"] > expected["metrics"]["norm"] > 0
    for of_rank in results[case]:
        assert of_rank["metrics"] == pytest.approx(expected["metrics"], abs=1e-5)
        assert of_rank["file"] == expected["file"]
        assert of_rank["best"] == pytest.approx(expected["best"], abs=1e-5)


def test_fabric_and_accelerate_log_and_gather_the_norm_of_one_process(results: dict[str, list[Any]]) -> None:
    norm = pytest.approx(norm_alone(), abs=1e-5)
    for rows, total in results["fabric"]:
        assert rows == [{"norm": norm}]
        assert total / 2 == norm
    assert results["accelerate"][0][0] == [{"norm": norm}]
    for _, gathered in results["accelerate"]:
        assert [value == norm for value in gathered] == [True] * 2


def test_a_rank_that_asks_alone_raises_an_error_that_names_the_line(results: dict[str, list[Any]]) -> None:
    messages = results["alone"]
    assert [message is None for message in messages] == [True, False]
    assert "test_numbers_of_shards.py:" in messages[1]
    assert "ranks [0, 1] hold together" in messages[1]
    assert (
        "ranks [0] did not ask for it there: call `.item()`, `float()` or `full_tensor()` on all ranks" in messages[1]
    )
