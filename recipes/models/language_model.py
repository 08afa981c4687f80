"""The common part of language models of ``transformers`` as LightningModules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_mics import load_pretrained
from lightning_mics.sharding.blocks import find_blocks
from recipes.models.adapters import with_adapters
from recipes.models.pretrained_folder import pretrained_folder

Objective = Literal["causal", "masked"]


class LanguageModel(L.LightningModule, ABC):
    """A network of ``transformers`` and how it is trained.

    Args:
        network: The architecture, as one of ``transformers``' configurations.
        optimizer: Makes the optimizer (and schedule) from the module, once its parameters are sharded.
        pretrained: Weights to start from: a folder that ``save_pretrained`` or ``python -m lightning_mics export``
            has made, or a name on the hub; None draws them from the seed.
        compile_blocks: ``torch.compile`` each block that is sharded.
        adapters: Arguments of ``peft``'s ``LoraConfig``: adapters are trained and nothing else, and saved as
            ``adapter`` in the Trainer's folder; None trains all.
    """

    objective: ClassVar[Objective]  # what its batches must be; data modules ask for it
    head: ClassVar[Any]  # the class of `transformers` that puts the right head on a configuration

    def __init__(
        self,
        *,
        network: PretrainedConfig,
        optimizer: Callable[[nn.Module], OptimizerLRScheduler],
        pretrained: str | None = None,
        compile_blocks: bool = False,
        adapters: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.adapters = adapters
        self.config = network
        self.pretrained = pretrained
        self.make_optimizer = optimizer
        self.compile_blocks = compile_blocks
        self.network: nn.Module | None = None

    @staticmethod
    @abstractmethod
    def sequences_in(batch: Any) -> int:
        """Number of sequences in a batch."""

    @staticmethod
    @abstractmethod
    def example_batch(sequences: int, sequence_length: int) -> Any:
        """A batch of the shapes that training has."""

    @abstractmethod
    def loss_of(self, network: nn.Module, batch: Any) -> Tensor:
        """The training loss of ``network`` on a batch."""

    def check_data(self, *, vocab_size: int, sequence_length: int) -> None:
        """Raises ValueError if the network cannot take such data."""
        if vocab_size > self.config.vocab_size:
            raise ValueError(
                f"data.vocab_size={vocab_size} does not fit model.network.vocab_size={self.config.vocab_size}: "
                f"the model needs one output per token; set both to the same number"
            )
        longest = self.longest_sequence
        if longest is not None and sequence_length > longest:
            raise ValueError(
                f"data.sequence_length={sequence_length} is longer than the {longest} positions of the model; shorten "
                "it or raise the model's positions"
            )

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raises ValueError if the network takes another token for padding than ``tokenizer`` does.

        It learns no embedding for that token, and RoBERTa no position.
        """
        own, given = self.config.pad_token_id, getattr(tokenizer, "pad_token_id", None)
        if own is not None and given is not None and own != given:
            raise ValueError(
                f"the model takes token {own} for padding, which is {tokenizer.convert_ids_to_tokens(own)!r} to the "
                f"data's tokenizer, whose padding is token {given}; use model.network.pad_token_id={given}, or by "
                "data.tokenizer the tokenizer that the model was made with"
            )

    @property
    def longest_sequence(self) -> int | None:
        """Tokens that the model has positions for; None if it sets no limit."""
        positions: int | None = getattr(self.config, "max_position_embeddings", None)
        if positions is not None and self.config.model_type in ("roberta", "xlm-roberta", "camembert"):
            return positions - self.config.pad_token_id - 1  # they number positions from there
        return positions

    def build_network(self) -> nn.Module:
        """The network, on the current device, with torch's attention, which need not hold [length, length].

        With adapters in it, if there are any.
        """
        network: nn.Module = self.head.from_config(
            self.config,
            attn_implementation="sdpa",
            dtype=torch.get_default_dtype(),  # not that of the folder the configuration is from: it is for inference
        )
        return network if self.adapters is None else with_adapters(network, self.adapters)

    def configure_model(self) -> None:
        if self.network is not None:  # Lightning calls this before every fit, validate and predict
            return
        if self._trainer is None:  # by itself, as in `load_from_checkpoint`, which gives it its weights
            self.network = self.build_network()
            return
        self.check_tokenizer(getattr(self.trainer.datamodule, "tokenizer", None))
        with torch.device("meta"):  # the strategy gives each block its initial weights when it shards it
            self.network = self.build_network()
        if self.pretrained is not None:
            load_pretrained(self.network, pretrained_folder(self.pretrained))
        if self.compile_blocks:
            for block in find_blocks(self.network).values():
                block.compile()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return self.make_optimizer(self)

    def on_train_end(self) -> None:
        """Save the adapters, if there are any; every rank calls it."""
        if self.adapters is not None:
            network: Any = self.network
            network.save_pretrained(str(Path(self.trainer.default_root_dir) / "adapter"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the latest validation loss, so that a resumed run can show that it starts from it, and the tokenizer's
        folder, for ``python -m lightning_mics export``.
        """
        if "val_loss" in self.trainer.callback_metrics:
            checkpoint["val_loss"] = self.trainer.callback_metrics["val_loss"].item()
        if tokenizer_folder := getattr(self.trainer.datamodule, "tokenizer_folder", None):
            checkpoint["tokenizer"] = str(tokenizer_folder)
