"""Floating-point operations of training, as the paper counts them (MiCS, section 5; Megatron-LM's way).

Matrix multiplications only, two operations per multiply-add; attention as if no position were masked. A backward takes
twice its forward. *Model* FLOPs are those of the mathematics (for MFU); *hardware* FLOPs count what is recomputed
in backward as well (for HFU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_mics.sharding.activation_checkpointing import find_recomputed
from lightning_mics.sharding.blocks import find_blocks
from recipes.models.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """The dimensions of a transformer that determine its FLOPs.

    Attributes:
        layers: Transformer blocks.
        hidden: Size of a hidden state.
        vocab: Rows of the output head.
        block_matrix_parameters: Parameters of one block that multiply activations; 12 hidden² for GPT-2 and BERT.
        attention_width: Heads times head size; None is ``hidden``.
    """

    layers: int
    hidden: int
    vocab: int
    block_matrix_parameters: int
    attention_width: int | None = None

    @classmethod
    def plain(cls, *, layers: int, hidden: int, vocab: int) -> TransformerShape:
        """The shape of GPT-2 and BERT: four square matrices in attention, then four times as wide in between."""
        return cls(layers=layers, hidden=hidden, vocab=vocab, block_matrix_parameters=12 * hidden**2)

    def training_flops(self, sequence_length: int, *, recomputed_share: float = 0.0) -> float:
        """FLOPs of a forward and a backward of one sequence.

        For a plain shape with everything recomputed, the paper's 96 l L h² (1 + l/6h + V/16Lh); with nothing, and so
        the model FLOPs of any run, 72 l L h² (1 + l/6h) + 6 l h V.

        Args:
            sequence_length: Tokens in the sequence, l.
            recomputed_share: Share of the blocks whose forward runs again in backward.

        Raises:
            ValueError: If the share is not between 0 and 1.
        """
        if not 0 <= recomputed_share <= 1:
            raise ValueError(f"recomputed_share={recomputed_share} is not between 0 and 1")
        width = self.hidden if self.attention_width is None else self.attention_width
        block = 2 * sequence_length * self.block_matrix_parameters + 4 * sequence_length**2 * width
        head = 2 * sequence_length * self.hidden * self.vocab
        return (3 + recomputed_share) * self.layers * block + 3 * head


def tflops_per_gpu(flops_per_sequence: float, *, sequences_per_s: float, gpus: int) -> float:
    """TFLOPS of each GPU, where all of them together train so many sequences per second."""
    return flops_per_sequence * sequences_per_s / gpus / 1e12


def measure_shape(module: LanguageModel, activation_checkpointing: Any) -> tuple[TransformerShape, float]:
    """The shape of the network, and the share of its blocks that are recomputed; builds it on the meta device."""
    with torch.device("meta"):
        network = nn.ModuleDict({"network": module.build_network()})
    return shape_of(network, module.config, activation_checkpointing)


def shape_of(network: nn.Module, config: Any, activation_checkpointing: Any) -> tuple[TransformerShape, float]:
    """The shape of a network that is built, and the share of its blocks that are recomputed.

    Args:
        network: The network, with the names that it has in training; it may be on the meta device.
        config: Configuration of the network, of ``transformers``.
        activation_checkpointing: Activation checkpointing of the strategy: a bool, or classes or patterns of modules.
    """
    blocks = find_blocks(network)
    matrices = sum(p.numel() for block in blocks.values() for p in block.parameters() if p.ndim >= 2)
    heads, head_dim = config.num_attention_heads, getattr(config, "head_dim", None)
    shape = TransformerShape(
        layers=len(blocks),
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        block_matrix_parameters=matrices // len(blocks),
        attention_width=heads * head_dim if head_dim else None,
    )
    recomputed = find_recomputed(network, blocks, activation_checkpointing)
    return shape, len(set(recomputed) & set(blocks.values())) / len(blocks)
