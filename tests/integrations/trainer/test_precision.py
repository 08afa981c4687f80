"""The three precisions: the dtypes of storage, gathers, computation and reductions; and unsupported precisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, Precision
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_mics import MiCSStrategy
from tests.support.models import TinyModule
from tests.support.recorded import RecordCollectives
from tests.support.trainers import loader, make_trainer, mics, on_ranks

FP32, BF16 = torch.float32, torch.bfloat16


CLIP = 0.1


RUNS: dict[str, dict[str, Any]] = {
    "32-true": {"precision": "32-true"},
    "bf16-true": {"precision": "bf16-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true, reduced in fp32": {"precision": "bf16-true", "reduce_dtype": "float32"},
    "bf16-true, clipped": {"precision": "bf16-true", "gradient_clip_val": CLIP},
    "bf16-mixed, clipped": {"precision": "bf16-mixed", "gradient_clip_val": CLIP},
    "bf16-mixed, reduced in bf16": {"precision": "bf16-mixed", "reduce_dtype": torch.bfloat16},
}


class Watched(TinyModule):
    """Notes dtypes in the hooks of every stage."""

    def __init__(self) -> None:
        super().__init__()
        # on CPU autocast leaves layer norms alone, and they reject weights that are narrower than the input
        self.net.norm = torch.nn.Linear(7, 7)
        self.facts: dict[str, Any] = {"batches": set(), "made in a step": set()}
        self.net.blocks[0].up.register_forward_hook(lambda *args: self.facts.update(computed=args[-1].dtype))
        self.steps_with_closure = 0

    def configure_model(self) -> None:
        self.facts.setdefault("built in", torch.nn.Linear(1, 1).weight.dtype)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), fused=True)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.facts["scaler"] = getattr(self.trainer.precision_plugin, "scaler", None)
        self.steps_with_closure += optimizer_closure is not None
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def forward(self, batch: Tensor) -> Tensor:
        self.facts["gathered"] = self.net.embed.weight.dtype
        self.facts["made in a step"].add(torch.zeros(1).dtype)
        return super().forward(batch)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.facts["batches"].add(batch.dtype)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start


class Floats(Watched):
    """Gets floating-point batches: tokens that are rounded in the step."""

    def forward(self, batch: Tensor) -> Tensor:
        return super().forward(batch.round().long())


def float_loader() -> Any:
    return torch.utils.data.DataLoader(loader(8).dataset.float(), batch_size=2)


def run(folder: str, *, reduce_dtype: Any = None, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    module = Floats()
    strategy = mics(partition_size=2, reduce_dtype=reduce_dtype)
    trainer = make_trainer(folder, strategy=strategy, devices=4, num_sanity_val_steps=0, **options)
    with RecordCollectives() as recorded:
        trainer.fit(module, float_loader())
    topology = trainer.strategy.topology
    partition, replication = (
        group(dist.get_rank()) for group in (topology.partition_group, topology.replication_group)
    )
    facts = module.facts
    facts["gathers"] = {c.dtype for c in recorded.of("all_gather", partition)}
    facts["reduce-scatters"] = {c.dtype for c in recorded.of("all_to_all", partition)}  # gloo's way
    facts["all-reduces"] = {c.dtype for c in recorded.of("all_reduce", replication)}
    facts["stored"] = {p.dtype for p in module.parameters() if isinstance(p, DTensor)}
    facts["steps with closure"] = module.steps_with_closure
    facts["default dtype after"] = torch.get_default_dtype()
    facts["gradient norm"] = float(torch.cat([p.grad.full_tensor().flatten() for p in module.parameters()]).norm())
    trainer.validate(module, float_loader(), verbose=False)
    trainer.test(module, float_loader(), verbose=False)
    facts["predictions"] = {prediction.dtype for prediction in trainer.predict(module, float_loader())}
    return facts


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    def job(folder: str) -> dict[str, dict[str, Any]]:
        return {name: run(folder, **options) for name, options in RUNS.items()}

    return on_ranks(job, str(tmp_path_factory.mktemp("precision")))[0]


@pytest.mark.parametrize(
    ("name", "gathered", "reduced"),
    [
        ("32-true", FP32, FP32),
        ("bf16-true", BF16, BF16),
        ("bf16-mixed", BF16, FP32),
        ("bf16-true, reduced in fp32", BF16, FP32),
        ("bf16-mixed, reduced in bf16", BF16, BF16),
    ],
)
def test_precision_sets_the_gather_and_reduce_dtypes(
    runs: dict[str, dict[str, Any]], name: str, gathered: torch.dtype, reduced: torch.dtype
) -> None:
    assert runs[name]["gathers"] == {gathered}
    assert runs[name]["gathered"] == gathered
    assert runs[name]["reduce-scatters"] == {reduced}
    assert runs[name]["all-reduces"] == {reduced}


@pytest.mark.parametrize("name", RUNS)
def test_only_bf16_true_converts_the_weights(runs: dict[str, dict[str, Any]], name: str) -> None:
    assert runs[name]["stored"] == {BF16 if "bf16-true" in name else FP32}


@pytest.mark.parametrize("name", RUNS)
def test_configure_model_builds_in_the_precision_asked_for(runs: dict[str, dict[str, Any]], name: str) -> None:
    assert runs[name]["built in"] == (BF16 if "bf16-true" in name else FP32)


@pytest.mark.parametrize("name", RUNS)
def test_the_steps_compute_in_the_precision_asked_for(runs: dict[str, dict[str, Any]], name: str) -> None:
    assert runs[name]["computed"] == (FP32 if name == "32-true" else BF16)
    assert runs[name]["made in a step"] == {BF16 if "bf16-true" in name else FP32}


@pytest.mark.parametrize("name", ["32-true", "bf16-mixed"])
def test_batches_reach_the_hooks_uncast(runs: dict[str, dict[str, Any]], name: str) -> None:
    assert runs[name]["batches"] == {FP32}


@pytest.mark.parametrize("name", RUNS)
def test_bf16_has_no_gradient_scaler(runs: dict[str, dict[str, Any]], name: str) -> None:
    assert runs[name]["scaler"] is None
    assert runs[name]["steps with closure"] == 1


@pytest.mark.parametrize("run", ["bf16-true, clipped", "bf16-mixed, clipped"])
def test_clipping_works_with_a_fused_optimizer(runs: dict[str, dict[str, Any]], run: str) -> None:
    assert runs[run]["gradient norm"] == pytest.approx(CLIP, rel=2e-2)  # as precise as bf16 is
    assert runs["bf16-true"]["gradient norm"] > 2 * CLIP


@pytest.mark.parametrize("name", RUNS)
def test_the_default_dtype_is_back_after_a_run(runs: dict[str, dict[str, Any]], name: str) -> None:
    assert runs[name]["default dtype after"] == FP32


class FailsInConfigureModel(TinyModule):
    def configure_model(self) -> None:
        raise ArithmeticError(str(torch.zeros(1).dtype))


def fail_in_configure_model(folder: str) -> tuple[str, torch.dtype]:
    try:
        make_trainer(folder, devices=2, precision="bf16-true").fit(FailsInConfigureModel(), loader(4))
    except ArithmeticError as error:
        return str(error), torch.get_default_dtype()
    raise AssertionError("did not fail")


def test_the_default_dtype_survives_an_error_in_configure_model(tmp_path: Path) -> None:
    assert on_ranks(fail_in_configure_model, str(tmp_path), world_size=2) == [("torch.bfloat16", FP32)] * 2


# -- errors: no ranks needed --


@pytest.mark.parametrize("given", ["mics", MiCSStrategy], ids=["by name", "instance"])
@pytest.mark.parametrize("precision", ["16-true", "64-true", "transformer-engine"])
def test_an_unsupported_precision_is_rejected_by_name(
    given: Any, precision: str, tmp_path: Path, monkeypatch: Any
) -> None:
    plugins: dict[str, Any] = {"precision": precision}
    if precision == "transformer-engine":  # the library is not there to make the plugin
        plugin = Precision()
        plugin.precision = precision
        plugins = {"plugins": [plugin]}
    strategy = given if isinstance(given, str) else given()
    with pytest.raises(ValueError, match=precision):
        make_trainer(tmp_path, strategy=strategy, devices=2, **plugins)


@pytest.mark.parametrize("given", ["mics", MiCSStrategy], ids=["by name", "instance"])
def test_16_mixed_on_cpus_is_bf16_mixed_with_a_warning_as_in_lightning(given: Any, tmp_path: Path) -> None:
    strategy = given if isinstance(given, str) else given()
    with pytest.warns(UserWarning, match="using 'bf16-mixed' instead"):
        trainer = make_trainer(tmp_path, strategy=strategy, devices=2, precision="16-mixed")
    assert trainer.precision == "bf16-mixed"


@pytest.mark.parametrize("plugin", [HalfPrecision("16-true"), DoublePrecision()])
def test_the_error_names_what_is_supported(plugin: Precision) -> None:
    message = (
        f"strategy 'mics' does not support precision='{plugin.precision}'; "
        "use one of '32-true', 'bf16-true', 'bf16-mixed', '16-mixed'"
    )
    with pytest.raises(ValueError, match=message):
        MiCSStrategy().precision_plugin = plugin
