"""The results of a run, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning as L
from omegaconf import DictConfig

from recipes.report.baselines import causal_baselines, masked_baselines
from recipes.report.history import History
from recipes.report.page import write_report

MEASURED = {  # by objective: the series that is held against baselines, what to call its last value, and the baselines
    "causal": ("val_loss", "validation loss, nats per token", causal_baselines),
    "masked": ("val_masked_accuracy", "accuracy on masked tokens", masked_baselines),
}


def conclude(
    config: DictConfig,
    trainer: L.Trainer,
    *,
    command: Sequence[str],
    choices: str,
    final: Mapping[str, float],
    sample: str,
) -> None:
    """Print the results next to what counting reaches on the same tokens, and write ``report.html``; for rank 0.

    Without a ``History`` among the callbacks there is no report.

    Args:
        config: Configuration of the run, without "auto".
        trainer: Trainer that has trained the model.
        command: Command line, in words.
        choices: Table of the values chosen for "auto".
        final: Metrics of the last validation.
        sample: Text that the model has generated.
    """
    name, reached, baselines = MEASURED[trainer.lightning_module.objective]
    counted = baselines(trainer.datamodule)
    results = {key: f"{value:.3f}" for key, value in {reached: final[name], **counted}.items()}
    history = next((callback for callback in trainer.callbacks if isinstance(callback, History)), None)
    if history is not None:
        write_report(
            Path(config.run_dir, "report.html"),
            title=config.name,
            command=command,
            facts=_facts(config, trainer),
            results=results,
            tables=[choices, trainer.strategy.start_report],
            series=history.series,
            references={name: counted},
            sample=sample,
        )
    width = max(map(len, results))
    print(f"\nSample:\n\n{sample}\n\n" + "\n".join(f"  {key:<{width}}  {value}" for key, value in results.items()))
    report = "report.html, " if history is not None else ""
    print(f"\n{config.run_dir}: {report}csv/; {config.checkpoint_dir}: checkpoints (resume with resume=last)")


def _facts(config: DictConfig, trainer: L.Trainer) -> dict[str, str]:
    network, data, cluster = trainer.lightning_module, trainer.datamodule, config.cluster
    sequences = trainer.global_step * config.global_batch_size
    gpu = f", {cluster.gpu}" if cluster.gpu else ""
    return {
        "model": f"{network.config.model_type}, {sum(p.numel() for p in network.parameters()):,} parameters",
        "training data": f"{len(data.train_tokens):,} tokens",
        "trained on": f"{trainer.global_step:,} steps, {sequences * data.sequence_length:,} tokens",
        "ranks": f"{trainer.world_size} on {cluster.instance or 'this machine'}{gpu}, {cluster.precision}",
        "checkpoints": str(config.checkpoint_dir),
    }
