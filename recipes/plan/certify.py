"""``certify=true``: the model of a run, shrunk, under the options of its job, on a few ranks of this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from lightning_mics import CertifyReport, certify
from recipes.job.auto import choose_automatically
from recipes.models.language_model import LanguageModel

BATCHES = 24
SEQUENCES, LENGTH = 2, 16  # of a micro-batch
LEAST_TOKEN, TOKENS = 5, 509  # the ones before are special in some vocabularies
MOST_MICRO_STEPS = 2  # of a rank: as many as tell a boundary from what comes before


def certify_job(config: DictConfig, make_model: Callable[[DictConfig], LanguageModel]) -> CertifyReport:
    """Certify the model of a run, print the report and write it to the run's folder.

    Args:
        config: Configuration, as composed by ``conf/train.yaml``.
        make_model: Function that returns the model of a configuration, not built yet.

    Raises:
        ValueError: If the job is invalid.
    """
    model = make_model(config)
    chosen = choose_automatically(config, model).config
    cluster, generator = chosen.cluster, torch.Generator().manual_seed(config.seed)
    batches = [_random(model.example_batch(SEQUENCES, LENGTH), generator) for _ in range(BATCHES)]

    def make_small() -> LanguageModel:
        made = make_model(config)
        made.config.vocab_size = TOKENS
        made.compile_blocks = False  # half of the time, and another compiler than on GPUs
        return made

    report = certify(
        make_small,
        batches,
        strategy=instantiate(chosen.strategy),
        job_shape=(cluster.num_nodes, cluster.ranks_per_node or cluster.devices),
        accumulate=min(MOST_MICRO_STEPS, chosen.trainer.accumulate_grad_batches),
        precision=cluster.precision,
    )
    print(report)
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report.write(folder / "certify.json")
    return report


def _random(batch: Any, generator: torch.Generator) -> Any:
    """Random tokens in the shapes of a batch."""
    if isinstance(batch, Tensor):
        return torch.randint(LEAST_TOKEN, TOKENS, batch.shape, generator=generator)
    assert isinstance(batch, Mapping)
    return {name: _random(value, generator) for name, value in batch.items()}
