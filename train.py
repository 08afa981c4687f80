"""Train a language model under MiCS: on a cluster, on this machine's GPUs or, without any, on CPU processes.

    python train.py                                   everything as in conf/train.yaml
    python train.py trainer.max_steps=1000            one value changed
    python train.py resume=last                       resume the last run of that name
    python train.py -m strategy.partition_size=1,2,4  one run after another

What else can be chosen is listed in conf/train.yaml.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lightning_mics.certification.report import CannotCertifyError
from lightning_mics.checkpoint.errors import DamagedCheckpointError
from lightning_mics.planning import find_instance
from recipes.data.vocabulary import vocabulary_of
from recipes.job.auto import choose_automatically
from recipes.job.loggers import check_loggers
from recipes.job.machine import check_machine
from recipes.job.resume import SavedRun, find_saved_runs, steps_to_reach
from recipes.job.sweep import one_job
from recipes.models.language_model import LanguageModel
from recipes.plan.certify import certify_job
from recipes.plan.dry_run import dry_run
from recipes.report.conclusion import conclude

OmegaConf.register_new_resolver("gpu_or_cpu", lambda gpu, cpu: gpu if torch.cuda.is_available() else cpu, replace=True)
OmegaConf.register_new_resolver("of_instance", lambda name, fact: getattr(find_instance(name), fact), replace=True)
OmegaConf.register_new_resolver("vocabulary_of", vocabulary_of, replace=True)
say = rank_zero_only(print)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    # every rank would print it at the first batch; Lightning 2.6 uses what torch 2.13 deprecates
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # likewise torchdata 0.11

    overrides = HydraConfig.get().overrides.task
    if config.certify:
        sys.exit(certify(config))
    if config.dry_run:
        rehearse_job(config, overrides)
        return
    check_machine(config.cluster, overrides=overrides, environment=os.environ)
    check_loggers(config.logger)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        with one_job([*overrides, f"run_dir={config.run_dir}"]):
            run(config)
    else:
        run(config)


def run(config: DictConfig) -> None:
    """Train or resume, and report the results."""
    runs = find_saved_runs(config.resume, checkpoint_dir=config.checkpoint_dir, say=say)
    L.seed_everything(config.seed, verbose=False)

    model = make_model(config)
    job = choose_automatically(config, model)
    config, choices = job.config, job.choices
    say(choices)
    data = instantiate(config.data, objective=model.objective)
    model.check_data(vocab_size=data.vocab_size, sequence_length=data.sequence_length)
    trainer, checkpoint = resume(config, runs, model, data) if runs else (make_trainer(config), None)
    trainer.fit(model, data, ckpt_path=checkpoint)
    (final,) = trainer.validate(model, data, verbose=False)
    (sample,) = trainer.predict(model, data)
    if trainer.is_global_zero:
        command = ["python", "train.py", *HydraConfig.get().overrides.task]
        conclude(config, trainer, command=command, choices=choices, final=final, sample=data.decode(sample[0]))


def rehearse_job(config: DictConfig, overrides: Sequence[str]) -> None:
    """Plan and rehearse the job without its machines; exit with the reason if the job is invalid."""
    try:
        dry_run(config, make_model(config), command=["python", "train.py", *overrides])
    except ValueError as error:
        sys.exit(f"This job cannot be: {error}")


def certify(config: DictConfig) -> int:
    """Compare training under the job's options with one process; returns the exit status."""
    try:
        return 0 if certify_job(config, make_model).ok else 1
    except CannotCertifyError as error:
        say(f"{error.trace}\nThis job cannot be certified: {error}")
        return 2
    except ValueError as error:
        sys.exit(f"This job cannot be: {error}")


def make_model(config: DictConfig) -> LanguageModel:
    """The model of this run, without weights; its ``training`` values are for data, optimizer and trainer."""
    arguments = OmegaConf.to_container(config.model, resolve=True)
    del arguments["training"]
    return instantiate(arguments, optimizer=instantiate(config.optimizer))


def make_trainer(config: DictConfig, saved: SavedRun | None = None) -> L.Trainer:
    """The Trainer of a fresh or resumed run.

    Args:
        config: Configuration of the run.
        saved: Run to resume; None for a fresh start.
    """
    steps = steps_to_reach(config.trainer.max_steps, saved)
    loggers = list(instantiate(config.logger).values())
    trainer = instantiate(config.trainer, _partial_=True)
    callbacks = [callback for callback in trainer.keywords["callbacks"].values() if callback is not None]
    return trainer(logger=loggers, callbacks=callbacks, strategy=instantiate(config.strategy), max_steps=steps)


def resume(
    config: DictConfig, runs: list[SavedRun], model: L.LightningModule, data: L.LightningDataModule
) -> tuple[L.Trainer, str]:
    """The Trainer for the first of ``runs`` whose checkpoint is complete, and the path of that checkpoint."""
    for saved in runs:
        trainer = make_trainer(config, saved)
        try:
            (now,) = trainer.validate(model, data, ckpt_path=str(saved.path), verbose=False)
        except DamagedCheckpointError as damage:
            if saved is runs[-1]:
                raise
            say(f"{damage}; going back to the checkpoint before it")
            continue
        say(f"Resuming {saved.path} at step {saved.step} of {trainer.max_steps}:")
        say(f"  validation loss {now['val_loss']:.6f}; when it was saved: {saved.val_loss:.6f}")
        return trainer, str(saved.path)
    raise AssertionError("unreachable: the last of the runs returns or raises")


if __name__ == "__main__":
    main()
