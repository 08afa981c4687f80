"""``torch.compile`` per block: in place or as a wrapper, with and without activation checkpointing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from torch import Tensor

from tests.support.models import OneBlock, TinyModule
from tests.support.trainers import loader, make_trainer, mics, on_ranks

RANKS = 2


CASES: dict[str, dict[str, Any]] = {
    "not compiled": {"how": None},
    "in place": {"how": "in place"},
    "in place, recomputed": {"how": "in place", "activation_checkpointing": True},
    "wrapped": {"how": "wrapped"},
    "wrapped, recomputed": {"how": "wrapped", "activation_checkpointing": True},
}


class Compiled(TinyModule):
    """Compiles its blocks in ``configure_model``; the backend counts what it is given and runs it as it is."""

    def __init__(self, how: str | None) -> None:
        super().__init__(lr=0.5, kind=OneBlock)
        self.how, self.backend = how, torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def configure_model(self) -> None:
        blocks = self.net.blocks
        for index, block in enumerate(blocks):
            if self.how == "in place":
                block.compile(backend=self.backend)
            elif self.how == "wrapped" and not hasattr(block, "_orig_mod"):
                blocks[index] = torch.compile(block, backend=self.backend)


def fit_compiled(folder: str) -> dict[str, Any]:
    return {name: fit(folder, **options) for name, options in CASES.items()}


def fit(folder: str, *, how: str | None, **options: Any) -> tuple[dict[str, Tensor], int, int]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = Compiled(how)
    # two replicas of one rank, and windows of two micro-steps: both hops run
    trainer = make_trainer(folder, strategy=mics(partition_size=1, **options), devices=RANKS, accumulate_grad_batches=2)
    trainer.fit(module, loader(16))
    weights = {name.replace("_orig_mod.", ""): p.full_tensor() for name, p in module.net.named_parameters()}
    return weights, module.backend.frame_count, module.backend.op_count


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Tensor], int, int]]:
    return on_ranks(fit_compiled, str(tmp_path_factory.mktemp("compile")), world_size=RANKS)[0]


@pytest.mark.parametrize("case", [name for name in CASES if name != "not compiled"])
def test_compiled_blocks_train_as_the_others_do(cases: dict[str, Any], case: str) -> None:
    weights, _, _ = cases[case]
    plain, graphs, _ = cases["not compiled"]
    assert graphs == 0
    assert weights.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(weights[name], plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [name for name in CASES if name != "not compiled"])
def test_the_blocks_really_run_compiled(cases: dict[str, Any], case: str) -> None:
    _, graphs, operations = cases[case]
    assert graphs >= 1
    assert operations >= 1


class CompiledByDefault(TinyModule):
    """Each block compiles into one graph, without a break, by torch's own compiler."""

    def __init__(self) -> None:
        super().__init__(kind=OneBlock)

    def configure_model(self) -> None:
        for block in self.net.blocks:
            block.compile(fullgraph=True)


def fit_with_inductor(folder: str) -> float:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # of both ranks: what one has built the other loads
    torch._inductor.config.compile_threads = 1  # or each rank would start processes that compile, and import torch
    torch._inductor.config.cpp.vec_isa_ok = False  # or it would build libraries to see which vectors work
    module = CompiledByDefault()
    make_trainer(folder, strategy=mics(partition_size=2), devices=RANKS).fit(module, loader(8))
    return float(module.trainer.callback_metrics["train_loss"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs a C++ compiler on CPU")
def test_blocks_compile_into_one_kernel_graph_each(tmp_path: Path) -> None:
    losses = on_ranks(fit_with_inductor, str(tmp_path), world_size=RANKS)
    assert losses[0] == losses[1] > 0
    assert list(tmp_path.glob("**/*.so"))  # kernels were built


def test_a_compiled_lightning_module_is_rejected(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, strategy="mics", devices=RANKS)
    with pytest.raises(RuntimeError, match="compile"):
        trainer.fit(torch.compile(TinyModule()), loader())
