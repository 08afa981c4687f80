"""The losses of MiCS beside those of DDP, step by step: the paper's fidelity experiment on CPU ranks.

    python -m benchmarks.fidelity --out benchmarks/results/fidelity

Each system starts from the same weights and sees the same sequences in the same order: four ranks, as two nodes of two,
train the models of ``conf/experiment/fidelity.yaml`` by Lightning's Trainer. What differs is the strategy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy

import train
from lightning_mics import CommunicationOptions, MiCSStrategy
from lightning_mics.integrations.trainer.mixed_precision import BFloat16Mixed

CONF = Path(train.__file__).parent / "conf"
RANKS, RANKS_PER_NODE = 4, 2
SYSTEMS: dict[str, tuple[int, CommunicationOptions] | None] = {  # partition size, and how collectives run
    "DDP": None,
    "MiCS, p = 2": (2, CommunicationOptions.PAPER),
    "MiCS, p = 4, hierarchical": (4, CommunicationOptions.PAPER),
    "MiCS, p = 4, once per step": (4, CommunicationOptions.NODE),
}
MODELS = {"GPT": "gpt-tiny", "BERT": "bert-tiny"}
PRECISIONS = ("32-true", "bf16-mixed")


class Losses(L.Callback):
    """The training loss of each optimizer step, the mean over its micro-steps and all ranks."""

    def __init__(self) -> None:
        self.micro_steps: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.micro_steps.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)  # Lightning has divided it

    def by_step(self, accumulation: int) -> list[float]:
        losses = torch.stack(self.micro_steps).view(-1, accumulation).mean(1)
        dist.all_reduce(losses)
        return (losses / dist.get_world_size()).tolist()


def configuration(model: str, *overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        options = [f"model={model}", "experiment=fidelity", f"cluster.devices={RANKS}", *overrides]
        config = compose("train", overrides=options, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return config


def work(system: str, model: str, precision: str, *, weights: Path, out: Path) -> None:
    """One rank of one run; rank 0 writes the losses."""
    config = configuration(model, f"cluster.precision={precision}")
    L.seed_everything(config.seed, verbose=False)
    config, _ = train.choose_automatically(config, train.make_model(config))
    sharding = SYSTEMS[system]
    config.model.pretrained = str(weights) if sharding is not None else None
    module = train.make_model(config)
    if sharding is None:  # the strategy of Lightning shards nothing, so the module brings its weights
        module.network = module.head.from_pretrained(weights, attn_implementation="sdpa")
        strategy: Any = DDPStrategy(process_group_backend="gloo")
    else:
        strategy = MiCSStrategy(ranks_per_node=RANKS_PER_NODE, partition_size=sharding[0], **sharding[1].keywords())
    losses = Losses()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        precision=precision if sharding is not None else None,
        plugins=[precision_plugin(precision)] if sharding is None else None,
        max_steps=config.trainer.max_steps,
        accumulate_grad_batches=config.trainer.accumulate_grad_batches,
        gradient_clip_val=config.trainer.gradient_clip_val,
        use_distributed_sampler=False,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, instantiate(config.data, objective=module.objective))
    curve = losses.by_step(trainer.accumulate_grad_batches)
    if trainer.is_global_zero:
        out.write_text(json.dumps(curve))


def precision_plugin(precision: str) -> Precision:
    """For DDP, which with Lightning's own plugin cannot clip the gradients of a fused optimizer under bf16-mixed."""
    return BFloat16Mixed(device="cpu") if precision == "bf16-mixed" else Precision()


def first_weights(model: str, folder: Path) -> Path:
    config = configuration(model)
    torch.manual_seed(config.seed)
    train.make_model(config).build_network().save_pretrained(folder)
    return folder


