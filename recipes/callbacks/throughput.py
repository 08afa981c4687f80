"""The throughput of a run, in the units of the paper."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from omegaconf import ListConfig, OmegaConf

from recipes.callbacks.log_steps import at_log_step
from recipes.models.flops import measure_shape, tflops_per_gpu
from recipes.models.language_model import LanguageModel


class Throughput(L.Callback):
    """Logs the throughput of all ranks since the last log, every ``log_every_n_steps``, without validation.

    Metrics are ``samples_per_s``, ``tokens_per_s``, ``hfu_tflops_per_gpu`` (with recomputation) and
    ``mfu_tflops_per_gpu`` (without; see :mod:`recipes.models.flops`), and ``hfu_percent`` and ``mfu_percent`` if the
    peak is known. FLOPs are not logged for mixtures of experts, where a token uses only some of the matrices.

    Lightning's ``ThroughputMonitor`` takes one number of FLOPs for both utilizations, waits for the GPU in every
    micro-step, and averages over a window of batches rather than from one logged step to the next. Its
    ``measure_flops`` counts the matrix products of a network once; the tests check the formula against it.

    Args:
        sequence_length: Tokens in a sequence.
        peak_tflops: Peak of one GPU, in TFLOP/s; None if unknown.
        activation_checkpointing: Activation checkpointing of the strategy: a bool, or classes or patterns of modules.
    """

    def __init__(self, *, sequence_length: int, peak_tflops: float | None, activation_checkpointing: Any) -> None:
        self.sequence_length = sequence_length
        self.peak_tflops = peak_tflops
        is_list = isinstance(activation_checkpointing, ListConfig)
        self.activation_checkpointing = (
            OmegaConf.to_object(activation_checkpointing) if is_list else activation_checkpointing
        )
        self._flops: dict[str, float] = {}  # FLOPs of a sequence, by "hfu" and "mfu"
        self._paused_at: float | None = None  # start of the current validation, in seconds

    def on_train_start(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        if all(parameter.ndim <= 2 for parameter in pl_module.parameters()):
            shape, share = measure_shape(pl_module, self.activation_checkpointing)
            hardware = shape.training_flops(self.sequence_length, recomputed_share=share)
            self._flops = {"hfu": hardware, "mfu": shape.training_flops(self.sequence_length)}
        self._restart()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused_at = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        if self._paused_at is not None:  # here, because a checkpoint follows the end of validation
            self._since += time.perf_counter() - self._paused_at
            self._paused_at = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._sequences += pl_module.sequences_in(batch) * trainer.world_size
        if at_log_step(trainer):
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()  # or steps would count that the GPU has not started yet
            pl_module.log_dict(self.rates(gpus=trainer.world_size))
            self._restart()

    def rates(self, *, gpus: int) -> dict[str, float]:
        """The metrics to log, by name."""
        per_s = self._sequences / (time.perf_counter() - self._since)
        rates = {"samples_per_s": per_s, "tokens_per_s": per_s * self.sequence_length}
        for name, flops in self._flops.items():
            tflops = tflops_per_gpu(flops, sequences_per_s=per_s, gpus=gpus)
            rates[f"{name}_tflops_per_gpu"] = tflops
            if self.peak_tflops is not None:
                rates[f"{name}_percent"] = 100 * tflops / self.peak_tflops
        return rates

    def _restart(self) -> None:
        self._sequences = 0
        self._since = time.perf_counter()
        self._paused_at = None  # a resumed run is validated before it trains
