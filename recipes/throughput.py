"""How fast a run is, in the units of the paper."""

from __future__ import annotations

import resource
import time
from typing import Any

import lightning as L
import torch
from omegaconf import ListConfig, OmegaConf

from lightning_mics.blocks import find_blocks
from lightning_mics.planning.flops import TransformerShape, tflops_per_gpu
from lightning_mics.sharding import find_recomputed
from recipes.language_model import LanguageModel


class Throughput(L.Callback):
    """Logs what all ranks have done per second since the last validation, at every ``log_every_n_steps``.

    ``samples_per_s``, ``tokens_per_s``, ``hfu_tflops_per_gpu`` and ``mfu_tflops_per_gpu`` (with what is recomputed and
    without; :mod:`lightning_mics.planning.flops`), the latter's percentage of the peak as ``mfu_percent``, and
    ``memory_gib``, the most that rank 0 has taken: of its GPU, else of the machine.

    Lightning's ``ThroughputMonitor`` counts a rank's own batches, takes one number of FLOPs for both utilisations and
    waits for the GPU in every step that it logs; here time is taken over many steps.

    Args:
        sequence_length: Tokens in a sequence.
        peak_tflops: Of one GPU; None where unknown.
        activation_checkpointing: As the strategy has it.
    """

    def __init__(self, *, sequence_length: int, peak_tflops: float | None, activation_checkpointing: Any) -> None:
        self.sequence_length = sequence_length
        self.peak_tflops = peak_tflops
        is_list = isinstance(activation_checkpointing, ListConfig)
        self.activation_checkpointing = (
            OmegaConf.to_object(activation_checkpointing) if is_list else activation_checkpointing
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        shape, share = measure_shape(pl_module, self.activation_checkpointing)
        self._model_flops = shape.training_flops(self.sequence_length)
        self._hardware_flops = shape.training_flops(self.sequence_length, recomputed_share=share)
        self._restart()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restart()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._sequences += pl_module.sequences_in(batch) * trainer.world_size
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self.rates(gpus=trainer.world_size), prog_bar=False)

    def rates(self, *, gpus: int) -> dict[str, float]:
        per_s = self._sequences / (time.perf_counter() - self._since)
        model = tflops_per_gpu(self._model_flops, sequences_per_s=per_s, gpus=gpus)
        rates = {
            "samples_per_s": per_s,
            "tokens_per_s": per_s * self.sequence_length,
            "hfu_tflops_per_gpu": tflops_per_gpu(self._hardware_flops, sequences_per_s=per_s, gpus=gpus),
            "mfu_tflops_per_gpu": model,
            "memory_gib": _peak_memory_bytes() / 2**30,
        }
        return rates | ({"mfu_percent": 100 * model / self.peak_tflops} if self.peak_tflops else {})

    def _restart(self) -> None:
        self._sequences = 0
        self._since = time.perf_counter()


def measure_shape(module: LanguageModel, activation_checkpointing: Any) -> tuple[TransformerShape, float]:
    """The shape of the network, and the share of its blocks that are recomputed."""
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"network": module.build_network()})
    blocks = find_blocks(model)
    matrices = sum(p.numel() for block in blocks.values() for p in block.parameters() if p.ndim >= 2)
    config = module.config
    heads, head_dim = config.num_attention_heads, getattr(config, "head_dim", None)
    shape = TransformerShape(
        layers=len(blocks),
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        block_matrix_parameters=matrices // len(blocks),
        attention_width=heads * head_dim if head_dim else None,
    )
    recomputed = find_recomputed(model, blocks, activation_checkpointing)
    return shape, len(set(recomputed) & set(blocks.values())) / len(blocks)


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