def run_all(out: Path) -> dict[str, Any]:
    """Run what ``out`` has no losses of yet, by this commit: what was cut off goes on."""
    kept, commit = out / "results.json", environment()["commit"]
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    if results.get("commit") != commit:
        results = {"commit": commit, "curves": {}, "seconds": {}}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        weights = {name: first_weights(model, Path(scratch, model)) for name, model in MODELS.items()}
        for name, precision, system in itertools.product(MODELS, PRECISIONS, SYSTEMS):
            key = f"{name}, {precision}"
            curves = results["curves"].setdefault(key, {})
            if system in curves:
                continue
            losses, begin = Path(scratch, "losses.json"), time.perf_counter()
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
            job = ["-m", "benchmarks.fidelity", "--work"]
            job += [system, MODELS[name], precision, str(weights[name]), str(losses)]
            subprocess.run([*launch, *job], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            curves[system] = json.loads(losses.read_text())
            results["seconds"].setdefault(key, {})[system] = round(time.perf_counter() - begin, 1)
            kept.write_text(json.dumps(results))
            print(key, system, curves[system][-1], flush=True)
    return results


def write_page(results: dict[str, Any], out: Path) -> None:
    draw(results["curves"], out / "losses.svg")
    rows = []
    for key, curves in results["curves"].items():
        ddp = torch.tensor(curves["DDP"], dtype=torch.float64)
        for system, curve in curves.items():
            difference = (torch.tensor(curve, dtype=torch.float64) - ddp).abs()
            steps = f"{difference.max():.2e} (step {int(difference.argmax()) + 1}) | {difference[:50].max():.2e}"
            rows.append(f"| {key} | {system} | {curve[0]:.4f} | {curve[-1]:.4f} | {steps} |")
    steps = len(next(iter(next(iter(results["curves"].values())).values())))
    (out / "README.md").write_text(
        PAGE.format(steps=steps, rows="\n".join(rows), remarks=_remarks(out), **environment())
    )


def _remarks(out: Path) -> str:
    """What people have written about the figures."""
    remarks = out / "remarks.md"
    return remarks.read_text() if remarks.exists() else ""


def environment() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    versions = f"torch {torch.__version__}, lightning {L.__version__}, Python {platform.python_version()}"
    return {"commit": commit.strip(), "versions": versions, "cpus": str(os.cpu_count())}


def draw(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    for place, (key, systems) in enumerate(curves.items()):
        axes = figure.add_subplot(2, 2, place + 1, title=key, xlabel="optimizer step", ylabel="training loss, nats")
        for index, (system, curve) in enumerate(systems.items()):
            width = 2.0 * (len(systems) - index)  # curves that lie on each other stay visible
            axes.plot(range(1, len(curve) + 1), curve, label=system, linewidth=width / 2, alpha=0.8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path)


PAGE = """# Fidelity: the losses of MiCS and of DDP

Does training under MiCS reach what data parallelism reaches, step by step? Four CPU ranks that count as two nodes of
two train a GPT and a BERT (`conf/experiment/fidelity.yaml`: the models `gpt-tiny` and `bert-tiny` with two blocks,
sequences of 64 tokens of the standard library's source, 8 sequences per step in 2 micro-steps, AdamW, gradients
clipped at norm 1, warm-up and cosine) for {steps} steps, from the same weights, on the same sequences in the same
order. Losses are means over all ranks and micro-steps. *Measured.*

![Training losses of four systems over {steps} steps, two models, two precisions](losses.svg)

| model, precision | system | first loss | last loss | largest difference from DDP | of the first 50 steps |
|---|---|---|---|---|---|
{rows}

{remarks}
To get it again: `python -m benchmarks.fidelity --out benchmarks/results/fidelity`
(commit {commit}, {versions}, {cpus} cores).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the result page")
    parser.add_argument("--work", nargs=5, metavar=("SYSTEM", "MODEL", "PRECISION", "WEIGHTS", "OUT"))
    arguments = parser.parse_args()
    if arguments.work:
        system, model, precision, weights, out = arguments.work
        work(system, model, precision, weights=Path(weights), out=Path(out))
    else:
        write_page(run_all(arguments.out), arguments.out)


if __name__ == "__main__":
    main()
